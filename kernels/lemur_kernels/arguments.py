"""Checks that the public functions share; every error names the field, its value and the fix."""

import math
import numbers

import jax.numpy as jnp
import numpy as np


def number(name: str, value, *, least: float = -math.inf, above: float = -math.inf, fix: str = ""):
    """A real number that is finite in float32, as a float; not a bool, an array or a tracer.

    Raises:
      ValueError: it is something else, or smaller than `least`, or not larger than `above`.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    with np.errstate(over="ignore"):
        as_float32 = float(np.float32(value)) if real else math.nan
    if not math.isfinite(as_float32) or as_float32 < least or as_float32 <= above:
        bound = "from 0 on" if least == 0 else "above 0" if above == 0 else ""
        legal = " ".join(filter(None, ("a finite number", bound, fix)))
        if real and as_float32 != value and math.isfinite(value):
            legal += f"; in float32 it is {as_float32}"
        raise ValueError(f"{name}={value!r} must be {legal}")
    return float(value)


def integer(name: str, value, least: int, most: int = 2**31 - 1, fix: str = "") -> int:
    """An integer in least..most as an int; numpy's too, not a bool, not an array, not a tracer.

    Raises:
      ValueError: it is something else, or out of range.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        if most == 2**31 - 1 and not (whole and value > most):
            legal = f"an integer from {least} on"
        else:
            legal = f"in {least}..{most}"
        raise ValueError(" ".join(filter(None, (f"{name}={value!r} must be {legal}", fix))))
    return int(value)


def array(name: str, value, axes: str, dtypes: tuple[str, ...]) -> None:
    """Checks an array's rank, that it is not empty, and its dtype.

    Args:
      axes: a letter for each axis, as "BTHD".

    Raises:
      ValueError: no array, another rank, an axis of length 0, or another dtype.
    """
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ValueError(f"{name} is {value!r:.80}; pass an array [{','.join(axes)}]")
    if len(value.shape) != len(axes):
        raise ValueError(f"{name} has shape {list(value.shape)}; pass [{','.join(axes)}]")
    for axis, size in zip(axes, value.shape):
        if size == 0:
            raise ValueError(f"{name} {list(value.shape)} is empty: {axis}=0 must be at least 1")
    if jnp.dtype(value.dtype).name not in dtypes:
        raise ValueError(f"{name} is {value.dtype}; pass {' or '.join(dtypes)}")


def integers(name: str, value, shape: tuple[int, ...], dtype: str | None = None) -> None:
    """Checks an array of integers, of one dtype when given.

    Raises:
      ValueError: no array, another shape or another dtype.
    """
    wanted = f"pass {dtype or 'integers'} {list(shape)}"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ValueError(f"{name} is {value!r:.80}; {wanted}")
    right = jnp.issubdtype(value.dtype, jnp.integer) if dtype is None else value.dtype == dtype
    if tuple(value.shape) != shape or not right:
        raise ValueError(f"{name} is {value.dtype}{list(value.shape)}; {wanted}")
