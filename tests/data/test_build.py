"""`build`: what goes in comes out, a crash leaves nothing, bad input is explained."""

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_rows import reconstruct

from lemur_jax.config import ConfigError
from lemur_jax.data.build import BuildConfig, build
from lemur_jax.data.files import texts as texts_of_files
from lemur_jax.data.inspect import inspect
from lemur_jax.data.location import StorageError
from lemur_jax.data.pack import StreamPacker
from lemur_jax.data.sources import SourceConfig, documents, training_texts
from lemur_jax.data.store import RowStore
from lemur_jax.data.tokenizer import Tokenizer


def source(files, **fields):
    defaults = {"name": "code", "rate": 1.0, "train_files": files}
    if not {"validation_files", "validation_fraction", "split_key"} & set(fields):
        defaults["validation_fraction"] = 0.3
    return SourceConfig(**defaults | fields)


def config_of(tmp_path, tokenizer, *sources, **fields):
    defaults = {"path": str(tmp_path / "data"), "tokenizer": str(tokenizer.directory)}
    return BuildConfig(sources=sources, **defaults | {"sequence_length": 32} | fields)


@pytest.fixture
def texts(tmp_path):
    """40 documents in a .jsonl; a hash sends some to each split."""
    lines = [
        json.dumps({"text": f"document {n} says {n * n}\n", "path": f"p{n}"}) for n in range(40)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "a.jsonl")


def test_rows_hold_the_corpus_exactly(data_dir, build_config, tokenizer):
    """Red if documents are reordered, tokenised without BOS/EOS, or put in the wrong split."""
    manifest = json.loads((Path(data_dir) / "manifest.json").read_text())
    for config in build_config.sources:
        for split in ("train", "validation"):
            expected = [d for d in documents(config) if d.split == split]
            store = RowStore(Path(data_dir) / config.name / split)
            ids = [tokenizer.encode(d.text, bos=True, eos=True) for d in expected]
            assert reconstruct(store) == ids
            assert [store.path(n) for n in range(store.documents)] == [d.path for d in expected]
            counts = manifest["sources"][config.name]["splits"][split]
            assert counts["tokens"] == sum(map(len, ids))
            assert counts["documents"] == len(ids) and counts["rows"] == store.rows
            assert counts["digest"] == store.digest()
    assert manifest["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert Tokenizer.load(Path(data_dir) / "tokenizer").fingerprint == tokenizer.fingerprint
    assert manifest["mixture"] == "lemur_demo"
    assert [s["rate"] for s in manifest["sources"].values()] == [10.0, 1.0]


def test_unigram_entropy(data_dir, build_config, tokenizer):
    """Red if BOS is counted as a target, or logarithms are to base 2."""
    manifest = json.loads((Path(data_dir) / "manifest.json").read_text())
    held_out = [d for d in documents(build_config.sources[1]) if d.split == "validation"]
    targets = np.concatenate([tokenizer.encode(d.text, eos=True) for d in held_out])
    _, counts = np.unique(targets, return_counts=True)
    expected = np.log(counts.sum()) - (counts * np.log(counts)).sum() / counts.sum()
    entropy = manifest["sources"]["text"]["splits"]["validation"]["unigram_entropy"]
    np.testing.assert_allclose(entropy, expected, rtol=1e-9)  # float64 both ways


def test_identical_build_is_a_no_op_and_another_is_refused(tmp_path, tokenizer, texts, quiet):
    """Red if `_existing` returns None: the data set of another config would be replaced."""
    config = config_of(tmp_path, tokenizer, source(texts))
    manifest = build(config, quiet)
    stamp = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    assert build(config, quiet) == manifest
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(
        ConfigError, match=r"BuildConfig.path=.*other sequence_length.*new directory"
    ):
        build(dataclasses.replace(config, sequence_length=64), quiet)
    with open(texts, "a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(ConfigError, match=r"built with other inputs: nothing was touched"):
        build(config, quiet)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"exists and is not a data set: nothing was touched"):
        build(config, quiet)
    assert (tmp_path / "data" / "thesis.txt").exists()


def test_an_error_at_the_start_leaves_nothing(tmp_path, tokenizer, texts, quiet, monkeypatch):
    """Red if `_leave` is dropped from `build`: half a part stays behind."""
    before = sorted(tmp_path.iterdir())

    def crash(*_):
        raise StorageError("disk is full")

    monkeypatch.setattr(StreamPacker, "close", crash)
    with pytest.raises(StorageError, match="disk is full"):
        build(config_of(tmp_path, tokenizer, source(texts)), quiet)
    assert sorted(tmp_path.iterdir()) == before


def test_kinds_of_files(tmp_path, tokenizer, quiet):
    """Red if .gz is read as text, .txt is split into lines, or a glob is not expanded."""
    (tmp_path / "one.txt").write_text("first\nsecond\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"body": "zipped"}\n\n')
    (tmp_path / "v.txt").write_text("held out")
    found = list(
        documents(
            source(
                (str(tmp_path / "o*.txt"), str(tmp_path / "*.gz")),
                validation_files=str(tmp_path / "v.txt"),
                text_key="body",
            )
        )
    )
    assert [(d.text, d.path, d.split) for d in found] == [
        ("zipped", "b.jsonl.gz:1", "train"),
        ("first\nsecond\n", "one.txt", "train"),
        ("held out", "v.txt", "validation"),
    ]


def test_copies_fall_on_one_side(tmp_path):
    """Red if `validation_fraction` hashes the line number instead of the text."""
    lines = [json.dumps({"text": f"t{n % 50}"}) for n in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    sides = {}
    for d in documents(source(str(tmp_path / "a.jsonl"))):
        sides.setdefault(d.text, set()).add(d.split)
    assert all(len(splits) == 1 for splits in sides.values())
    held_out = sum(splits == {"validation"} for splits in sides.values())
    assert 5 <= held_out <= 25  # 0.3 of 50, binomial: 15 +- 3 standard deviations of 3.2


def test_training_texts_are_interleaved_by_rate(tmp_path):
    """Red if sources follow one another, or held-out text reaches the tokenizer's training."""
    sources = []
    for name, rate, size in (("code", 10.0, 50), ("text", 1.0, 25)):
        lines = [
            json.dumps({"text": name * size, "split": split})
            for split in ["train"] * 300 + ["validation"]
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        files = str(tmp_path / f"{name}.jsonl")
        sources.append(source(files, name=name, rate=rate, split_key="split"))
    texts = [text[:4] for text in training_texts(tuple(sources))]
    assert len(texts) == 600
    # In bytes: a text document has half the bytes of a code document, so 5 code for 1 text.
    assert abs(texts[:60].count("text") - 10) <= 1


def test_texts_of_files(tmp_path):
    """Red if files follow one another, or a validation record reaches the tokenizer."""
    for name, n in (("a", 80), ("b", 20)):
        lines = [{"text": name * 50, "split": "train"}] * n
        lines.insert(1, {"text": "held out", "split": "validation"})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "c.txt").write_text("whole file")
    found = list(texts_of_files([str(tmp_path / "*.jsonl"), str(tmp_path / "c.txt")]))
    assert len(found) == 101 and "held out" not in found and "whole file" in found
    assert abs(found[:50].count("b" * 50) - 10) <= 1
    with pytest.raises(ConfigError, match=r"files='nowhere.txt' matches no file: check"):
        list(texts_of_files(["nowhere.txt"]))


@pytest.mark.parametrize(("name", "suggested"), [("bad/x.jsonl", False), ("c/code.jsonl", True)])
def test_a_corpus_is_suggested_for_its_own_files(name, suggested):
    """Red if `lemur data corpus` is named for a file that it never writes, or not for its own."""
    with pytest.raises(ConfigError, match="matches no file: check the path") as error:
        list(documents(source((name,))))
    assert ("lemur data corpus" in str(error.value)) == suggested


BAD_FILES = {
    "missing": (None, ["SourceConfig('code').train_files", "matches no file", "check the path"]),
    "empty": (b"", ["no document for split 'train'", "corpus is empty", "add documents"]),
    "blank": (b'{"text": ""}\n' * 2, ["corpus is empty", "empty 2"]),
    "binary": (b'{"text": "\xff\xfe"}\n', ["is not text", "line 1", "0xff", "convert the file"]),
    "nul": (b'{"text": "a"}\n\0\n', ["is not text", "line 2 has a NUL"]),
    "escaped nul": (b'{"text": "a\\u0000"}\n', ["line 1", "NUL or a lone surrogate"]),
    "surrogate": (b'{"text": "\\ud800"}\n', ["NUL or a lone surrogate", "drop that record"]),
    "not json": (b'{"text": "a"}\nhello\n', ["line 2 is not JSON", "one JSON object"]),
    "no text": (b'{"txt": "a"}\n', ["has no string 'text'", "['txt']", "SourceConfig.text_key"]),
    "not gzip": (b"plain", ["cannot be read", "replace the file"]),
    "split": (b'{"text": "a", "split": "test"}\n', ["split='test'", "'train' or 'validation'"]),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_corpus_files(kind, tmp_path, tokenizer, quiet):
    """Red if a message loses its field, value or fix, or something is left behind."""
    content, words = BAD_FILES[kind]
    name = tmp_path / ("x.jsonl.gz" if kind == "not gzip" else "x.jsonl")
    if content is not None:
        name.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    how = {"split_key": "split"} if kind == "split" else {}
    with pytest.raises(ConfigError) as error:
        build(config_of(tmp_path, tokenizer, source(str(name), **how)), quiet)
    assert all(word in str(error.value) for word in [*words, "SourceConfig"]), error.value
    if kind != "empty" and kind != "blank":
        assert name.name in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rate": 0}, ["rate=0", "positive", "remove it"]),
        ({"rate": float("nan")}, ["rate=nan"]),
        ({"name": "a/b"}, ["name='a/b'", "letters"]),
        ({"train_files": ()}, ["train_files=()", "exactly one"]),
        ({"split_key": "s", "validation_fraction": 0.1}, ["2 ways", "exactly one"]),
        ({"validation_fraction": 1.5}, ["validation_fraction=1.5", "between 0 and 1"]),
        ({"train_files": (), "task": "t"}, ["task='t'", "remove ['validation_fraction']"]),
    ],
)
def test_bad_source_settings(fields, words):
    """Red if a check of SourceConfig is dropped."""
    with pytest.raises(ConfigError) as error:
        source(**{"files": "x"} | {"validation_fraction": 0.1} | fields)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sequence_length": 1}, ["sequence_length=1", "[2, 65534]"]),
        ({"path": ""}, ["path=''", "give a directory"]),
        ({"workers": -1}, ["workers=-1", ">= 0"]),
    ],
)
def test_bad_build_settings(tmp_path, tokenizer, fields, words):
    """Red if a check of BuildConfig is dropped."""
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, tokenizer, source("x"), **fields)
    assert all(word in str(error.value) for word in words)
    with pytest.raises(ConfigError, match=r"sources=\(\) is empty"):
        config_of(tmp_path, tokenizer)
    with pytest.raises(ConfigError, match=r"sources=\['code', 'code'\] repeat a name"):
        config_of(tmp_path, tokenizer, source("x"), source("y"))


def test_inspect_prints_what_the_model_sees(data_dir, capsys):
    """Red if segments are not matched with their documents, or a wrong row is accepted."""
    store = RowStore(Path(data_dir) / "code" / "validation")
    inspect(data_dir, "validation", [1], sources=["code"])
    shown = capsys.readouterr().out
    for number in store.documents_of(1):
        assert store.path(number) in shown
    with pytest.raises(ConfigError, match=rf"rows={store.rows} .*legal: 0 to {store.rows - 1}"):
        inspect(data_dir, "validation", [store.rows], sources=["code"])
    with pytest.raises(ConfigError, match=r"split='test'.*legal: train, validation"):
        inspect(data_dir, "test")
    with pytest.raises(ConfigError, match=r"source='music'.*legal: code, text"):
        inspect(data_dir, sources=["music"])
