"""The TPU attention kernels under the TPU interpreter: two cores, race detector, memory that is
uninitialised until written, reads out of bounds refused. Every pallas_call is looked at."""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_float64 import qkv
from attention_tpu import check, packed, tiling
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from lemur_kernels.attention.mask import Options, Rows

TWO_CORES = pltpu.InterpretParams(
    detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan",
    out_of_bounds_reads="raise",
)  # fmt: skip
F32 = {"rtol": 2e-5, "atol": 5e-6}


@contextlib.contextmanager
def race_detectors():
    """The detector's state of every kernel run inside, in order; jax keeps only the last."""
    made, original = [], interpret_pallas_call.RaceDetectionState

    def recorded(*args, **kw):
        made.append(original(*args, **kw))
        return made[-1]

    with mock.patch.object(interpret_pallas_call, "RaceDetectionState", recorded):
        yield made


@pytest.mark.parametrize("cores_share", [True, False])
def test_the_detector_sees_a_race(cores_share):
    """Red when: the detector is off, or its states are not the ones looked at."""

    def kernel(out_ref):
        out_ref[...] = jnp.ones_like(out_ref)

    with race_detectors() as found:
        jax.block_until_ready(
            pl.pallas_call(
                kernel,
                grid=(2,),
                out_specs=pl.BlockSpec((8, 128), lambda i: (0 if cores_share else i, 0)),
                out_shape=jax.ShapeDtypeStruct((16, 128), jnp.float32),
                compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
                interpret=TWO_CORES,
            )()
        )
    assert [state.races_found for state in found] == [cores_share]


def any_order(seed, T, S) -> Rows:
    rng = np.random.default_rng(seed)
    draw = [rng.integers(0, n, (1, L)) for n, L in ((60, T), (60, S), (3, T), (3, S))]
    return Rows(*(jnp.asarray(x, jnp.int32) for x in draw))


SMALL = {"strip": 8, "trapezoid": 8, "square": 8, "diagonal_depth": 1, "block": 16}
CASES = {
    # name: options, tiling, (H, K), T, S, rows, kernels run, scale of q
    "packed": (
        Options(True, 0.35), tiling(heads=1, **SMALL), (2, 2), 40, 40,
        lambda: packed([20, 15], T=40), 3, 1,
    ),
    "unsafe, split": (
        Options(True, 0.35), tiling(heads=1, split=2, **SMALL), (2, 1), 40, 40,
        lambda: packed([20, 15], T=40), 3, 60,
    ),
    "not packed": (
        Options(False, 0.35, window=30), tiling(heads=1, **SMALL), (2, 2), 20, 40,
        lambda: any_order(1, 20, 40), 2, 1,
    ),
    "spans": (
        Options(True, 0.35), tiling(heads=1, span=16, **SMALL), (2, 2), 40, 40,
        lambda: packed([20, 5], T=40), 5, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    # "unsafe, split" runs the same kernels as "packed", and the online one
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] * (c == "packed")) for c in CASES],
)
def test_no_races_and_right_results_on_two_cores(case):
    """Red when: the first grid dimension's cores write one block (an index map that forgets
    chain or head), a result block is not written, scratch is read before it is written."""
    options, tiles, (H, K), T, S, rows, kernels, size = CASES[case]
    q, *rest = qkv(B=1, T=T, S=S, H=H, K=K, D=8, seed=len(case))
    limits = F32 if size == 1 else {"rtol": 0, "atol": 2e-3}
    with race_detectors() as found:
        got = check(options, tiles, (size * q, *rest), rows(), limits, TWO_CORES)
    assert (got.repeated_steps > 0) == (size > 1)
    assert len(found) == kernels
    assert not any(state.races_found for state in found)
