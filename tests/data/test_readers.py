"""Readers give back the records that other programs wrote; filters; shards; remote files."""

import gzip
import io
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lemur_jax.config import ConfigError
from lemur_jax.data.reading import examples, formats, patterns
from lemur_jax.data.sources import SourceConfig, documents, read_shard, shards

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
RECORDS = st.lists(
    st.fixed_dictionaries({"body": TEXT, "stars": st.integers(0, 99), "lang": TEXT}), max_size=20
)
relaxed = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def source(files, **fields):
    fields = {"name": "code", "rate": 1.0, "validation_fraction": 1e-9} | fields
    return SourceConfig(train_files=files, **fields)


def read(path, **fields):
    """(text, other fields) of every document."""
    found = documents(source(str(path), text_key="body", **fields))
    return [(d.text, dict(d.meta)) for d in found]


def expected(records):
    return [(r["body"], {"stars": r["stars"], "lang": r["lang"]}) for r in records]


def _jsonl(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def write_jsonl(path, records):
    path.write_bytes(_jsonl(records))


def write_gz(path, records):
    path.write_bytes(gzip.compress(_jsonl(records)))


def write_zst(path, records):
    """Two frames, as `cat a.zst b.zst` makes them."""
    zstandard = pytest.importorskip("zstandard")
    data = _jsonl(records)
    half = len(data) // 2
    path.write_bytes(b"".join(zstandard.compress(part) for part in (data[:half], data[half:])))


def write_parquet(path, records):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    schema = pyarrow.schema([("body", "string"), ("stars", "int64"), ("lang", "string")])
    table = pyarrow.Table.from_pylist(records, schema)
    parquet.write_table(table, path, row_group_size=3, compression="zstd")


WRITERS = {
    "jsonl": write_jsonl,
    "jsonl.gz": write_gz,
    "jsonl.zst": write_zst,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("suffix", WRITERS)
@relaxed
@given(records=RECORDS)
def test_records_come_back(suffix, tmp_path, records):
    """Red if lines are split at \\r or U+2028, a zstd frame is lost, or a row group is."""
    path = tmp_path / f"x.{suffix}"
    WRITERS[suffix](path, records)
    assert read(path) == expected(records)


def test_lines_longer_than_a_chunk(tmp_path, monkeypatch):
    """Red if `_lines` drops what it held when a chunk has no line end."""
    monkeypatch.setattr("lemur_jax.data.reading.lines._CHUNK", 64)
    records = [{"body": "x" * n, "stars": n, "lang": "é"} for n in (0, 1, 63, 64, 65, 500)]
    for suffix in ("jsonl", "jsonl.gz", "jsonl.zst"):
        WRITERS[suffix](tmp_path / f"x.{suffix}", records)
        assert read(tmp_path / f"x.{suffix}") == expected(records)


@relaxed
@given(records=RECORDS.filter(bool))
def test_save_to_disk(tmp_path_factory, records):
    """Red if the arrow files of a data set are read in another order than state.json's, or cut."""
    datasets = pytest.importorskip("datasets")
    tmp_path = tmp_path_factory.mktemp("hf")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(records)
    shards_written = min(3, len(records))
    whole.save_to_disk(tmp_path / "saved", num_shards=shards_written)
    assert read(tmp_path / "saved") == expected(records)
    assert len(shards(source(str(tmp_path / "saved")))) == shards_written


def test_splits_of_save_to_disk_must_be_named(tmp_path):
    """Red if the directory of a DatasetDict is taken for one of text files."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    part = datasets.Dataset.from_list([{"body": "a"}])
    datasets.DatasetDict(train=part, test=part).save_to_disk(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"holds several splits: name one, e.g. .*/both/train"):
        read(tmp_path / "both")
    assert read(tmp_path / "both" / "train") == [("a", {})]


def test_hugging_face_stream(tmp_path):
    """Red if a shard of a stream is read twice or not at all."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    records = [{"body": f"text {n}", "stars": n, "lang": "x"} for n in range(10)]
    for part in range(2):
        write_jsonl(tmp_path / f"{part}.jsonl", records[part * 5 : part * 5 + 5])
    config = source(f"{tmp_path}@train", format="hf", text_key="body")
    assert len(shards(config)) == 2
    assert [d.text for d in documents(config)] == [r["body"] for r in records]
    with pytest.raises(ConfigError, match=r"cannot be opened .*check name, config, split"):
        list(documents(source(f"{tmp_path}@nope", format="hf")))
    with pytest.raises(ConfigError, match=r"must be 'owner/name\[:config\]@split'"):
        list(documents(source("owner/name", format="hf")))


def test_trees_of_source_files(tmp_path):
    """Red if hidden files are read, or two files of one name cannot be told apart."""
    for name in ("a/__init__.py", "b/__init__.py", "b/.git/config", "Makefile"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    found = {d.path: d.text for d in documents(source(str(tmp_path), format="text"))}
    names = ["Makefile", "a/__init__.py", "b/__init__.py"]
    assert found == {name: f"# {name}\n" for name in names}
    with pytest.raises(ConfigError, match=r"is a directory: give a glob .*format='text'"):
        list(documents(source(str(tmp_path))))
    assert len(list(documents(source(f"{tmp_path}/**/*.py")))) == 2


def test_lines_per_document(tmp_path):
    """Red if the last, shorter document is lost (DM Mathematics: question, answer, question...)."""
    (tmp_path / "q.txt").write_text("".join(f"{n}?\n{n}\n" for n in range(5)))
    found = [d.text for d in documents(source(str(tmp_path / "q.txt"), lines_per_document=4))]
    assert found == ["0?\n0\n1?\n1", "2?\n2\n3?\n3", "4?\n4"]


def test_parquet_shards_are_row_groups(tmp_path, monkeypatch):
    """Red if a row group belongs to two shards, or places restart in every shard."""
    records = [{"body": f"{n} " * 50, "stars": n, "lang": ""} for n in range(20)]
    write_parquet(tmp_path / "x.parquet", records)
    monkeypatch.setattr(formats, "BYTES_PER_SHARD", 400)
    monkeypatch.setattr(formats.units, "__defaults__", (None, 400))
    config = source(str(tmp_path / "x.parquet"), text_key="body")
    parts = shards(config)
    assert len(parts) > 3 and len({part.name for part in parts}) == len(parts)
    found = [d for part in parts for d in read_shard(config, part)]
    assert [d.text for d in found] == [r["body"] for r in records]
    assert [d.path for d in found] == [f"x.parquet:{n + 1}" for n in range(20)]


@relaxed
@given(
    lines=st.lists(st.sampled_from(["", "a", "bb", "é" * 9, "z" * 40]), max_size=12), data=st.data()
)
def test_large_jsonl_files_are_cut_between_lines(tmp_path_factory, lines, data):
    """Red if a line at a cut is read twice or by nobody, or its number is not where it begins."""
    path = tmp_path_factory.mktemp("cut") / "x.jsonl"
    written = [json.dumps({"body": line}, ensure_ascii=False) if line else "" for line in lines]
    text = "\n".join(written) + data.draw(st.sampled_from(["", "\n"]))
    path.write_bytes(text.encode())
    bytes_per_shard = data.draw(st.integers(1, 60))
    cuts = formats.units(str(path), "f", bytes_per_shard=bytes_per_shard)
    rows = [row for _, units in cuts for row in formats.read(str(path), "f", units=units)]
    assert [row.fields["body"] for row in rows] == [line for line in lines if line]
    if cuts[0][1] is not None:
        assert sum(size for size, _ in cuts) == len(text.encode())
        config = source(str(path), text_key="body")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formats.units, "__defaults__", (None, bytes_per_shard))
            names = [document.path for document in documents(config)]
        assert names == [f"x.jsonl:{row.number}" for row in rows]
        begins = [text.encode()[row.number :].split(b"\n")[0] for row in rows]
        assert begins == [line.encode() for line in written if line]


def test_columns_that_nobody_needs_are_not_read(tmp_path):
    """Red if meta_keys is ignored; a filter's column is read even when it is not kept."""
    write_parquet(tmp_path / "x.parquet", [{"body": "a", "stars": 3, "lang": "en"}])
    path = tmp_path / "x.parquet"
    assert read(path, meta_keys=("lang",), where="stars > 2") == [("a", {"lang": "en"})]
    assert read(path, meta_keys=()) == [("a", {})]


def test_nested_text(tmp_path):
    """Red if dotted names are not looked up."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    record = {"data": {"body": "inside"}, "meta": {"lang": "en"}}
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "x.parquet")
    write_jsonl(tmp_path / "x.jsonl", [record])
    for name in ("x.parquet", "x.jsonl"):
        config = source(
            str(tmp_path / name), text_key="data.body", where="meta.lang == en", meta_keys=()
        )
        assert [d.text for d in documents(config)] == ["inside"]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "parquet"])
def test_object_storage(suffix, tmp_path):
    """Red if a URL is opened as a local path, or its glob is not expanded."""
    fsspec = pytest.importorskip("fsspec")
    records = [{"body": "away", "stars": 1, "lang": "x"}]
    WRITERS[suffix](tmp_path / "x", records)
    memory = fsspec.filesystem("memory")
    for n in range(2):
        memory.pipe(f"/bucket/{suffix}/{n}.{suffix}", (tmp_path / "x").read_bytes())
    assert read(f"memory://bucket/{suffix}/*.{suffix}") == expected(records) * 2
    config = source(f"{suffix}/*", root="memory://bucket", text_key="body")
    assert [shard.name for shard in shards(config)] == [f"train/{n}.{suffix}" for n in range(2)]
    with pytest.raises(ConfigError, match="matches no file"):
        read("memory://bucket/nothing/*.jsonl")


@pytest.mark.parametrize("url", ["gs://bucket/x.jsonl", "s3://bucket/x.jsonl"])
def test_storage_that_is_not_installed(url, monkeypatch):
    """Red if fsspec's ImportError gets through instead of what to install."""
    fsspec = pytest.importorskip("fsspec")

    def absent(*_):
        raise ImportError("No module")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(ConfigError, match="pip install fsspec (gcsfs|s3fs)"):
        read(url)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="unknown protocol"):
        read("what://bucket/x.jsonl")


def test_a_missing_shard_is_named(tmp_path):
    """Red if a numbered set is read with a hole; a part that is asked for by digits is no hole."""
    for n in (0, 1, 3):
        (tmp_path / f"train-{n:05}-of-00005-ab{n}c.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ConfigError, match=r"2 shards are missing \(00002, 00004\): fetch"):
        read(tmp_path / "*.jsonl")
    assert len(read(tmp_path / "train-0000[01]-of-00005*")) == 2
    assert len(read(tmp_path / "train-00003-of-00005-ab3c.jsonl")) == 1


def test_filtered_records_are_counted(tmp_path, capsys):
    """Red if a filter leaves records out without a word."""
    write_jsonl(tmp_path / "x.jsonl", [{"body": "t", "stars": n, "lang": ""} for n in range(10)])
    assert len(read(tmp_path / "x.jsonl", where="stars >= 4")) == 6
    assert "source code: 6 documents; 4 records left out by where" in capsys.readouterr().err


def test_format_by_suffix():
    """Red if a suffix of TensorFlow's shards or of a compressed file is not known."""
    known = {
        "jsonl": ["a.jsonl", "a.json.gz", "c4-train.00000-of-01024.json.gz", "a.jsonl.zst"],
        "tfrecord": ["a.tfrecord", "a.tfrecord-00000-of-00010", "a.tfrecords.gz"],
        "array_record": ["a.array_record", "a.arrayrecord-00000-of-00002"],
        "parquet": ["a.parquet"],
        "text": ["a.py", "a.R", "a.md.gz", "a.c"],
        None: ["a", "a.bin", "a.parquet.crc", "a.pyc"],
    }
    for format, names in known.items():
        assert {patterns.format_of(name) for name in names} == {format}


array_record = pytest.mark.parametrize("group", [1, 7])


@array_record
def test_array_record_of_json(tmp_path, group, monkeypatch):
    """Red if records between two reads are lost, or a shard's range is off by one."""
    module = pytest.importorskip("array_record.python.array_record_module")
    records = [{"body": f"text {n}", "stars": n, "lang": "x"} for n in range(23)]
    path = tmp_path / "x.array_record"
    writer = module.ArrayRecordWriter(str(path), f"group_size:{group}")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()
    monkeypatch.setattr(examples, "_RECORDS_PER_READ", 5)
    assert read(path) == expected(records)
    cut = formats.units(str(path), "f", bytes_per_shard=math.ceil(path.stat().st_size / 4))
    assert len(cut) == 4 and cut[0][1][0] == 0 and cut[-1][1][1] == 23
    rows = [row for _, units in cut for row in formats.read(str(path), "f", units=units)]
    assert [row.fields for row in rows] == records
    assert [row.number for row in rows] == list(range(1, 24))


def test_zstd_is_streamed(tmp_path):
    """Red if a frame is decompressed at once: the first line must come before the end is read."""
    pytest.importorskip("zstandard")
    from lemur_jax.data.reading import lines

    class Counting(io.BytesIO):
        taken = 0

        def read(self, size=-1):
            self.taken += size
            return super().read(size)

    import random

    import zstandard

    noise = random.Random(0).randbytes(4_000_000).hex().encode()
    file = Counting(zstandard.compress(noise))
    next(lines._zstd(file, zstandard))
    assert file.taken < 1_000_000
