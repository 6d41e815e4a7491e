"""Changing the dtype of weights, which is lossy and so only done when asked for."""

from collections.abc import Callable

import numpy as np

from lemur_jax.config import DTYPES
from lemur_jax.convert.errors import ConversionError


def check_dtype(dtype: str | None) -> None:
    """Raises ConversionError unless `dtype` is None or one that the model computes with."""
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError([f"dtype={dtype!r} is unknown; legal: {', '.join(DTYPES)}"])


def cast(
    array: np.ndarray, dtype: np.dtype, name: str | Callable[[tuple[int, ...]], str]
) -> np.ndarray:
    """`array` in another dtype, rounded to nearest even; the same array if it has it already.

    Args:
      array: values.
      dtype: the other one.
      name: of the tensor; or says it of the index of an element.

    Raises:
      ConversionError: a finite value does not fit (float16 ends at 65504).
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(result)
    if lost.any():
        worst = float(np.abs(array[lost].astype(np.float64)).max())
        if not isinstance(name, str):
            name = name(tuple(int(i) for i in np.argwhere(lost)[0]))
        raise ConversionError(
            [
                f"{name!r} holds {worst:g}, which does not fit in {dtype.name}: give "
                "--dtype=bfloat16 or float32"
            ]
        )
    return result
