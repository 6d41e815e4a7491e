"""Blocks in memory: turned into C order, cast, digested."""

import dataclasses
from collections.abc import Callable

import numpy as np

from lemur_jax.convert.cast import cast

_PIECE = 1 << 20  # elements whose error is taken at a time


@dataclasses.dataclass
class CastError:
    """The worst of what a cast did to a leaf.

    Attributes:
      absolute: largest |new - old|.
      relative: largest |new - old| / |old|, where old is not 0.
      changed: elements that are not what they were.
      not_finite: elements that were NaN or infinite, and are.
    """

    absolute: float = 0.0
    relative: float = 0.0
    changed: int = 0
    not_finite: int = 0

    def add(self, other: "CastError") -> None:
        """Takes in another part of the leaf."""
        self.absolute = max(self.absolute, other.absolute)
        self.relative = max(self.relative, other.relative)
        self.changed += other.changed
        self.not_finite += other.not_finite


def cast_block(
    array: np.ndarray, dtype: np.dtype, name: Callable[[tuple[int, ...]], str]
) -> tuple[np.ndarray, CastError]:
    """`array` (C order) in another dtype, and the error of that; `name` as for `cast`.

    Raises:
      ConversionError: a finite value does not fit.
    """
    result, error = cast(array, dtype, name), CastError()
    if result is array:
        return result, error
    old, new = array.reshape(-1), result.reshape(-1)
    for first in range(0, old.size, _PIECE):
        before = old[first : first + _PIECE].astype(np.float64)
        after = new[first : first + _PIECE].astype(np.float64)
        finite = np.isfinite(before)
        lost = np.abs(np.subtract(after, before, where=finite, out=np.zeros_like(before)))
        scale = np.abs(before)
        relative = np.divide(lost, scale, out=np.zeros_like(lost), where=finite & (scale > 0))
        odd = finite.size - int(np.count_nonzero(finite))
        error.add(
            CastError(float(lost.max()), float(relative.max()), int(np.count_nonzero(lost)), odd)
        )
    return result, error


def without_padding(array: np.ndarray, axis: int | None, first: int, rows: int) -> np.ndarray:
    """The same with zeros in the vocabulary's padding; itself if it reaches none.

    Args:
      array: a block.
      axis: of the vocabulary; None: the leaf has none.
      first: row of the whole leaf at which the block begins.
      rows: of the vocabulary that exist.
    """
    if axis is None or first + array.shape[axis] <= rows:
        return array
    array = array.copy()
    array[(slice(None),) * axis + (slice(max(0, rows - first), None),)] = 0
    return array


VOCABULARY_AXIS = {"table": 0, "head": 1}


def vocabulary_axis(name: str) -> int | None:
    """Of a leaf of ours; None if it has no vocabulary."""
    return VOCABULARY_AXIS.get(name)
