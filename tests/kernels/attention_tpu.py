"""The TPU attention kernels as the tests run them on a CPU: interpreted, in one jitted program.

Interpreted kernels take any block size: small blocks make a short row many blocks.
"""

import functools
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from attention_float64 import float64, packed_rows, qkv
from lemur_kernels.attention import pallas_tpu, tpu_forward
from lemur_kernels.attention.mask import Options, Rows
from lemur_kernels.attention.tilings import Tiling


class Ran(NamedTuple):
    out: np.ndarray  # BTHD
    lse: np.ndarray  # BHT
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    repeated: np.ndarray  # query blocks, through all rows, that ran again with a running maximum
    repeated_steps: int


def tiling(block=32, **kw) -> Tiling:
    """Strips, trapezoids and squares of unequal sizes, so that none can stand for another."""
    sizes = {
        "heads": 2, "unroll": 1, "square_unroll": 1, "strip": block, "trapezoid": block // 2,
        "square": block // 2, "depth": 1, "diagonal_depth": 2,
    }  # fmt: skip
    return Tiling(block=block, **sizes | kw)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _program(options, tiling, interpret, q, k, v, dout, rows):
    repeats = []
    forward = tpu_forward.forward

    def recorded(*args, steps, earlier=None, **kw):
        if earlier is not None:
            repeats.append(steps)
        return forward(*args, steps=steps, earlier=earlier, **kw)

    with mock.patch.object(tpu_forward, "forward", recorded):
        out, lse = pallas_tpu.forward(q, k, v, rows, options, tiling=tiling, interpret=interpret)
    gradient = pallas_tpu.backward(
        q, k, v, rows, options, out, lse, dout, tiling=tiling, interpret=interpret
    )
    assert len(repeats) == options.packed
    return (out, lse, *gradient), repeats


def run(options: Options, tiling: Tiling, inputs, rows: Rows, interpret=True) -> Ran:
    """Forward and backward; `inputs` are q, k, v, dout."""
    results, repeats = _program(options, tiling, interpret, *inputs, rows)
    places, steps = np.zeros(0, int), 0
    for r in repeats:
        steps = int(r.count)
        places = np.unique(np.asarray(r.places_E)[:steps] >> 16)
    return Ran(*map(np.asarray, results), places, steps)


def packed(*lengths_of_rows, T) -> Rows:
    positions, segments = packed_rows(*lengths_of_rows, T=T)
    return Rows(positions, positions, segments, segments)


def expected(options: Options, inputs, rows):
    inputs = [np.asarray(x, np.float64) for x in inputs]
    return float64(
        *inputs, rows, scale=options.scale, window=options.window, soft_cap=options.soft_cap
    )


def check(options, tiling, inputs, rows, limits, interpret=True) -> Ran:
    """Runs, compares all five results with float64 (`limits`: rtol, atol), returns them."""
    got = run(options, tiling, inputs, rows, interpret)
    want = expected(options, inputs, rows)
    for name, a, b in zip(want._fields, got, want):
        a = a.astype(np.float64)
        assert not np.isnan(a).any(), name
        # atol is in units of the largest number of a result, or of 1; rtol of each
        size = np.abs(b[np.isfinite(b)]).max(initial=0)
        np.testing.assert_allclose(
            a, b, rtol=limits["rtol"], atol=limits["atol"] * max(size, 1), err_msg=name
        )
    hidden = np.isinf(want.lse)
    assert (got.lse[hidden] == np.inf).all()
    hidden_BTH = hidden.swapaxes(1, 2)
    assert not got.out[hidden_BTH].any() and not got.dq[hidden_BTH].any()
    return got


__all__ = ["check", "expected", "packed", "qkv", "run", "tiling"]
