"""Which parts of a leaf are read and written as one: where it may be cut, and where it is cheap.

For each axis of ours a Grain says at multiples of what number an edge may lie; 0: nowhere, the
axis stays whole.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from lemur_jax.convert.rules import Rule
from lemur_jax.convert.stored import Region, Shape

CHUNK_BYTES = 32 << 20  # as checkpoint.items: the unit of reading of a checkpoint
ALONE_BYTES = 256 << 10  # a layer of at least so much has chunks of its own


@dataclasses.dataclass(frozen=True)
class Grain:
    """Multiples at which a leaf is cut: `cheap` without detours, `must` at all."""

    cheap: Shape
    must: Shape


def of_rule(rule: Rule) -> Grain:
    """Of a leaf in files with one tensor for each layer: along their rows is cheap."""
    may, rows = rule.may_cut(), rule.rows_axis()
    cheap = tuple(1 if axis == rows else 0 for axis in range(len(may)))
    must = tuple(1 if cut else 0 for cut in may)
    return Grain((1, *cheap), (1, *must)) if rule.stacked else Grain(cheap, must)


def of_chunks(shape: Shape, chunks: Shape, *, written: bool) -> Grain:
    """Of a leaf in chunks: whole ones are cheap; written ones must be whole."""
    cheap = tuple(0 if chunk >= size else chunk for size, chunk in zip(shape, chunks))
    return Grain(cheap, cheap if written else (1,) * len(shape))


def block_shape(shape: Shape, itemsize: int, a: Grain, b: Grain, usual: int, most: int) -> Shape:
    """The largest block that is cheap for both sides and has at most `usual` bytes.

    Where no cheap block has that, the smallest cheap one is taken if it has at most `most` bytes,
    and else one that is merely possible; the caller looks whether it fits.
    """
    cheap = _both(shape, a.cheap, b.cheap)
    block = _cut(shape, shape, itemsize, cheap, usual)
    if math.prod(block) * itemsize > most:
        block = _cut(shape, block, itemsize, _both(shape, a.must, b.must), most)
    return block


def _both(shape: Shape, a: Shape, b: Shape) -> Shape:
    """Multiples that suit both; 0 where the axis stays whole."""
    found = []
    for size, one, other in zip(shape, a, b):
        common = math.lcm(one, other) if one and other else 0
        found.append(0 if common >= size else common)
    return tuple(found)


def _cut(shape: Shape, start: Shape, itemsize: int, grain: Shape, limit: int) -> Shape:
    block = list(start)
    for axis in range(len(shape)):
        total = math.prod(block) * itemsize
        if total <= limit or not grain[axis]:
            continue
        fitting = limit * block[axis] // total // grain[axis] * grain[axis]
        block[axis] = min(block[axis], max(grain[axis], fitting))
    return tuple(block)


def regions(shape: Shape, block: Shape) -> Iterator[Region]:
    """All blocks of an array, in order."""
    counts = [-(-size // part) for size, part in zip(shape, block)]
    for index in np.ndindex(*counts):
        yield tuple(
            slice(i * part, min((i + 1) * part, size)) for i, part, size in zip(index, block, shape)
        )


def chunk_shape(shape: Shape, itemsize: int, stacked: bool, like: Shape) -> Shape:
    """Chunks of at most CHUNK_BYTES for a leaf that goes to a checkpoint.

    One layer each, unless layers are tiny. A layer that is too large is cut along the axes where
    the source is cut cheaply, so that no byte of it is read twice.

    Args:
      shape: of the leaf.
      itemsize: bytes of an element as it is written.
      stacked: whether the leading axis is the layers.
      like: the source's cheap grain.
    """
    chunk = list(shape)
    if stacked:
        if math.prod(shape[1:]) * itemsize < ALONE_BYTES:
            return tuple(chunk)
        chunk[0] = 1
    order = [axis for axis in range(stacked, len(shape)) if like[axis]]
    order += [axis for axis in range(stacked, len(shape)) if axis not in order]
    return halved(tuple(chunk), itemsize, order)


def halved(chunk: Shape, itemsize: int, order: list[int]) -> Shape:
    """`chunk` cut into equal parts along the axes of `order` until it has CHUNK_BYTES at most."""
    parts = list(chunk)
    for axis in order:
        total = math.prod(parts) * itemsize
        if total <= CHUNK_BYTES:
            break
        least = -(-total // CHUNK_BYTES)
        divisors = [n for n in range(least, 2 * least) if parts[axis] % n == 0]
        count = min(divisors[0] if divisors else least, parts[axis])
        parts[axis] = -(-parts[axis] // count)
    return tuple(parts)
