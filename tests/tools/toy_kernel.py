"""A small Pallas kernel with a block table in scalar memory, to test tools/tpu_compiler with."""

import contextlib
import os

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from tpu_compiler.cases import Built, Case

STEPS, HEADS, BLOCK = 36, 2, 512
NT = (((1,), (1,)), ((), ()))


def _named(named: bool, name: str):
    return jax.named_scope(name) if named else contextlib.nullcontext()


def _kernel(named, table, q_ref, k_ref, out_ref, acc_ref):
    step = pl.program_id(1)

    def product(head):
        return lax.dot_general(q_ref[head], k_ref[...], NT, preferred_element_type=jnp.float32)

    @pl.when(table[3, step] == 1)
    def _():
        with _named(named, "start"):
            acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(table[2, step] == 0)
    def _():
        with _named(named, "full"):
            for head in range(HEADS):
                acc_ref[head] += jnp.exp2(product(head))

    @pl.when(table[2, step] == 1)
    def _():
        def body(head, _):
            with _named(named, "head"):
                s = product(head)
                row, column = (lax.broadcasted_iota(jnp.int32, s.shape, i) for i in (0, 1))
                acc_ref[head] += jnp.where(row >= column, s, 0.0)

        lax.fori_loop(0, HEADS, body, None)

    @pl.when(table[4, step] == 1)
    def _():
        with _named(named, "finish"):
            out_ref[...] = acc_ref[...].astype(out_ref.dtype)


def _call(named, first="parallel"):
    def fn(table, steps, q, k):
        return pl.pallas_call(
            lambda *refs: _kernel(named, *refs),
            name="toy",
            out_shape=jax.ShapeDtypeStruct((HEADS, 4096, BLOCK), jnp.bfloat16),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(2, steps),
                in_specs=[
                    pl.BlockSpec((HEADS, BLOCK, 128), lambda h, i, t: (0, t[0, i], 0)),
                    pl.BlockSpec((BLOCK, 128), lambda h, i, t: (t[1, i], 0)),
                ],
                out_specs=pl.BlockSpec((HEADS, BLOCK, BLOCK), lambda h, i, t: (0, t[0, i], 0)),
                scratch_shapes=[pltpu.VMEM((HEADS, BLOCK, BLOCK), jnp.float32)],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=(first, "arbitrary")),
        )(table, q, k) + jnp.bfloat16(1)

    return fn


def build(case: Case, named: bool = True) -> Built:
    """64 steps a head block of a causal 8 x 8 block matrix: 28 full, 8 on the diagonal."""
    args = (
        ((5, 64), "int32"),
        ((), "int32"),
        ((HEADS, 4096, 128), "bfloat16"),
        ((4096, 128), "bfloat16"),
    )
    counts = {"grid": 2 * STEPS, "start": 16, "full": 56, "head": 2 * 8 * HEADS, "finish": 16}
    return Built(_call(named), args, {"toy": counts})


def alone(case: Case) -> Built:
    """Its grid is not split over two cores."""
    built = build(case)
    return Built(_call(True, "arbitrary"), built.args, built.counts)


def unnamed(case: Case) -> Built:
    return build(case, named=False)


def dies(case: Case) -> Built:
    os._exit(3)


def candidates(case: Case) -> list[dict[str, int]]:
    return [{"block": 512}]


def fingerprint() -> str:
    return "toy"
