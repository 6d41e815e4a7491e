"""`lemur convert verify A B`: whether two models of any two formats are the same, bit for bit."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert import grain
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.hf_config import COMPUTATION
from lemur_jax.convert.model import Source, check_max_positions, open_source
from lemur_jax.convert.plan import COPIES, Part, block_shapes
from lemur_jax.convert.progress import progress
from lemur_jax.convert.stored import Region, Shape, contiguous
from lemur_jax.convert.turn import vocabulary_axis

_SHOWN = 12  # differing tensors that are named


@dataclasses.dataclass
class Difference:
    """Where one leaf differs.

    Attributes:
      name: ours.
      count: elements that differ.
      index: of the first of them in the leaf.
      values: there, in A and in B.
      where: the tensor and file of it, in A and in B.
      largest: largest absolute difference.
    """

    name: str
    count: int
    index: tuple[int, ...]
    values: tuple[float, float]
    where: tuple[str, str]
    largest: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.count} values differ, by at most {self.largest:.3g}; first at "
            f"{list(self.index)}: {self.values[0]!r} ({self.where[0]}) and {self.values[1]!r} "
            f"({self.where[1]})"
        )


def verify(
    a_path: str | Path,
    b_path: str | Path,
    *,
    dtype: str | None = None,
    max_ram: int = 4 << 30,
    max_positions: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Difference]:
    """Compares all weights, streaming. Padding rows of the vocabulary do not count.

    Args:
      a_path, b_path: of `model.open_source`.
      dtype: compare after a cast to this; None: as stored, in float32 where the dtypes differ.
      max_ram: bytes of resident memory that the process may reach.
      max_positions: of Meta's format.
      say: takes the outcome, line by line.

    Returns:
      The leaves that differ, none if the models are the same.

    Raises:
      ConversionError: the configs are of different models (names the fields), or one of the two
        cannot be read.
      CheckpointError: a checkpoint of ours is incomplete.
    """
    a, b = (open_source(p, dtype=dtype, max_positions=max_positions) for p in (a_path, b_path))
    check_max_positions(max_positions, a, b)
    _check_configs(a, b)
    widths = {name: max(a.dtype(name).itemsize, b.dtype(name).itemsize) for name in a.names}
    blocks = block_shapes(
        [
            Part(name, _shape(a, name), widths[name], a.grain(name), b.grain(name))
            for name in a.names
        ],
        max_ram,
        2 * COPIES,
    )
    found, total = [], 0
    in_all = sum(math.prod(_shape(a, name)) * a.dtype(name).itemsize for name in a.names)
    with progress(f"{a.path} = {b.path}?", in_all) as advance:
        for name in a.names:
            difference = _compare(a, b, name, blocks[name])
            nbytes = math.prod(_shape(a, name)) * a.dtype(name).itemsize
            total += nbytes
            advance(name, nbytes)
            if difference is not None:
                found.append(difference)
    for difference in found[:_SHOWN]:
        say(str(difference))
    if len(found) > _SHOWN:
        say(f"and {len(found) - _SHOWN} more leaves")
    if not found:
        say(f"equal: {len(a.names)} leaves, {total} bytes, every bit{_how(a, b, dtype)}")
    return found


def _how(a: Source, b: Source, dtype: str | None) -> str:
    if dtype is not None:
        return f" in {dtype}"
    differ = [name for name in a.names if a.dtype(name) != b.dtype(name)]
    return f" (in float32: {len(differ)} leaves have other dtypes)" if differ else ""


def _check_configs(a: Source, b: Source) -> None:
    free = (*COMPUTATION, "initializer_range")
    problems = [
        f"ModelConfig.{field.name} is {getattr(a.config, field.name)!r} in {a.path} and "
        f"{getattr(b.config, field.name)!r} in {b.path}: they are different models"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in free and getattr(a.config, field.name) != getattr(b.config, field.name)
    ]
    if problems:
        raise ConversionError(problems)


def _shape(source: Source, name: str) -> tuple[int, ...]:
    """Without the padding of the vocabulary, which each may have chosen for itself."""
    axis, shape = vocabulary_axis(name), list(source.shape(name))
    if axis is not None:
        shape[axis] = source.config.vocab_size
    return tuple(shape)


def _compare(a: Source, b: Source, name: str, block: Shape) -> Difference | None:
    found: Difference | None = None
    for region in grain.regions(_shape(a, name), block):
        found = _block(a, b, name, region, found)
    return found


def _block(
    a: Source, b: Source, name: str, region: Region, found: Difference | None
) -> Difference | None:
    one, other = (contiguous(source.read(name, region)) for source in (a, b))
    if one.dtype != other.dtype:
        one, other = one.astype(np.float32), other.astype(np.float32)
    bits = np.dtype(f"u{one.dtype.itemsize}")
    unequal = one.view(bits) != other.view(bits)
    count = int(np.count_nonzero(unequal))
    if not count:
        return found
    with np.errstate(invalid="ignore"):
        lost = np.abs(one[unequal].astype(np.float64) - other[unequal].astype(np.float64))
    largest = float(np.nanmax(lost)) if not np.isnan(lost).all() else math.nan
    if found is not None:
        found.count += count
        found.largest = max(found.largest, largest)
        return found
    at = np.unravel_index(int(np.argmax(unequal)), unequal.shape)
    index = tuple(int(part.start + i) for part, i in zip(region, at))
    values = (float(one[at]), float(other[at]))
    return Difference(
        name, count, index, values, (a.where(name, index), b.where(name, index)), largest
    )
