"""Rows: nothing of a document is lost, and every target is predicted exactly once."""

import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_jax.config import ConfigError
from lemur_jax.data import rows_writer
from lemur_jax.data.pack import StreamPacker
from lemur_jax.data.pipeline import make_batch
from lemur_jax.data.store import RowStore, RowsWriter, token_dtype

T = 16


def write(directory, documents, sequence_length=T, vocab_size=1000):
    writer = StreamPacker(RowsWriter(directory, sequence_length, vocab_size))
    for number, ids in enumerate(documents):
        writer.append(f"dir/é{number}.py", ids)
    return writer.close(), RowStore(directory)


def reconstruct(store):
    """Documents of a store from its rows alone: segments joined over the overlapping token."""
    tokens, segments, _ = store.read(np.arange(store.rows))
    found = {}
    for row in range(store.rows):
        numbers = store.documents_of(row)
        assert len(numbers) == segments[row].max()
        for segment, number in enumerate(numbers, 1):
            part = tokens[row][segments[row] == segment].tolist()
            if number in found:
                assert segment == 1 and part[0] == found[number][-1]  # input only
                part = part[1:]
            found.setdefault(number, []).extend(part)
    return [found[number] for number in sorted(found)]


def documents_of(lengths):
    count = iter(range(1, 10**6))
    return [[next(count) % 997 for _ in range(length)] for length in lengths]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(2, 70), min_size=1, max_size=8), shard=st.integers(2, 9))
def test_documents_come_back_exactly(lengths, shard):
    """Red if `at -= 1` in `RowWriter.append` is dropped, or the last row is not written."""
    documents = documents_of(lengths)
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_writer, "BYTES_PER_SHARD", shard * (T + 1) * 2)  # rows in a shard
        counts, store = write(Path(directory) / "s", documents)
        assert reconstruct(store) == documents
        tokens, segments, _ = store.read(np.arange(store.rows))
        batch = make_batch(tokens, segments)
        # Every token of a document but its first is a weighted target, exactly once.
        targets = batch.targets[batch.weights == 1].tolist()
        assert targets == [token for ids in documents for token in ids[1:]]
        assert counts["tokens"] == sum(lengths) and counts["documents"] == len(lengths)
        # Full but for the last row.
        assert (segments[:-1] != 0).all()
        assert store.digest() == counts["digest"]
        assert [store.path(n) for n in range(len(lengths))] == [
            f"dir/é{n}.py" for n in range(len(lengths))
        ]


def test_long_document_goes_on_in_the_next_rows(tmp_path):
    """Red if a document is cut at the row's end: the trap of SeqIO's packing."""
    _, store = write(tmp_path / "s", [[7] * 3, list(range(100, 150)), [8] * 4])
    tokens, segments, _ = store.read([0, 1, 2, 3])
    assert tokens[0].tolist() == [7] * 3 + list(range(100, 114))
    assert tokens[1].tolist() == list(range(113, 130))  # begins with the last token of row 0
    assert segments[1].tolist() == [1] * (T + 1)
    assert tokens[3].tolist() == [145, 146, 147, 148, 149, *[8] * 4, *[0] * 8]
    assert segments[3].tolist() == [1] * 5 + [2] * 4 + [0] * 8
    assert [list(store.documents_of(row)) for row in range(4)] == [[0, 1], [1], [1], [1, 2]]


def test_a_document_that_ends_with_the_row_is_not_continued(tmp_path):
    """Red if the overlap is written whenever a row is full."""
    _, store = write(tmp_path / "s", [list(range(1, T + 2)), [5, 6]])
    tokens, segments, _ = store.read([1])
    assert tokens[0].tolist() == [5, 6] + [0] * (T - 1) and segments[0].max() == 1


def test_rows_of_a_batch(tmp_path):
    """Red if positions do not restart, or weights cross a document's border or count padding."""
    _, store = write(tmp_path / "s", [[1, 5, 2], [1, 6, 7, 2]], sequence_length=9)
    batch = make_batch(*store.read([0])[:2])
    assert batch.inputs[0].tolist() == [1, 5, 2, 1, 6, 7, 2, 0, 0]
    assert batch.targets[0].tolist() == [5, 2, 1, 6, 7, 2, 0, 0, 0]
    assert batch.weights[0].tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0]
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0]
    kinds = [array.dtype for array in batch]
    assert kinds == [np.int32, np.int32, np.float32, np.int32, np.int32]


def test_large_vocabularies_do_not_wrap(tmp_path):
    """Red if tokens are always uint16: id 65536 + 3 then reads as 3."""
    assert token_dtype(65536) == np.uint16 and token_dtype(65537) == np.uint32
    _, store = write(tmp_path / "s", [[1, 65539, 2]], vocab_size=128256)
    assert store.read([0])[0][0, 1] == 65539


def test_rows_outside_of_the_store(tmp_path):
    """Red if a negative row wraps around, as numpy's does."""
    _, store = write(tmp_path / "s", [[1, 2, 3]])
    for row in (-1, 1):
        with pytest.raises(IndexError, match=r"outside of \[0, 1\)"):
            store.read([row])


def test_missing_array_is_named(tmp_path):
    """Red if TensorStore's error gets through without the array's name and a fix."""
    write(tmp_path / "s", [[1, 2, 3]])
    (tmp_path / "s" / "segments" / "zarr.json").unlink()
    with pytest.raises(
        ConfigError, match=r"row store: part .*segments/zarr.json is missing.*build"
    ):
        RowStore(tmp_path / "s")


def test_random_reads_are_fast_enough(tmp_path):
    """Red if a row's chunk grows to the shard: 8 rows of 513 tokens must take under 2 ms."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 8192, 512).tolist() for _ in range(4000)]
    _, store = write(tmp_path / "s", documents, sequence_length=512, vocab_size=8192)
    seconds = []
    for rows in rng.integers(0, store.rows, (60, 8)):
        started = time.perf_counter()
        store.read(rows)
        seconds.append(time.perf_counter() - started)
    assert np.median(seconds) < 2e-3
