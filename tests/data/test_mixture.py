"""Lemur's mixture as gin declares it: Table 8, presets on files of their layouts, epochs."""

import json

import pytest
from table_8 import TABLE

from lemur_jax import settings
from lemur_jax.config import ConfigError
from lemur_jax.data import epochs
from lemur_jax.data.build import BuildConfig
from lemur_jax.data.sources import SourceConfig, documents, shards

# Implied unique tokens (B) of Table 8 = effective tokens / epochs.
UNIQUE = {"python": 21.97, "sql": 6.71, "shell": 1.30, "notebook": 1.88, "java": 27.3}
EPOCHS = {"python": 2.98, "sql": 0.69, "shell": 1.26, "notebook": 0.82, "java": 0.06}


def load(root, **bindings):
    macros = {
        "THE_STACK": f"{root}/stack",
        "REFINEDWEB": f"{root}/refinedweb",
        "REDPAJAMA": f"{root}/redpajama",
        "DM_MATHEMATICS": f"{root}/mathematics",
        "TOKENIZER": "tokenizer",
        "DATA": f"{root}/data",
    }
    given = [f'{name}="{value}"' for name, value in macros.items()]
    given += [f"{name}={value}" for name, value in bindings.items()]
    classes = [BuildConfig, SourceConfig]
    return settings.load(BuildConfig, ["data/lemur_pretrain.gin"], given, classes)[0]


def test_rates_are_the_tables():
    """Red if a rate differs from the paper's, or a source is missing."""
    config = load("/nowhere")
    assert {source.name: source.rate for source in config.sources} == TABLE
    assert sum(TABLE.values()) == pytest.approx(99.90)
    assert config.mixture == "lemur_pretrain"


@pytest.mark.slow
def test_mixture_of_sixteen_tasks(tokenizer):
    """Red if `register_mixture` loses a Task, renames one, or normalises the rates."""
    seqio = pytest.importorskip("seqio")
    from lemur_jax.data import tasks

    tasks.register_mixture("lemur_pretrain", load("/nowhere").sources, tokenizer.directory)
    mixture = seqio.get_mixture_or_task("lemur_pretrain")
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == {f"lemur_pretrain_{name}": rate for name, rate in TABLE.items()}
    by_name = {source.name: source for source in tasks.sources_of("lemur_pretrain")}
    assert by_name == {source.name: source for source in load("/nowhere").sources}


def test_epochs_of_the_paper():
    """Red if drawn and available are swapped, or shares are not normalised."""
    rates = {name: TABLE[name] for name in EPOCHS} | {"rest": 99.90 - sum(TABLE[n] for n in EPOCHS)}
    tokens = {name: round(UNIQUE[name] * 1e9) for name in EPOCHS} | {"rest": 10**12}
    found = {one.name: one for one in epochs.account(tokens, rates, 90e9)}
    assert {name: round(found[name].epochs, 2) for name in EPOCHS} == EPOCHS
    assert sum(one.share for one in found.values()) == pytest.approx(1)


def manifest(max_epochs):
    counts = {"a": 100, "b": 50}
    return {
        "sequence_length": 10,
        "sources": {n: {"rate": 1.0, "splits": {"train": {"rows": r}}} for n, r in counts.items()},
        "max_epochs": dict.fromkeys(counts, max_epochs),
    }


def test_too_many_epochs_are_warned_of():
    """Red if the warning compares drawn tokens with max_epochs, or the limit itself warns."""
    said = []
    epochs.report_run(manifest(2.0), {"a": 100, "b": 100}, said.append)
    assert said == ["epochs: a 1.00, b 2.00"]
    said.clear()
    epochs.report_run(manifest(2.0), {"a": 0, "b": 110}, said.append)  # a: rate 0 from the start
    assert len(said) == 2
    assert said[0] == "epochs: a 0.00, b 2.20"
    assert "source b: 2.20 epochs, more than SourceConfig.max_epochs=2: lower" in said[1]
    assert epochs.longest_run(manifest(2.0)) == ("b", 2000)
    with pytest.raises(ConfigError, match=r"they differ: \['b'\]"):
        epochs.account({"a": 1}, {"a": 1.0, "b": 1.0}, 10)


def test_the_longest_run_is_said_in_words(capsys):
    """Red if the line loses the number of times, or the source it is about."""
    epochs.show_longest_run(manifest(2.0))
    printed = capsys.readouterr()
    assert "run without a warning has 2,000 tokens and reads source 'b' 2 times" in printed.out
    assert "epochs per source" in printed.err


def test_the_table_is_printed(capsys):
    """Red if a source or its mark is missing."""
    from rich.console import Console

    console = Console(width=100, force_terminal=False)
    epochs.show(epochs.of_data_set(manifest(1.5), 2000), console)
    shown = capsys.readouterr().out
    assert "2.00 (!)" in shown and "1.00 " in shown and "warning: source b" in shown


def test_presets_read_their_layouts(tmp_path):
    """Red if a preset's glob or column is not the data set's: one file each, in its layout."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    def write(name, record):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist([record]), path)
        else:
            path.write_text(json.dumps(record) + "\n")

    code = {
        "hexsha": "0",
        "content": "x = 1",
        "lang": "Python",
        "max_stars_repo_name": "a/b",
        "max_stars_repo_path": "x.py",
        "max_stars_repo_licenses": ["MIT"],
        "max_stars_count": 7,
    }
    configs = {source.name: source for source in load(tmp_path).sources}
    for pattern in (p for s in configs.values() if "stack" in s.root for p in s.train_files):
        write(f"stack/{pattern}".replace("*", "data-00000-of-00001"), code)
    for n in range(5534):
        if n == 0:
            web = {"content": "web", "url": "http://x", "dump": "d", "segment": "s"}
            write(f"refinedweb/data/train-{n:05}-of-05534-ab.parquet", web)
        else:  # all must be there; reading them is another matter
            (tmp_path / f"refinedweb/data/train-{n:05}-of-05534-ab.parquet").touch()
    for name in ("wikipedia/wiki", "book/book", "arxiv/arxiv_1", "stackexchange/stackexchange"):
        write(f"redpajama/{name}.jsonl", {"text": name, "meta": {"language": "en"}})
    (tmp_path / "mathematics/train-easy").mkdir(parents=True)
    pairs = "".join(f"What is {n}?\n{n}\n" for n in range(100))
    (tmp_path / "mathematics/train-easy/a.txt").write_text(pairs)

    first = {}
    for name, config in configs.items():
        assert shards(config), name
        first[name] = next(documents(config))
    assert {first[n].text for n in TABLE if n in ("python", "others", "cpp")} == {"x = 1"}
    assert first["python"].meta["max_stars_repo_licenses"] == ["MIT"]
    assert "hexsha" not in first["python"].meta
    assert first["refinedweb"].text == "web" and "segment" not in first["refinedweb"].meta
    assert (
        first["books"].text == "book/book" and first["wikipedia"].meta["meta"]["language"] == "en"
    )
    assert first["dm_mathematics"].text.count("\n") == 127
    assert len(list(documents(configs["dm_mathematics"]))) == 2

    starred = load(tmp_path, **{"python/SourceConfig.where": "('max_stars_count >= 8',)"}).sources
    assert list(documents(starred[0])) == []


def test_problems_of_all_sources_are_told():
    """Red if gin stops at the first source that cannot be: settings._check_referred is not run."""
    bad = {"python/SourceConfig.rate": -1, "arxiv/SourceConfig.where": "('a ? b',)"}
    with pytest.raises(ConfigError) as error:
        load("/nowhere", **bad)
    told = str(error.value)
    assert "SourceConfig('python').rate=-1" in told
    assert "SourceConfig('arxiv').where='a ? b'" in told
    assert "In call to configurable" not in told


def test_macros_are_asked_for(tmp_path):
    """Red if a preset's directory is not required: it would be read from the working directory."""
    with pytest.raises(ConfigError) as error:
        settings.load(BuildConfig, ["data/lemur_pretrain.gin"], [], [BuildConfig, SourceConfig])
    wanted = ("THE_STACK", "REFINEDWEB", "REDPAJAMA", "DM_MATHEMATICS", "TOKENIZER", "DATA")
    assert all(f"macro {name} must be set" in str(error.value) for name in wanted)
