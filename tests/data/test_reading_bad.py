"""Input that cannot be read: named with file and place, or counted when that is asked for."""

import gzip
import json
import sys

import pytest

from lemur_jax.config import ConfigError
from lemur_jax.data.build import BuildConfig, build
from lemur_jax.data.reading.records import ReadReport
from lemur_jax.data.sources import SourceConfig, documents

LINES = "".join(json.dumps({"text": f"text {n} " * 40}) + "\n" for n in range(400)).encode()


def source(path, **fields):
    fields = {"name": "code", "rate": 1.0, "validation_fraction": 1e-9} | fields
    return SourceConfig(train_files=str(path), **fields)


def parquet_bytes(tmp_path, pyarrow, columns, **options):
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table(columns), tmp_path / "made", **options)
    return (tmp_path / "made").read_bytes()


def gz_truncated(tmp_path):
    return gzip.compress(LINES, mtime=0)[:-200]


def gz_flipped(tmp_path):
    """Damage that zlib reports as zlib.error, which is no OSError."""
    data = bytearray(gzip.compress(LINES, mtime=0))
    data[12:40] = b"\xff" * 28
    return bytes(data)


def zst_truncated(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    return zstandard.compress(LINES)[:-9]


def zst_flipped(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(LINES))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def zst_begun(tmp_path):
    pytest.importorskip("zstandard")
    return b"\x28\xb5\x2f"


def not_zst(tmp_path):
    pytest.importorskip("zstandard")
    return b"plain text"


def parquet_truncated(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    return parquet_bytes(tmp_path, pyarrow, {"text": ["a"] * 100})[:-10]


def parquet_flipped(tmp_path):
    """A damaged page in the third row group, which only the page's checksum can tell."""
    pyarrow = pytest.importorskip("pyarrow")
    texts = [f"{n} " * 200 for n in range(300)]
    options = {"row_group_size": 100, "compression": "none", "write_page_checksum": True}
    options["use_dictionary"] = False
    data = bytearray(parquet_bytes(tmp_path, pyarrow, {"text": texts}, **options))
    column = pyarrow.parquet.read_metadata(tmp_path / "made").row_group(2).column(0)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    return bytes(data)


def parquet_other_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    return parquet_bytes(tmp_path, pyarrow, {"content": ["a"]})


def parquet_nulls(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    return parquet_bytes(tmp_path, pyarrow, {"text": pyarrow.array([None, None], "string")})


def parquet_not_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    raw = pyarrow.array([b"good", b"ba\xffd", b"good"], "binary").view("string")
    return parquet_bytes(tmp_path, pyarrow, {"text": raw})


def arrow_truncated(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["a" * 1000] * 100})
    with pyarrow.ipc.new_stream(tmp_path / "made", table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return (tmp_path / "made").read_bytes()[:-5000]


def array_record_broken(tmp_path):
    pytest.importorskip("array_record")
    return b"no ArrayRecord at all" * 5000


BAD = {
    "gz truncated": ("x.jsonl.gz", gz_truncated, ["cannot be read after line", "replace"]),
    "gz flipped": ("x.jsonl.gz", gz_flipped, ["cannot be read", "may be wrong", "replace"]),
    "zst truncated": ("x.jsonl.zst", zst_truncated, ["cannot be read", "truncated", "replace"]),
    "zst flipped": ("x.jsonl.zst", zst_flipped, ["cannot be read", "zstd", "may be wrong"]),
    "zst empty": ("x.jsonl.zst", zst_begun, ["cannot be read", "truncated"]),
    "not zst": ("x.jsonl.zst", not_zst, ["cannot be read", "zstd"]),
    "parquet truncated": ("x.parquet", parquet_truncated, ["cannot be read", "replace"]),
    "parquet flipped": ("x.parquet", parquet_flipped, ["cannot be read", "checksum", "replace"]),
    "parquet empty": ("x.parquet", lambda _: b"", ["cannot be read", "replace"]),
    "other column": (
        "x.parquet",
        parquet_other_column,
        ["has no string 'text'", "['content']", "text_key"],
    ),
    "nulls": ("x.parquet", parquet_nulls, ["record 1 has no string 'text'", "NoneType"]),
    "not utf-8": ("x.parquet", parquet_not_utf8, ["record 2", "0xff", "'text'", "drop"]),
    "arrow truncated": ("x.arrow", arrow_truncated, ["cannot be read after record", "replace"]),
    "arrow empty": ("x.arrow", lambda _: b"", ["cannot be read", "replace"]),
    "array_record": ("x.array_record", array_record_broken, ["cannot be read", "replace"]),
    "array_record empty": ("x.array_record", lambda _: b"", ["cannot be read", "replace"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named(kind, tmp_path):
    """Red if a damaged file is taken for a shorter one, or a library's error gets through."""
    name, make, words = BAD[kind]
    (tmp_path / name).write_bytes(make(tmp_path))
    with pytest.raises(ConfigError) as error:
        list(documents(source(tmp_path / name)))
    message = str(error.value)
    assert all(word in message for word in [*words, "SourceConfig('code').train_files", name])


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_counted(kind, tmp_path, capsys):
    """Red if counting swallows what could be read before the damage, or prints nothing."""
    name, make, words = BAD[kind]
    (tmp_path / name).write_bytes(make(tmp_path))
    report = ReadReport()
    found = list(documents(source(tmp_path / name, bad_records="count"), report=report))
    assert report.bad >= 1 and report.documents == len(found)
    assert all(word in report.first[0] for word in [*words[:1], name])
    if kind == "not utf-8":
        assert [d.text for d in found] == ["good", "good"] and report.bad == 1
    if kind == "parquet flipped":
        assert len(found) == 200 and "what follows in the file is lost" in report.first[0]
    list(documents(source(tmp_path / name, bad_records="count")))
    assert f"{report.bad} bad records" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["not zst", "parquet truncated", "arrow empty", "array_record"])
def test_a_build_of_damage_alone_names_it(kind, tmp_path, tokenizer, quiet):
    """Red if the error of a source without documents drops the counts, or `first` of `_empty`."""
    name, make, words = BAD[kind]
    (tmp_path / name).write_bytes(make(tmp_path))
    config = BuildConfig(
        path=str(tmp_path / "data"),
        tokenizer=str(tokenizer.directory),
        sources=(source(tmp_path / name, bad_records="count"),),
        sequence_length=32,
    )
    with pytest.raises(ConfigError) as error:
        build(config, quiet)
    assert all(w in str(error.value) for w in ["give no document", "bad 1", *words, f"{name}'"])


def test_damage_is_named_before_bad_lines(tmp_path):
    """Red if `_name_some` keeps the order of reading: five bad lines then hide a lost rest."""
    noise = gzip.compress(b"no JSON\n" * 9 + LINES, mtime=0)
    (tmp_path / "x.jsonl.gz").write_bytes(noise[:-200])
    report = ReadReport()
    list(documents(source(tmp_path / "x.jsonl.gz", bad_records="count"), report=report))
    assert report.bad >= 10 and len(report.first) == 5
    assert "cannot be read after line" in report.first[0] and "truncated" in report.first[0]
    assert report.first[0].endswith("what follows in the file is lost, and in no count")
    assert "line 1 is not JSON" in report.first[1]
    other = ReadReport(bad=5, first=[f"line {n}" for n in range(5)])
    other.add(report)
    assert other.first[0] == report.first[0] and other.first[1] == "line 0"


def test_one_damaged_record_of_array_record(tmp_path, monkeypatch):
    """Red if one flipped byte loses the records before it, or those after it."""
    module = pytest.importorskip("array_record.python.array_record_module")
    path = tmp_path / "x.array_record"
    writer = module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    texts = [f"{n:03d} " * 100 for n in range(100)]
    for text in texts:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()
    data = bytearray(path.read_bytes())
    data[data.index(b"041 041")] ^= 1
    path.write_bytes(data)
    report = ReadReport()
    found = list(documents(source(path, bad_records="count"), report=report))
    assert [d.text for d in found] == texts[:41] + texts[42:]
    assert report.bad == 1 and "cannot be read at record 42 (" in report.first[0]
    with pytest.raises(ConfigError, match=r"cannot be read at record 42 .*replace"):
        list(documents(source(path)))


def test_bad_records_are_counted_up_to_a_limit(tmp_path, capsys):
    """Red if a bad record ends the file, more than the first are kept, or the limit is ignored."""
    lines = ['{"text": "good"}', "not json", '{"other": 1}', '"text"', '{"text": "\\u0000"}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines * 3))
    report = ReadReport()
    found = list(documents(source(tmp_path / "x.jsonl", bad_records="count"), report=report))
    assert len(found) == 3 and report.bad == 12 and len(report.first) == 5
    assert "line 2 is not JSON" in report.first[0] and "line 4 is JSON but a str" in report.first[2]
    config = source(tmp_path / "x.jsonl", bad_records="count", max_bad_records=4)
    with pytest.raises(ConfigError, match=r"5 bad records, .*max_bad_records=4: repair") as error:
        list(documents(config))
    assert "line 3 has no string 'text'" in str(error.value)
    list(documents(source(tmp_path / "x.jsonl", bad_records="count", max_bad_records=12)))
    assert "12 bad records" in capsys.readouterr().err


def test_filter_on_a_field_that_is_not_there(tmp_path):
    """Red if a misspelt field removes every record, or a word is compared with a number."""
    (tmp_path / "x.jsonl").write_text('{"text": "a", "stars": 5, "lang": "en"}\n')
    path = tmp_path / "x.jsonl"
    with pytest.raises(ConfigError, match=r"line 1 has no field 'star' .*'stars'.*where"):
        list(documents(source(path, where="star > 1")))
    with pytest.raises(ConfigError, match=r"'lang' is 'en', not a number as lang > 1"):
        list(documents(source(path, where="lang > 1")))


def test_filter_on_a_column_that_is_not_there(tmp_path):
    """Red if a parquet file is read to its end before the missing column is named."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"text": ["a"], "lang": ["en"]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"has no column 'stars' .*lang.*where"):
        list(documents(source(tmp_path / "x.parquet", where="stars > 1", meta_keys=())))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "csv"}, ["format='csv'", "one of", "parquet"]),
        ({"bad_records": "skip"}, ["bad_records='skip'", "'raise' or 'count'"]),
        ({"max_bad_records": -1}, ["max_bad_records=-1", ">= 0"]),
        ({"lines_per_document": 0}, ["lines_per_document=0", ">= 1"]),
        ({"max_epochs": 0}, ["max_epochs=0", "positive"]),
        ({"where": ("a", "b <> 3")}, ["where='a'", "where='b <> 3'"]),
    ],
)
def test_bad_settings(fields, words):
    """Red if a check of SourceConfig is dropped, or only the first problem is told."""
    with pytest.raises(ConfigError) as error:
        source("x.jsonl", **fields)
    assert all(word in str(error.value) for word in words), error.value


def test_a_lost_file_of_save_to_disk(tmp_path):
    """Red if a data set whose file is gone is read without it."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"text": "a"}] * 4).save_to_disk(tmp_path / "set", num_shards=2)
    (tmp_path / "set" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"lists files that are missing: .*data-00001-of-00002"):
        list(documents(source(tmp_path / "set")))
    (tmp_path / "set" / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not of datasets.save_to_disk"):
        list(documents(source(tmp_path / "set")))


LIBRARIES = {
    "zstandard": ("x.jsonl.zst", {}),
    "pyarrow": ("x.parquet", {}),
    "pyarrow.parquet": ("x.parquet", {}),
    "array_record.python": ("x.array_record", {}),
    "datasets": ("owner/name@train", {"format": "hf"}),
    "fsspec": ("memory://x/x.jsonl", {}),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_not_installed(library, tmp_path, monkeypatch):
    """Red if an ImportError gets through instead of what to install."""
    name, fields = LIBRARIES[library]
    if name.startswith("x."):
        (tmp_path / name).write_bytes(b"something")
        name = tmp_path / name
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=f"pip install {library.split('.')[0]}"):
        list(documents(source(name, **fields)))
