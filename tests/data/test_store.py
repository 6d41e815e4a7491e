"""The row store: parts are one sequence, pieces are true, damage has a name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_jax.config import ConfigError
from lemur_jax.data import location
from lemur_jax.data.location import StorageError
from lemur_jax.data.pack import StreamPacker
from lemur_jax.data.store import RowStore, RowsWriter, part_name

T = 16


def documents_of(lengths):
    count = iter(range(1, 10**6))
    return [[next(count) % 997 for _ in range(length)] for length in lengths]


def write(root, parts, tokenizer="t", first=0):
    """One store of several parts; each part is a list of documents."""
    for number, documents in enumerate(parts, first):
        packer = StreamPacker(RowsWriter(location.join(root, part_name(number)), T, 1000))
        for n, ids in enumerate(documents):
            packer.append(f"é{number}/{n}", ids)
        packer.close({"tokenizer": tokenizer})
    return RowStore(root) if first == 0 else None


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "s", [documents_of([40, 5, 17]), documents_of([3, 90])])
    return tmp_path / "s"


LENGTHS = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 10 * T)), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(parts=st.lists(LENGTHS, min_size=1, max_size=3))
def test_pieces_are_the_documents(parts):
    """Red if `starts` is not written, documents of later parts are not renumbered in `pieces`, or
    `read` puts rows of several parts in the order of the parts."""
    parts = [documents_of(lengths) for lengths in parts]
    documents = [ids for part in parts for ids in part]
    paths = [f"é{n}/{i}" for n, part in enumerate(parts) for i in range(len(part))]
    root = "memory://test/pieces"  # disks take their time
    location.remove(root)
    store = write(root, parts)
    order = np.random.default_rng(0).permutation(store.rows)
    rows = store.read(order)
    targets = {n: [] for n in range(len(documents))}
    for at in np.argsort(order):  # rows in their order, read in another
        row = int(order[at])
        pieces = store.pieces(row)
        assert [p.document for p in pieces] == list(store.documents_of(row))
        assert sum(p.length for p in pieces) == (rows.segments[at] != 0).sum()
        for piece in pieces:
            found = rows.tokens[at][piece.start_in_row : piece.start_in_row + piece.length]
            end = piece.start_in_document + piece.length
            assert found.tolist() == documents[piece.document][piece.start_in_document : end]
            assert piece.path == paths[piece.document]
            targets[piece.document] += range(piece.start_in_document + 1, end)
    # Every token of every document but its first is a target exactly once.
    assert list(targets.values()) == [list(range(1, len(ids))) for ids in documents]


def test_only_unknown_tokens(tmp_path):
    """Red if rows are read by `tokens != 0` anywhere: <unk> is 0, as SeqIO's packing forgets."""
    store = write(tmp_path / "s", [[[0] * 40, [5, 0, 0, 6]]])
    assert json.loads((tmp_path / "s/part-00000/part.json").read_text())["filled"] == 17 + 17 + 12
    assert [p.length for row in range(store.rows) for p in store.pieces(row)] == [17, 17, 8, 4]


def test_loss_is_stored(tmp_path):
    """Red if `loss` is written for a store without one, or its rows are shifted."""
    rng = np.random.default_rng(0)
    segments = np.ones((5, T + 1), np.uint16)
    tokens, loss = rng.integers(0, 999, (5, T + 1)), rng.integers(0, 2, (5, T + 1))
    documents = np.arange(10).reshape(5, 2)
    for number in range(2):
        writer = RowsWriter(tmp_path / part_name(number), T, 1000, loss=True)
        assert [writer.add_document(f"d{n}") for n in range(10)] == list(range(10))
        with pytest.raises(ValueError, match=r"loss=None.*loss=True"):
            writer.append_rows(tokens, segments, documents)
        with pytest.raises(ValueError, match=r"tokens has shape \(5, 16\), must be \(5, 17\)"):
            writer.append_rows(tokens[:, 1:], segments, documents, loss)
        writer.append_rows(tokens, segments, documents, loss)
        assert writer.close()["filled"] == segments.size
    rows = RowStore(tmp_path).read([7, 0, 6])
    assert np.array_equal(rows.tokens, tokens[[2, 0, 1]])
    assert np.array_equal(rows.loss, loss[[2, 0, 1]])
    # Two documents in one segment: each is given the whole row.
    assert [p[2:] for p in RowStore(tmp_path).pieces(7)] == [(0, 0, T + 1)] * 2


def test_format_1_is_read(store):
    """Red if part.json is required, or the start of a row is not found by walking back."""
    part = store / part_name(0)
    kept = RowStore(part)
    expected = [kept.pieces(row) for row in range(kept.rows)], kept.read(range(kept.rows))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{part}/row_documents/"}}
    old = np.asarray(ts.open(spec, open=True).result().read().result())[:, :2]
    shutil.rmtree(part / "row_documents")
    ts.open(spec, create=True, dtype=ts.int64, shape=old.shape).result().write(old).result()
    (part / "part.json").unlink()
    found = RowStore(part)
    assert [found.pieces(row) for row in range(found.rows)] == expected[0]
    assert np.array_equal(found.read(range(found.rows)).tokens, expected[1].tokens)


def test_memory_and_file_urls(tmp_path):
    """Red if `location.join` goes through pathlib, or object storage is listed by folders only."""
    parts = [documents_of([40, 5]), documents_of([7])]
    digests = {write(root, parts).digest() for root in ("memory://test/s", tmp_path / "s")}
    assert len(digests) == 1
    assert RowStore(f"file://{tmp_path}/s").digest() in digests
    assert location.children("memory://test/s") == ["part-00000", "part-00001"]
    location.remove("memory://test/s/part-00000")
    assert location.children("memory://test/s") == ["part-00001"]
    for wrong in ("ftp://x/y", "gs:///y"):
        with pytest.raises(ConfigError, match=r"gs://BUCKET/PATH or s3://BUCKET/PATH"):
            location.kvstore(wrong)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda s: shutil.rmtree(s / "part-00001"), ["part-00001' is missing"]),
        (
            lambda s: (s / "part-00001/part.json").unlink(),
            ["part-00001' is damaged: part.json is missing"],
        ),
        (lambda s: (s / "part-00000/tokens/c/0/0").unlink(), ["part-00000", "tokens/c/0/0"]),
        (
            lambda s: (s / "part-00000/tokens/c/0/0").write_bytes(b"half"),
            ["part-00000", "tokens/c/0/0 has 4 bytes, not"],
        ),
    ],
)
def test_damage_is_named(store, harm, words):
    """Red if `check_files` is not called, or stops looking at sizes."""
    parts = [json.loads((store / name / "part.json").read_text()) for name in sorted_parts(store)]
    parts = [part | {"name": part_name(n)} for n, part in enumerate(parts)]
    harm(store)
    with pytest.raises(ConfigError) as error:
        RowStore(store, parts)
    assert all(word in str(error.value) for word in words), error.value


def sorted_parts(store):
    return sorted(path.name for path in store.iterdir())


def test_an_unfinished_part_is_named(store):
    """Red if a part without part.json is passed over when the directory is listed."""
    (store / "part-00000" / "part.json").unlink()
    with pytest.raises(ConfigError, match=r"part-00000' has no part.json: it is unfinished"):
        RowStore(store)


def test_a_flipped_bit_is_an_error(store):
    """Red if the crc32c codec is dropped: another token would be learnt."""
    file = store / "part-00000" / "tokens" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError, match=r"part-00000.*'tokens' cannot be read.*verify"):
        RowStore(store).read([0])
    assert RowStore(store).read([1]).tokens.shape == (1, T + 1)  # that row alone


def test_parts_of_different_length(tmp_path):
    """Red if the columns of parts are not compared."""
    write(tmp_path, [documents_of([5])])
    packer = StreamPacker(RowsWriter(tmp_path / part_name(1), T + 1, 1000))
    packer.append("x", [1, 2])
    packer.close({"tokenizer": "t"})
    with pytest.raises(ConfigError, match=r"parts of different \(columns, loss\).*17.*18"):
        RowStore(tmp_path)


def test_an_empty_document_is_refused(tmp_path):
    """Red if a document without tokens gets a number: no row would hold it."""
    packer = StreamPacker(RowsWriter(tmp_path / "s", T, 1000))
    with pytest.raises(ValueError, match=r"document 'x' has no tokens: leave it out and count it"):
        packer.append("x", [])


def test_a_full_disk_is_named(tmp_path):
    """Red if TensorStore's error gets through, or part.json is written before the arrays."""
    code = (
        "import resource, sys; from lemur_jax.errors import LemurError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from lemur_jax.data.store import RowsWriter\n"
        "from lemur_jax.data.pack import StreamPacker\n"
        "packer = StreamPacker(RowsWriter(sys.argv[1], 64, 1000))\n"
        "try:\n"
        "    for n in range(2000): packer.append(str(n), [1] * 64)\n"
        "    packer.close()\n"
        "except LemurError as error: sys.exit(str(error))\n"
    )

    arguments = [sys.executable, "-c", code, str(tmp_path / "s")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 1, done
    assert "cannot be written" in done.stderr and "the disk is full" in done.stderr, done.stderr
    assert "/s/" in done.stderr and "free some space" in done.stderr
    assert not Path(tmp_path, "s", "part.json").exists()


def test_parts_of_another_tokenizer(tmp_path):
    """Red if `_other_build` or the comparison in `_listed` is dropped: ids mean other text."""
    documents = documents_of([40, 5])
    write(tmp_path, [documents, documents], tokenizer="a" * 64)
    parts = [
        json.loads((tmp_path / name / "part.json").read_text()) | {"name": name}
        for name in sorted_parts(tmp_path)
    ]
    shutil.rmtree(tmp_path / "part-00001")
    write(tmp_path, [[[n + 1 for n in ids] for ids in documents]], tokenizer="b" * 64, first=1)
    with pytest.raises(ConfigError, match=r"part-00001' is of another build \(tokenizer bbbb"):
        RowStore(tmp_path, parts)
    with pytest.raises(ConfigError, match=r"parts of several tokenizers: .*aaaa.*bbbb.*remove"):
        RowStore(tmp_path)
