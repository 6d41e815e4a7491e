"""The corpus is real, verifiable, free of exact duplicates, and held out by file."""

import collections
import email.message
import hashlib
import json

import pytest

from lemur_jax.config import ConfigError
from lemur_jax.data import corpus as corpus_module
from lemur_jax.data.corpus import collect, licence_of
from lemur_jax.data.prose import docstring_paragraphs, is_prose, line_key

SHARED = "This paragraph of prose is shared by every file, so it must never be held out anywhere."


def _group(path):
    return path if "pydoc_data" in path else path.split("#")[0]


def test_manifest_names_the_files_and_their_hashes(corpus, records):
    """Red if a hash is taken of anything but the text: e.g. sha256(d.path) in `collect`."""
    manifest = json.loads((corpus / "manifest.json").read_text())
    listed = {(f["source"], f["path"]): f for f in manifest["files"]}
    assert len(listed) == sum(map(len, records.values())) > 200
    for source, lines in records.items():
        for record in lines:
            data = record["text"].encode("utf-8")
            entry = listed[source, record["path"]]
            assert entry["sha256"] == record["sha256"] == hashlib.sha256(data).hexdigest()
            assert entry["bytes"] == len(data)
            assert entry["split"] == record["split"]
            assert entry["licence"]
            assert not record["path"].startswith("/")
        assert manifest["sources"][source]["bytes"] == sum(
            len(r["text"].encode("utf-8")) for r in lines
        )


def test_no_exact_duplicates(records):
    """Red if `keep.is_new("code", text)` is left out of `_code` (see also the made-up machine)."""
    for lines in records.values():
        assert len({r["text"] for r in lines}) == len(lines)


def test_held_out_files_are_in_no_training_source(records):
    """Red if one source splits by another key, e.g. `split_of("code/" + file.path)` in `_code`."""
    groups = {"train": set(), "validation": set()}
    for lines in records.values():
        for record in lines:
            groups[record["split"]].add(_group(record["path"]))
    assert groups["validation"] and not groups["train"] & groups["validation"]


def test_held_out_docstrings_are_in_no_training_code(records):
    """Red if `in_training_code` is empty: shared docstrings exist in the real corpus or below."""
    code = {
        line_key(line)
        for r in records["code"]
        if r["split"] == "train"
        for line in r["text"].splitlines()
    }
    held_out = [
        line
        for r in records["text"]
        if r["split"] == "validation" and r["path"].endswith("#docstrings")
        for line in r["text"].splitlines()
        if len(line_key(line)) >= 30
    ]
    assert len(held_out) > 50
    assert not [line for line in held_out if line_key(line) in code]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A made-up machine of 80 sources, with each kind of bad file, behind `_candidates`."""
    files = []
    for n in range(80):
        own = f"File number {n} explains its own purpose in a sentence that no other file has. " * 4
        body = "\n".join(f"value_{n}_{k} = {k}" for k in range(20))
        text = f'"""{own.strip()}\n\n{SHARED}\n"""\n\n{body}\n'
        (tmp_path / f"m{n}.py").write_text(text)
        files.append(f"m{n}.py")
    (tmp_path / "copy.py").write_bytes((tmp_path / "m0.py").read_bytes())
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9 " + b"x = 1\n" * 40)
    (tmp_path / "nul.py").write_bytes(b"x = '\0'\n" * 40)
    (tmp_path / "table.py").write_text("x = 1\n" * 200_000)
    (tmp_path / "__init__.py").write_text("")
    files += ["copy.py", "latin.py", "nul.py", "table.py", "__init__.py", "gone.py"]
    found = [corpus_module._File(f"dist/p/{name}", tmp_path / name, "MIT") for name in files]
    monkeypatch.setattr(corpus_module, "_candidates", lambda: (list(found), [], []))
    return tmp_path


def test_bad_files_are_skipped_with_reasons(machine, quiet):
    """Red if any check of `_Filter.read` is dropped: its reason is then absent."""
    manifest = collect(machine / "out", validation_fraction=0.4, console=quiet)
    reasons = {reason: about["paths"] for reason, about in manifest["skipped"].items()}
    assert reasons["not text: not UTF-8"][0] == "dist/p/latin.py"
    assert reasons["not text: NUL byte"][0] == "dist/p/nul.py"
    assert reasons["larger than 1000000 bytes"][0] == "dist/p/table.py"
    assert reasons["smaller than 128 bytes"][0] == "dist/p/__init__.py"
    assert reasons["unreadable: FileNotFoundError"][0] == "dist/p/gone.py"
    assert manifest["sources"]["code"]["documents"] == 80
    assert manifest["sources"]["code"]["duplicates_removed"] == 1


def test_shared_docstring_is_not_held_out(machine, quiet):
    """Red if `isdisjoint` in `_text` is inverted or the paragraph filter is removed."""
    first = collections.Counter()
    for seed in range(6):
        out = machine / f"out{seed}"
        collect(out, seed=seed, validation_fraction=0.4, console=quiet)
        for line in (out / "text.jsonl").read_text().splitlines():
            record = json.loads(line)
            if SHARED in record["text"]:
                first[record["split"]] += 1
    # Its first owner is in training for some seeds; where it is held out, it must be dropped.
    assert 0 < first["train"] < 6 and first["validation"] == 0


def test_same_seed_same_bytes(machine, quiet):
    """Red if the choice depends on anything but seed and paths, e.g. `hash(path)`."""
    limits = {"code": 30_000, "text": 8_000}
    options = {"max_bytes_per_source": limits, "validation_fraction": 0.4, "console": quiet}
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        collect(machine / name, seed=seed, **options)
        contents.append([(machine / name / f).read_bytes() for f in ("code.jsonl", "text.jsonl")])
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"License-Expression": "MIT", "License": "no"}, "MIT"),
        ({"License": "BSD 3-Clause"}, "BSD 3-Clause"),
        (
            {"License": "Long\ntext", "Classifier": "License :: OSI Approved :: ISC License"},
            "ISC License",
        ),
        ({"License": "Licence of X\nmore"}, "Licence of X"),
        ({}, "unknown"),
    ],
)
def test_licence_comes_from_metadata(fields, expected):
    """Red if the order of the fields in `licence_of` changes."""
    metadata = email.message.Message()
    for key, value in fields.items():
        metadata[key] = value
    assert licence_of(metadata) == expected


def test_prose_of_docstrings_only():
    """Red if `is_prose` accepts tables, examples or signatures, or the walk misses a method."""
    prose = "This sentence has clearly more than eight words in it."
    example = ">>> this is an example of code with many plain words"
    source = f'class A:\n  def f(self):\n    """{prose}\n\n    {example}\n    """\n'
    assert docstring_paragraphs(source) == [prose]
    assert docstring_paragraphs("def f(:") == []
    assert not is_prose("x: int = 3, y: dict[str, int] = {}, z: (1, 2, 3), w: [4, 5, 6]")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_bytes_per_source": {"code": 0}}, ["max_bytes_per_source['code']=0", "positive"]),
        ({"max_bytes_per_source": {"music": 5}}, ["'music'", "'code' or 'text'"]),
        ({"validation_fraction": 2}, ["validation_fraction=2", "between 0 and 1"]),
        ({"max_bytes_per_source": {"code": 1}}, ["=1 leaves 1", "raise the limit"]),
    ],
)
def test_bad_settings(machine, quiet, options, words):
    """Red if a message loses the field, the value or the fix, or something is written."""
    with pytest.raises(ConfigError) as error:
        collect(machine / "out", console=quiet, **options)
    assert all(word in str(error.value) for word in words), error.value
    assert not (machine / "out").exists()


def test_foreign_directory_is_left_alone(machine, quiet):
    """Red if `check_replaceable` is not called: the directory is then replaced."""
    (machine / "mine").mkdir()
    (machine / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"out_dir=.*not empty.*new directory"):
        collect(machine / "mine", console=quiet)
    assert (machine / "mine" / "thesis.txt").read_text() == "years of work"
