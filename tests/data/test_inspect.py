"""What inspect shows is what the model is fed."""

import html.parser
import re
from pathlib import Path

import numpy as np
import pytest
import small_data

from lemur_jax import cli
from lemur_jax.config import ConfigError
from lemur_jax.data.batch import make_batch
from lemur_jax.data.inspect import views
from lemur_jax.data.inspect_page import write
from lemur_jax.data.store import RowStore

DOCUMENTS = [[60, 61, 62], [65] * 20, [66, 13, 67]]


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("inspect")
    documents = {"code": DOCUMENTS, "<text>": small_data.texts([9])}
    return small_data.make(root, documents, tokenizer, {"code": 1.0, "<text>": 1.0})


class Page(html.parser.HTMLParser):
    """Titles and texts of a page's tokens, and whether every tag was closed in its turn."""

    VOID = ("meta", "!doctype")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tokens, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "i":
            numbers = [int(n) for n in re.findall(r"\d+", attrs["title"])]
            self.tokens.append((*numbers, "off" not in attrs["class"].split()))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_has_every_token_as_it_is_fed(data, tmp_path):
    """Red if padding or a segment is shifted by a column, or weights belong to inputs."""
    write(tmp_path / "p.html", data, "train", [0, 1], ["code"])
    page = Page((tmp_path / "p.html").read_text())
    rows = RowStore(Path(data) / "code" / "train").read([0, 1])
    weights = make_batch(*rows).weights
    expected = [
        (id_, column, segment, int(w), bool(w))
        for row in (0, 1)
        for column, (id_, segment, w) in enumerate(
            zip(rows.tokens[row], rows.segments[row], [0, *weights[row]])
        )
        if segment
    ]
    assert page.tokens == expected
    padding = int((rows.segments == 0).sum())
    assert f"{padding} padding" in page.text
    assert "code/2.py" in page.text and "tokens 0 to 2" in page.text
    assert "http" not in (tmp_path / "p.html").read_text()  # nothing is fetched


def test_names_are_escaped(data, tmp_path):
    """Red if a source or path is written into the page as it is."""
    write(tmp_path / "p.html", data, "train", [0], ["<text>"])
    text = (tmp_path / "p.html").read_text()
    assert "<text>" not in text and "&lt;text&gt;/0.py" in text
    assert "<text>/0.py" in Page(text).text


def test_views_say_what_is_weighted(data):
    """Red if the first token of a row or document counts as a target."""
    first, second = views(data, "train", [0, 1], ["code"])
    assert [p.path for p in first.pieces] == ["code/0.py", "code/1.py"]
    assert np.flatnonzero(~first.weighted).tolist() == [0, 3]
    assert "17 tokens, 0 padding, 15 weighted targets" in first.title
    assert [(p.path, p.start_in_document) for p in second.pieces] == [
        ("code/1.py", 13),
        ("code/2.py", 0),
    ]


def test_commands(data, tmp_path, capsys):
    """Red if --first or --html is ignored, or a page appears for rows that do not exist."""
    page = tmp_path / "p.html"
    arguments = ["data", "inspect", data, "--source=code", "--rows=1"]
    assert cli.main([*arguments, "--first=1"]) == 0
    assert "code/train row 1: " in capsys.readouterr().out
    assert cli.main([*arguments, f"--html={page}"]) == 0
    assert page.exists()
    assert cli.main([*arguments, "--first=9", f"--html={tmp_path / 'q.html'}"]) == 2
    assert not (tmp_path / "q.html").exists()
    with pytest.raises(ConfigError, match=r"'cod' is not in .*legal: code, <text>; did you mean"):
        list(views(data, "train", [0], ["cod"]))
