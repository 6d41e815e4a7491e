"""Digests: the same on any devices, different for any other array.

Each docstring ends with the one-line mutation that turns its test red.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from saved_arrays import (
    host_arrays,
    make_mesh,
    place,
)

from lemur_jax.checkpoint import digest


def test_digest_does_not_depend_on_devices():
    """8 devices = 1 device = numpy, every dtype. Red: `iota` of the shard instead of the array
    (or `shape[axis]` left out of the coordinates in `StreamingDigest.add`)."""
    arrays = host_arrays()
    want = {name: digest.digest_numpy(array) for name, array in arrays.items()}
    for mesh in (make_mesh(1, 1), make_mesh(4, 2), make_mesh(2, 4), make_mesh(1, 8)):
        assert digest.digest_arrays(place(arrays, mesh)) == want
    assert all(len(value) == 16 and int(value, 16) for value in want.values())


def test_digest_of_mixed_device_sets():
    """Arrays on several meshes and on one device in one call. Red: `_devices_of` returns one
    constant group."""
    arrays = host_arrays()
    placed = place(arrays, make_mesh(4, 2))
    placed["params/embed"] = place(arrays, make_mesh(2, 1))["params/embed"]
    placed["step"] = jnp.asarray(arrays["step"])
    want = {name: digest.digest_numpy(array) for name, array in arrays.items()}
    assert digest.digest_arrays(placed) == want


def test_digest_is_pinned():
    """The value is part of the disk format. Red: any change of a constant in digest.py."""
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert digest.digest_numpy(array) == "9e86e2c6991fea89"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_digest_notices(dtype):
    """Any flipped bit, swapped elements, rows, layers, transposes. Red: leave `where` out of
    `bits ^ where` (swaps pass), or `bits` out of it (flips pass)."""
    rng = np.random.default_rng(1)
    array = rng.integers(0, 256, (4, 4, 8 * jnp.dtype(dtype).itemsize), dtype=np.uint8)
    array = array.view(jnp.dtype(dtype))
    changed = []
    for _ in range(200):
        copy = array.copy()
        copy.view(np.uint8).reshape(-1)[rng.integers(copy.nbytes)] ^= 1 << rng.integers(8)
        changed.append(copy)
    for axis in range(3):
        changed.append(np.roll(array, 1, axis))
        changed.append(np.flip(array, axis))
        swapped = np.moveaxis(array.copy(), axis, 0)
        swapped[[0, 1]] = swapped[[1, 0]]
        changed.append(np.moveaxis(swapped, 0, axis))
    one = array.copy()
    one[0, 0, 0], one[3, 2, 1] = array[3, 2, 1], array[0, 0, 0]
    changed += [one, array.swapaxes(0, 1), np.zeros_like(array)]
    values = {digest.digest_numpy(array)} | {digest.digest_numpy(c) for c in changed}
    distinct = {array.tobytes()} | {c.tobytes() for c in changed}
    assert len(values) == len(distinct) > 150


def test_digest_streams_in_any_order(monkeypatch):
    """Blocks with offsets add up to the whole. Red: ignore `offset` in `add`, or drop the upper
    half where `add` cuts a large block."""
    array = np.random.default_rng(2).standard_normal((5, 7, 9)).astype(np.float32)
    whole = digest.digest_numpy(array)
    stream = digest.StreamingDigest()
    for layer in (3, 0, 4, 2, 1):
        for start in (6, 0, 3):
            stream.add(array[layer : layer + 1, :, start : start + 3], (layer, 0, start))
    assert stream.hexdigest() == whole
    monkeypatch.setattr(digest, "_BLOCK_ELEMENTS", 10)
    assert digest.digest_numpy(array) == whole
    with pytest.raises(ValueError, match="3 coordinates"):
        stream.add(array, (0,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_digest_of_large_blocks(dtype):
    """Compiled pieces, a numpy tail, rows too wide for it: as on a device. Red: `done += height`
    becomes `done = len(rows)`, or base[part] becomes base[: height]."""
    rng = np.random.default_rng(3)
    for shape in ((3, 1500, 1000), (2, 9, digest._WIDEST_ROW + 24)):
        nbytes = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        array = rng.integers(0, 256, nbytes, np.uint8).view(jnp.dtype(dtype)).reshape(shape)
        assert array.nbytes > digest._PIECE_BYTES
        device = digest.digest_arrays({"a": jnp.asarray(array)})["a"]
        assert digest.digest_numpy(array) == device
        stream = digest.StreamingDigest()
        for first, last in ((7, shape[1]), (0, 7)):
            stream.add(array[:, first:last], (0, first, 0))
        assert stream.hexdigest() == device


def test_digest_refuses_wide_types():
    """Red: add 8: np.uint64 to `_BITS` (its upper half would be ignored)."""
    with pytest.raises(TypeError, match="float64 has no digest"):
        digest.digest_numpy(np.zeros(3))
