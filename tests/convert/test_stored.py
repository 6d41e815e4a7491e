"""Arrays on their way to and from a file: turned, written at any place, read in part."""

import os

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lemur_jax.convert.disk import PAGE, DiskFile, aligned_empty
from lemur_jax.convert.stored import StoredTensor, contiguous


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_any_turn_is_numpys(data):
    """Red when `contiguous` puts a piece at another place than the one it was cut from."""
    shape = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from(["u1", "u2", "u4", "bfloat16"]))
    order = data.draw(st.permutations(range(len(shape))))
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype).transpose(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lemur_jax.convert.stored._PIECE_BYTES", data.draw(st.integers(1, 200)))
        turned = contiguous(array)
    assert turned.flags.c_contiguous and np.array_equal(turned, array)


def test_writes_at_any_offset(tmp_path):
    """Red when the pages at the ends of a direct write are left out."""
    rng = np.random.default_rng(0)
    size = 9 << 20
    expected = np.zeros(size, np.uint8)
    file = DiskFile(tmp_path / "x")
    for _ in range(12):
        start, stop = np.sort(rng.integers(0, size, 2))
        raw = aligned_empty((stop - start + 2 * PAGE,), np.dtype(np.uint8))
        shift = start % PAGE if rng.integers(2) else rng.integers(PAGE)
        part = raw[shift : shift + stop - start]
        part[:] = rng.integers(0, 256, part.size, np.uint8)
        file.write(memoryview(part), int(start))
        expected[start:stop] = part
    file.sync()
    file.close()
    raw = (tmp_path / "x").read_bytes()
    assert raw == expected.tobytes()[: len(raw)] and not expected[len(raw) :].any()


def test_files_on_a_system_without_linux_calls(tmp_path, monkeypatch):
    """Red when O_DIRECT, fdatasync or flags of preadv are taken for granted: macOS has none."""
    read = os.preadv

    def without_flags(descriptor, buffers, offset, flags=0):
        if flags:
            raise NotImplementedError("preadv2: flags unavailable on this platform")
        return read(descriptor, buffers, offset)

    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.setattr(os, "preadv", without_flags)
    array = aligned_empty((3 << 20,), np.dtype(np.uint8))
    array[:] = np.random.default_rng(0).integers(0, 256, array.size, np.uint8)
    file = DiskFile(tmp_path / "x")
    file.write(memoryview(array), 0)
    file.sync()
    file.close()
    stored = StoredTensor(tmp_path / "x", "x", array.shape, array.dtype, ((0, array.nbytes),))
    assert np.array_equal(stored.read(), array)


def test_columns_of_a_stored_tensor(tmp_path):
    """Red when `_read_columns` forgets the first row of a band."""
    array = np.random.default_rng(0).normal(size=(300, 70)).astype(np.float32)
    (tmp_path / "x").write_bytes(b"12345678" + array.tobytes())
    tensor = StoredTensor(tmp_path / "x", "x", array.shape, array.dtype, ((8, array.nbytes),))
    with pytest.MonkeyPatch.context() as patch:
        for band in (1000, 10**6):
            patch.setattr("lemur_jax.convert.stored._BAND_BYTES", band)
            for rows, columns in ((slice(3, 290), slice(5, 66)), (slice(0, 300), slice(0, 1))):
                assert np.array_equal(tensor.read((rows, columns)), array[rows, columns])
