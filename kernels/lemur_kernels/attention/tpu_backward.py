"""The backward kernel for TPUs: dq, dk and dv in one pass over the list of block pairs.

The probabilities are recomputed from the log-sum-exp (FlashAttention-2, arXiv:2307.08691, section
3.1.2): five products for each pair of blocks, and no running maximum. Scores are held keys first,
as in the forward kernel.

The list runs by query block. dq of the block gathers in fast memory; so do dk and dv of *all* keys
of a kv head, which grouped queries make small (S D numbers for G heads): no partial sums go
through HBM and no pair is computed twice. Keys that do not fit are taken in spans, the last first,
one call each, between which dq is carried in f32 and transposed as it is gathered.

Axis key: T and S all queries and all keys of the batch, row after row; H heads, K kv heads,
G = H / K, D head dim; C block of keys, Q block of queries, h heads and n kv heads of one step.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lemur_kernels.attention import steps as st
from lemur_kernels.attention.mask import Options
from lemur_kernels.attention.tilings import Tiling, kv_heads_per_step
from lemur_kernels.attention.tpu_forward import (
    NN,
    NT,
    Tile,
    all_heads,
    div,
    dot,
    each_tile,
    exponents,
    kinds_of,
    mark_specs,
    mask_tile,
    softmax_scale,
)


def _kernel(
    places, actions, first_keys, span_ref,
    q_ref, k_ref, kt_ref, v_ref, out_ref, dout_ref, lse_ref, *refs,
    options: Options, tiling: Tiling, marks: int, group: int, row_blocks: int, carried: bool,
):  # fmt: skip
    mark_refs, refs = refs[:marks], refs[marks:]
    if carried:
        earlier_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, dq_acc, dk_acc, dv_acc, delta_ref = refs
    action, place = actions[pl.program_id(1)], places[pl.program_id(1)]
    block = tiling.block
    first_block = st.key_block(place) - st.row(action) * row_blocks
    first_index = first_block * block
    span_index = pl.multiple_of((first_block - span_ref[0]) * block, block)
    span_blocks = dk_acc.shape[1] // block
    group = min(group, tiling.heads)

    @pl.when(st.opens_row(action))
    def _():
        def one_block(i, _):
            with jax.named_scope("open"):
                keys = pl.ds(pl.multiple_of(i * block, block), block)
                dk_acc[:, keys] = jnp.zeros((dk_acc.shape[0], block, dk_acc.shape[2]), jnp.float32)
                dv_acc[:, keys] = jnp.zeros((dv_acc.shape[0], block, dv_acc.shape[2]), jnp.float32)
            return 0

        lax.fori_loop(0, span_blocks, one_block, 0)

    @pl.when(st.is_first(action))
    def _():
        def one_head(head, _):
            with jax.named_scope("start"):
                out_QD = out_ref[head].astype(jnp.float32) * dout_ref[head].astype(jnp.float32)
                delta_ref[head] = out_QD.T.sum(0, keepdims=True)
                if carried:
                    dq_acc[head] = earlier_ref[head]
                elif not options.packed:  # packed rows meet their diagonal first, which writes
                    dq_acc[head] = jnp.zeros(dq_acc.shape[1:], jnp.float32)
            return 0

        lax.fori_loop(0, tiling.heads, one_head, 0)

    def products(head, t: Tile):
        kv, keys, queries = div(head, group), t.key_slice, t.query_slice
        s_CQ = dot(k_ref[kv, keys], q_ref[head, queries], NT)
        return s_CQ, dot(v_ref[kv, keys], dout_ref[head, queries], NT)

    def gather(kind, head, t: Tile, s_and_dp):
        s_CQ, dp_CQ = s_and_dp
        kv, queries = div(head, group), t.query_slice
        s_CQ = exponents(s_CQ, options)
        masked_CQ = mask_tile(s_CQ, t, kind, mark_refs, first_index, options)
        p_CQ = jnp.exp2(masked_CQ - lse_ref[head, :, queries])
        ds_CQ = p_CQ * (dp_CQ - delta_ref[head, :, queries])
        if options.soft_cap is not None:  # d tanh(x) = 1 - tanh(x)^2
            ds_CQ *= 1 - jnp.square(s_CQ / softmax_scale(options))
        p_CQ, ds_CQ = p_CQ.astype(q_ref.dtype), ds_CQ.astype(q_ref.dtype)
        keys = pl.ds(pl.multiple_of(span_index + t.k, 128), t.keys)
        dv_acc[kv, keys] += dot(p_CQ, dout_ref[head, queries], NN)
        dk_acc[kv, keys] += dot(ds_CQ, q_ref[head, queries], NN)
        dq_DQ = dot(kt_ref[kv, :, t.key_slice], ds_CQ, NN)
        if options.packed and t.writes:
            dq_acc[head, :, queries] = dq_DQ
        else:
            dq_acc[head, :, queries] += dq_DQ

    def attend(kind):
        def visit(tiles, scope):
            all_heads(scope, tiling, kind, tiles, products, functools.partial(gather, kind))

        each_tile(kind, tiling, first_keys, place, first_index, visit)

    for kind in kinds_of(options):

        @pl.when(st.kind(action) == kind)
        def _(kind=kind):
            attend(kind)

    @pl.when(st.kind(action) == st.EMPTY)
    def _():
        def one_head(head, _):
            with jax.named_scope("empty"):
                if carried:
                    dq_ref[head] = earlier_ref[head]
                else:
                    dq_ref[head] = jnp.zeros(dq_ref.shape[1:], dq_ref.dtype)
            return 0

        lax.fori_loop(0, tiling.heads, one_head, 0)

    @pl.when(st.is_last(action) & (st.kind(action) != st.EMPTY))
    def _():
        def one_head(head, _):
            with jax.named_scope("finish"):
                if carried:
                    dq_ref[head] = dq_acc[head]
                else:
                    dq_ref[head] = (dq_acc[head] * options.scale).astype(dq_ref.dtype).T
            return 0

        lax.fori_loop(0, tiling.heads, one_head, 0)

    @pl.when(st.closes_row(action))
    def _():
        def one_block(i, _):
            with jax.named_scope("close"):
                keys = pl.ds(pl.multiple_of(i * block, block), block)
                dk_ref[:, keys] = (dk_acc[:, keys] * options.scale).astype(dk_ref.dtype)
                dv_ref[:, keys] = dv_acc[:, keys].astype(dv_ref.dtype)
            return 0

        lax.fori_loop(0, span_blocks, one_block, 0)


def backward(
    q_HTD, k_KSD, kt_KDS, v_KSD, out_HTD, dout_HTD, lse_H1T, marks, first_keys, kinds,
    options: Options, tiling: Tiling, *, chains: int, row_tokens: int, interpret=False,
):  # fmt: skip
    """(dq_HTD, dk_KSD, dv_KSD) in the inputs' dtype.

    `lse_H1T` is in base 2, inf where padded. `kinds`: steps.kinds. `chains`: parallel runs over
    the list, n kv heads each; more than K / n of them split the group of a kv head, and their dk
    and dv are added up here. `row_tokens`: keys of one row, whole blocks.
    """
    kind_BQN, needed_BQN = kinds
    B, _, N = needed_BQN.shape
    H, T, D = q_HTD.shape
    K, S = k_KSD.shape[:2]
    n = kv_heads_per_step(tiling.heads, H // K)
    parts = H // (chains * tiling.heads)
    split = max(1, chains * n // K)  # chains that share a kv head: their sums meet in f32
    call = functools.partial(
        _call, q_HTD, k_KSD, kt_KDS, v_KSD, out_HTD, dout_HTD, lse_H1T, marks, first_keys,
        options=options, tiling=tiling, chains=chains, row_tokens=row_tokens, interpret=interpret,
    )  # fmt: skip

    def listed(kind_BQN, needed_BQN):
        return st.steps(kind_BQN, needed_BQN, packed=options.packed, parts=parts)

    spans = -(-row_tokens // tiling.span)
    if spans == 1:
        steps = listed(kind_BQN, needed_BQN)
        dq_HTD, dk_KSD, dv_KSD = call(steps=steps, span=row_tokens, first_block=jnp.int32(0))
    else:
        blocks = tiling.span // tiling.block
        needed_BQN &= kind_BQN != st.EMPTY  # dq starts as 0

        def one_span(dq_HDT, i):
            block_N = jnp.arange(N)
            inside_BQN = needed_BQN & (block_N // blocks == i)
            # A span that no query of a row sees must still be opened and closed.
            unseen_B11 = ~inside_BQN.any((1, 2), keepdims=True)
            first_QN = (jnp.arange(inside_BQN.shape[1])[:, None] == 0) & (block_N == i * blocks)
            steps = listed(
                jnp.where(unseen_B11, st.EMPTY, kind_BQN),
                jnp.where(unseen_B11, first_QN, inside_BQN),
            )
            dq_HDT, dk_KsD, dv_KsD = call(
                steps=steps, span=tiling.span, first_block=i * blocks, earlier=dq_HDT
            )
            return dq_HDT, (dk_KsD, dv_KsD)

        zeros = jnp.zeros((H, D, T), jnp.float32)
        dq_HDT, dkv = lax.scan(one_span, zeros, jnp.arange(spans), reverse=True)
        dq_HTD = (dq_HDT * options.scale).swapaxes(1, 2).astype(q_HTD.dtype)

        def joined(x_sKBD):  # [spans, K, B span, D] -> [K, B S, D]
            x = x_sKBD.reshape(spans, x_sKBD.shape[1], B, tiling.span, D).transpose(1, 2, 0, 3, 4)
            return x.reshape(x.shape[0], B, -1, D)[:, :, :row_tokens].reshape(-1, S, D)

        dk_KSD, dv_KSD = (joined(x) for x in dkv)
    if split > 1:
        dk_KSD, dv_KSD = (
            x.reshape(K, split, S, D).sum(1).astype(k_KSD.dtype) for x in (dk_KSD, dv_KSD)
        )
    return dq_HTD, dk_KSD, dv_KSD


def _call(
    q_HTD, k_KSD, kt_KDS, v_KSD, out_HTD, dout_HTD, lse_H1T, marks, first_keys, *,
    options: Options, tiling: Tiling, chains: int, row_tokens: int, steps: st.Steps, span: int,
    first_block, earlier=None, interpret=False,
):  # fmt: skip
    """One run over `steps`, whose keys lie in the span from `first_block` of each row on.

    Returns (dq_HTD, dk, dv of the span); with `earlier`, the f32 dq so far as [H, D, T], that
    array with this span's part added.
    """
    H, _, D = q_HTD.shape
    K, S = k_KSD.shape[:2]
    h, group, block = tiling.heads, H // K, tiling.block
    n = kv_heads_per_step(h, group)
    parts = H // (chains * h)

    def head_block(chain, e, actions):
        return chain * parts + st.part(actions[e])

    def kv_head(chain, e, actions):
        return div(div(head_block(chain, e, actions) * h, group), n)

    def q_index(chain, e, places, actions, *_):
        return head_block(chain, e, actions), st.query_block(places[e]), 0

    def row_index(chain, e, places, actions, *_):
        return head_block(chain, e, actions), 0, st.query_block(places[e])

    def kv_index(chain, e, places, actions, *_):
        return kv_head(chain, e, actions), st.key_block(places[e]), 0

    def kt_index(chain, e, places, actions, *_):
        return kv_head(chain, e, actions), 0, st.key_block(places[e])

    def dkv_index(chain, e, places, actions, *_):
        return chain, st.row(actions[e]), 0

    q_spec = pl.BlockSpec((h, block, D), q_index)
    kv_spec = pl.BlockSpec((n, block, D), kv_index)
    # Written once a row: a second buffer would only hold memory.
    dkv_spec = pl.BlockSpec((n, span, D), dkv_index, pipeline_mode=pl.Buffered(1))
    specs = [
        q_spec,
        kv_spec,
        pl.BlockSpec((n, D, block), kt_index),
        kv_spec,
        q_spec,
        q_spec,
        pl.BlockSpec((h, 1, block), row_index),
        *mark_specs(options, block),
    ]
    arrays = [q_HTD, k_KSD, kt_KDS, v_KSD, out_HTD, dout_HTD, lse_H1T, *marks]
    dq_spec, dq, aliases = q_spec, jax.ShapeDtypeStruct(q_HTD.shape, q_HTD.dtype), {}
    if earlier is not None:
        dq_spec = pl.BlockSpec((h, D, block), row_index)
        dq, aliases = jax.ShapeDtypeStruct(earlier.shape, jnp.float32), {4 + len(arrays): 0}
        specs.append(dq_spec)
        arrays.append(earlier)
    split = max(1, chains * n // K)
    dkv = jax.ShapeDtypeStruct(
        (chains * n, S // row_tokens * span, D), k_KSD.dtype if split == 1 else jnp.float32
    )
    kernel = functools.partial(
        _kernel,
        options=options,
        tiling=tiling,
        marks=len(marks),
        group=group,
        row_blocks=row_tokens // block,
        carried=earlier is not None,
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(chains, steps.count),
            in_specs=specs,
            out_specs=[dq_spec, dkv_spec, dkv_spec],
            scratch_shapes=[
                pltpu.VMEM((h, D, block), jnp.float32),
                pltpu.VMEM((n, span, D), jnp.float32),
                pltpu.VMEM((n, span, D), jnp.float32),
                pltpu.VMEM((h, 1, block), jnp.float32),
            ],
        ),
        out_shape=[dq, dkv, dkv],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiling.vmem_bytes
        ),
        interpret=interpret,
        name="lemur_attention_backward",
    )(steps.places_E, steps.actions_E, first_keys, first_block.reshape(1), *arrays)
