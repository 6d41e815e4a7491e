"""Kernels' own numbers have 32 bits, whatever jax_enable_x64 says of the caller's."""

import functools
from collections.abc import Callable

import jax


def without_x64(function: Callable) -> Callable:
    """The function, traced as if jax_enable_x64 were off: Python's ints in index maps and loop
    bounds would otherwise become int64, which Pallas cannot mix with its int32 grid."""

    @functools.wraps(function)
    def narrow(*args, **kwargs):
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return narrow
