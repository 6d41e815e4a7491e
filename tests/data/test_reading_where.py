"""The grammar of SourceConfig.where: what it takes, what it means, what it refuses."""

import pytest

from lemur_jax.config import ConfigError
from lemur_jax.data.reading import where
from lemur_jax.data.sources import SourceConfig

CLAUSES = [
    ("stars >= 5", {"stars": 5}, True),
    ("stars > 5", {"stars": 5}, False),
    ("stars < 5.5", {"stars": 5}, True),
    ("stars >= 5", {"stars": None}, False),
    ("lang == Python", {"lang": "Python"}, True),
    ('lang == "C, C++"', {"lang": "C, C++"}, True),
    ("lang != Python", {"lang": "Python"}, False),
    ("lang != Python", {"lang": None}, True),
    ("lang in Python, SQL", {"lang": "SQL"}, True),
    ("lang in Python, SQL", {"lang": "Java"}, False),
    ("lang not in Python, SQL", {"lang": "Java"}, True),
    ("licenses in MIT, Apache-2.0", {"licenses": ["MIT"]}, True),
    ("licenses in MIT, Apache-2.0", {"licenses": ["MIT", "GPL-3.0"]}, False),
    ("licenses in MIT", {"licenses": []}, False),
    ("licenses not in GPL-3.0", {"licenses": ["MIT", "GPL-3.0"]}, False),
    ("tags has a", {"tags": ["a", "b"]}, True),
    ("name has jax", {"name": "lemur_jax"}, True),
    ("meta.lang == en", {"meta": {"lang": "en"}}, True),
    ("n == 3", {"n": 3}, True),
    ("lang == en", {"lang": b"en"}, True),
]


@pytest.mark.parametrize(("clause", "record", "holds"), CLAUSES)
def test_where(clause, record, holds):
    """Red if an operator is swapped, or a list is in when only one of its items is."""
    ((parsed,), problems) = where.parse([clause], "w")
    assert not problems and parsed.holds(record) is holds


@pytest.mark.parametrize(
    "clause", ["stars", "stars >= many", "__import__('os')", "a = 3", "a in", "stars > nan", ""]
)
def test_where_refuses(clause):
    """Red if what is not in the grammar is ignored."""
    with pytest.raises(ConfigError, match=r"where=['\"]"):
        SourceConfig(name="x", rate=1.0, train_files="x", validation_fraction=0.1, where=(clause,))
