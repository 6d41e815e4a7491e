"""Digests of arrays: 16 hex digits that do not depend on the sharding or number of devices.

Each element's bits are mixed with a hash of its coordinates, and the results are summed modulo
2^32; two such sums with different constants make the digest. A sum is what makes it indifferent
to sharding and cheap on a device (one fused pass, four bytes of result for each shard); the
coordinates are what make it notice swapped elements, rows and layers; and because the mix is a
bijection of the bits, one changed element always changes both sums.
It guards against accidents (bad disks, bad memory, wrong code), not against an adversary.

    coordinate hash  c(i0, i1, ...) = seed + sum_d mix(i_d + (d + 1) * SPREAD)       mod 2^32
    digest sum       s = sum over elements of mix(bits ^ c)                          mod 2^32

Elements are 1, 2 or 4 bytes wide (bool, int8 ... float32); wider ones are refused.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.checkpoint.host import host_device

_SPREAD = 0x9E3779B1  # 2^32 / golden ratio, odd: keeps the hashes of different axes apart
# Shifts and odd multipliers of two well-tested 32-bit finalizers: murmur3's and lowbias32.
_MIXES = (
    (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16),
    (16, 0x7FEB352D, 15, 0x846CA68B, 16),
)
_SEEDS = (0x243F6A88, 0xB7E15162)  # digits of pi and e: nothing up the sleeve
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_BLOCK_ELEMENTS = 1 << 15  # numpy works through blocks of 128 KiB, which stay in a core's cache
_PIECE_BYTES = 4 << 20  # of a large block: what one call of a compiled function goes through
_WIDEST_ROW = 1 << 18  # elements; the sums of a row's columns stay in a core's cache


def _uint_type(dtype: np.dtype) -> type[np.unsignedinteger]:
    try:
        return _BITS[np.dtype(dtype).itemsize]
    except KeyError:
        raise TypeError(
            f"dtype {np.dtype(dtype).name} has no digest: elements must be 1, 2 or 4 bytes wide; "
            "convert the array to a 32-bit type first"
        ) from None


def _mix(x, constants):
    """A bijection of uint32 that spreads every input bit over the word; numpy and jax alike."""
    shift_a, times_a, shift_b, times_b, shift_c = constants
    x = (x ^ (x >> np.uint32(shift_a))) * np.uint32(times_a)
    x = (x ^ (x >> np.uint32(shift_b))) * np.uint32(times_b)
    return x ^ (x >> np.uint32(shift_c))


# ---------------------------------------------------------------------------------------------
# On devices
# ---------------------------------------------------------------------------------------------


def _device_sums(array: jax.Array) -> jax.Array:
    """The two sums of one array of any shape and sharding; uint32 [2]."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, _uint_type(array.dtype)).astype(jnp.uint32)
    sums = []
    for constants, seed in zip(_MIXES, _SEEDS):
        where = jnp.full((1,) * bits.ndim, seed, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            shape = tuple(size if d == axis else 1 for d in range(bits.ndim))
            coordinate = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            spread = np.uint32((axis + 1) * _SPREAD & 0xFFFFFFFF)
            where = where + _mix(coordinate + spread, constants)
        sums.append(jnp.sum(_mix(bits ^ where, constants), dtype=jnp.uint32))
    return jnp.stack(sums)


@functools.cache
def _sums_on(devices: tuple[jax.Device, ...]):
    """The jitted function of all arrays that lie on these devices; jit caches by their shapes."""
    mesh = jax.sharding.Mesh(np.array(devices), ("all",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def sums(arrays: Sequence[jax.Array]) -> jax.Array:
        return jnp.stack([_device_sums(array) for array in arrays])

    return jax.jit(sums, out_shardings=replicated)


def _devices_of(array: jax.Array) -> tuple[jax.Device, ...]:
    """Devices in the order in which jit sees them: arrays of one jitted call must agree in it."""
    mesh = getattr(array.sharding, "mesh", None)
    if mesh is not None:
        return tuple(mesh.devices.flat)
    return tuple(sorted(array.sharding.device_set, key=lambda device: device.id))


def dispatch(arrays: Mapping[str, jax.Array]) -> list[tuple[list[str], jax.Array]]:
    """Starts the digests of `arrays` on their devices and returns without waiting.

    One jitted call serves all arrays of one set of devices. The arrays may be donated or deleted
    as soon as this returns. Under jax.distributed every process must make the same call.

    Returns:
      What `collect` turns into digests.

    Raises:
      TypeError: an element type is wider than four bytes.
    """
    groups: dict[tuple[jax.Device, ...], list[str]] = {}
    for name in sorted(arrays):  # the same order in every process
        _uint_type(arrays[name].dtype)
        groups.setdefault(_devices_of(arrays[name]), []).append(name)
    return [
        (names, _sums_on(devices)([arrays[name] for name in names]))
        for devices, names in groups.items()
    ]


def collect(pending: list[tuple[list[str], jax.Array]]) -> dict[str, str]:
    """Waits for `dispatch` and returns {name: digest}."""
    digests = {}
    for names, sums in pending:
        for name, (first, second) in zip(names, np.asarray(sums)):
            digests[name] = f"{first:08x}{second:08x}"
    return digests


def digest_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """{name: digest} of device arrays, whatever their sharding; see `dispatch`."""
    return collect(dispatch(arrays))


# ---------------------------------------------------------------------------------------------
# On the host
# ---------------------------------------------------------------------------------------------


class StreamingDigest:
    """The digest of an array that is seen one block at a time, in any order, each element once."""

    def __init__(self):
        self._sums = [0, 0]

    def add(self, block: np.ndarray, offset: Sequence[int]) -> None:
        """Adds `block`, whose first element has coordinates `offset` in the whole array.

        Raises:
          TypeError: elements are wider than four bytes.
          ValueError: `offset` has not one coordinate for each axis.
        """
        if len(offset) != block.ndim:
            raise ValueError(f"offset {tuple(offset)} must have {block.ndim} coordinates")
        if not block.size:
            return
        kind = _uint_type(block.dtype)
        # Rows of the last axis: what its coordinates add to the hash is the same for every row.
        last = block.shape[-1] if block.ndim else 1
        rows = np.ascontiguousarray(block).reshape(-1, last).view(kind)
        outer = block.shape[:-1]
        bases, inners = [], []
        for constants, seed in zip(_MIXES, _SEEDS):
            base = np.full(outer, seed, np.uint32).reshape(-1)
            for axis, (size, start) in enumerate(zip(outer, offset)):
                along = tuple(size if d == axis else 1 for d in range(len(outer)))
                hashes = _axis_hashes(axis, start, size, constants).reshape(along)
                base += np.broadcast_to(hashes, outer).reshape(-1)
            inner = np.zeros(1, np.uint32)
            if block.ndim:
                inner = _axis_hashes(block.ndim - 1, offset[-1], last, constants)
            bases.append(base)
            inners.append(inner)
        self.add_sums(_sums_of_rows(rows, bases, inners))

    @property
    def sums(self) -> tuple[int, int]:
        """The state: sums of parts, added by `add_sums`, make the digest of the whole."""
        return self._sums[0], self._sums[1]

    def add_sums(self, sums: Sequence[int]) -> None:
        """Adds what another digest has seen of other elements of the same array."""
        self._sums = [(a + b) & 0xFFFFFFFF for a, b in zip(self._sums, sums, strict=True)]

    def hexdigest(self) -> str:
        """16 hex digits, equal to `digest_arrays` of the whole array."""
        return f"{self._sums[0]:08x}{self._sums[1]:08x}"


def digest_numpy(array: np.ndarray) -> str:
    """The digest of a host array of any shape; equal to `digest_arrays` of the same array."""
    digest = StreamingDigest()
    digest.add(array, (0,) * array.ndim)
    return digest.hexdigest()


def _axis_hashes(axis: int, start: int, size: int, constants) -> np.ndarray:
    coordinate = np.arange(start, start + size, dtype=np.uint64).astype(np.uint32)
    return _mix(coordinate + np.uint32((axis + 1) * _SPREAD & 0xFFFFFFFF), constants)


def _sums_of_rows(
    rows: np.ndarray, bases: Sequence[np.ndarray], inners: Sequence[np.ndarray]
) -> list[int]:
    """For each mix the sum over rows [R,N] of mix(bits ^ (base [R] + inner [N])).

    Large blocks go through a compiled function: twice as fast as numpy on one core, and threads
    do not wait for each other's GIL (eight of them with numpy: a quarter of the speed of one).
    """
    done, sums = 0, np.zeros(len(_MIXES), np.uint32)
    height = _PIECE_BYTES // (rows.shape[1] * rows.itemsize)
    host = host_device()
    if len(rows) >= height > 0 and rows.shape[1] <= _WIDEST_ROW and host is not None:
        with jax.default_device(host):
            while done + height <= len(rows):
                part = slice(done, done + height)
                sums += np.asarray(
                    _piece_sums(rows[part], [base[part] for base in bases], list(inners))
                )
                done += height
    return [
        (int(total) + _sum_of_rows(rows[done:], base[done:], inner, constants)) & 0xFFFFFFFF
        for total, base, inner, constants in zip(sums, bases, inners, _MIXES)
    ]


@jax.jit
def _piece_sums(
    rows: jax.Array, bases: Sequence[jax.Array], inners: Sequence[jax.Array]
) -> jax.Array:
    """As _sums_of_rows; uint32 [2]. Row by row into sums of columns, which XLA makes vector code
    of; of a sum over everything it does not."""

    def add_row(columns, row):
        bits, *base = row
        bits = bits.astype(jnp.uint32)
        return [
            column + _mix(bits ^ (b + inner), constants)
            for column, b, inner, constants in zip(columns, base, inners, _MIXES)
        ], None

    zeros = [jnp.zeros(rows.shape[1], jnp.uint32) for _ in _MIXES]
    columns, _ = jax.lax.scan(add_row, zeros, (rows, *bases))
    return jnp.stack([jnp.sum(column, dtype=jnp.uint32) for column in columns])


def _sum_of_rows(rows: np.ndarray, base: np.ndarray, inner: np.ndarray, constants) -> int:
    """Sum over rows [R,N] of mix(bits ^ (base [R] + inner [N])), in pieces that stay in cache."""
    shift_a, times_a, shift_b, times_b, shift_c = (np.uint32(c) for c in constants)
    width = min(rows.shape[1], _BLOCK_ELEMENTS)
    height = max(1, _BLOCK_ELEMENTS // width)
    mixed, scratch = (np.empty((height, width), np.uint32) for _ in range(2))
    total = 0
    for top in range(0, rows.shape[0], height):
        for left in range(0, rows.shape[1], width):
            bits = rows[top : top + height, left : left + width]
            x, t = (
                mixed[: bits.shape[0], : bits.shape[1]],
                scratch[: bits.shape[0], : bits.shape[1]],
            )
            np.add(base[top : top + height, None], inner[None, left : left + width], out=x)
            np.bitwise_xor(x, bits, out=x)
            np.right_shift(x, shift_a, out=t)
            np.bitwise_xor(x, t, out=x)
            np.multiply(x, times_a, out=x)
            np.right_shift(x, shift_b, out=t)
            np.bitwise_xor(x, t, out=x)
            np.multiply(x, times_b, out=x)
            np.right_shift(x, shift_c, out=t)
            np.bitwise_xor(x, t, out=x)
            total += int(np.add.reduce(x, axis=None, dtype=np.uint32))
    return total & 0xFFFFFFFF
