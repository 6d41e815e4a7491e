"""Attention with memory linear in the length, in plain XLA, forward and backward.

The queries are cut into blocks and a block sees whole rows of scores, so the softmax is the
ordinary one (no running rescale) and only [B, H, block, S] scores exist at a time. The forward
pass keeps the log-sum-exp of each row; the backward pass recomputes the probabilities from it
(FlashAttention-2, arXiv:2307.08691, section 3.1.2, with the key loop left whole).

For packed rows the query axis is first cut into at most RUNS runs, each against the static range
of the keys it can see: up to its own end, and with a window from window - 1 before its start. With
n runs and no window (n + 1) / 2n of the score matrix is computed: 5/8 at 4, 9/16 at 8. Inside a
run, blocks follow one another in a scan.

XLA's CPU gemm reads a transposed right operand in place but copies a transposed left one. So the
backward pass computes its scores keys first, [B, K, C, G, Q]: the left operands that then need
such a copy are [C, D] slices of k, never scores (forward and backward on 4 CPU cores, 8 x 512
tokens: 10 % less CPU time than queries first). The forward pass needs none queries first.

Axis key: B batch, T query length, S key length, H heads, K kv heads, G = H / K, D head dim,
Q queries in a block, C keys in sight of a run, N blocks in a run.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from lemur_kernels.attention.mask import Options, Rows, visible_BTS
from lemur_kernels.product import einsum_f32

# Measured on 4 CPU cores, 8 x 512 tokens, head_dim 64, forward and backward, CPU time: 64 and
# 128 are alike, 256 takes 1.15 to 1.3 times as long.
QUERY_BLOCK = 128
RUNS = 8


def forward(q_BTHD, k_BSKD, v_BSKD, rows: Rows, options: Options) -> tuple[jax.Array, jax.Array]:
    """See api.py."""
    B, T, H = q_BTHD.shape[:3]
    block = min(QUERY_BLOCK, T)
    scaled_BTHD, factor = _scaled(q_BTHD, options.scale)
    q_BKGTD = _heads_first(_padded(scaled_BTHD, block), k_BSKD)
    q_rows = [_padded(x, block) for x in (rows.q_positions_BT, rows.q_segments_BT)]
    k_BKSD, v_BKSD = k_BSKD.swapaxes(1, 2), v_BSKD.swapaxes(1, 2)
    outs, lses = [], []
    for queries, keys in _runs(T, k_BSKD.shape[1], block, options):

        def body(carry, xs, keys=keys):
            q_BKGQD, positions_BQ, segments_BQ = xs
            k_BKCD, v_BKCD = k_BKSD[:, :, keys], v_BKSD[:, :, keys]
            visible_BQC = _visible_BQC(positions_BQ, segments_BQ, rows, keys, options)
            scores_BKGQC = einsum_f32("BKGQD,BKCD->BKGQC", q_BKGQD, k_BKCD)
            scores_BKGQC, _ = _capped(scores_BKGQC * factor, options.soft_cap)
            scores_BKGQC = jnp.where(visible_BQC[:, None, None], scores_BKGQC, -jnp.inf)
            top_BKGQ = scores_BKGQC.max(-1)
            top_BKGQ = jnp.where(top_BKGQ == -jnp.inf, 0, top_BKGQ)
            p_BKGQC = jnp.exp(scores_BKGQC - top_BKGQ[..., None])
            total_BKGQ = p_BKGQC.sum(-1)
            out_BKGQD = einsum_f32("BKGQC,BKCD->BKGQD", p_BKGQC.astype(v_BKCD.dtype), v_BKCD)
            empty_BKGQ = total_BKGQ == 0
            out_BKGQD = out_BKGQD / jnp.where(empty_BKGQ, 1, total_BKGQ)[..., None]
            # Not log(0): the backward pass would recompute exp(-inf - -inf), which is NaN.
            lse_BKGQ = jnp.where(empty_BKGQ, jnp.inf, top_BKGQ + jnp.log(total_BKGQ))
            return carry, (out_BKGQD.astype(q_BTHD.dtype), lse_BKGQ)

        arrays = [(q_BKGTD[:, :, :, queries], 3), *((x[:, queries], 1) for x in q_rows)]
        _, (out_NBKGQD, lse_NBKGQ) = _each_block(body, (), arrays, block)
        outs.append(_join(out_NBKGQD))
        lses.append(_join(lse_NBKGQ))
    out_BTHD = _tokens_first(jnp.concatenate(outs, 3))[:, :T]
    return out_BTHD, jnp.concatenate(lses, -1).reshape(B, H, -1)[..., :T]


def backward(
    q_BTHD, k_BSKD, v_BSKD, rows: Rows, options: Options, out_BTHD, lse_BHT, dout_BTHD
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See api.py."""
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    block = min(QUERY_BLOCK, T)
    delta_BTH1 = jnp.sum(
        dout_BTHD.astype(jnp.float32) * out_BTHD.astype(jnp.float32), -1, keepdims=True
    )
    scaled_BTHD, factor = _scaled(q_BTHD, options.scale)
    q_BKGTD, dout_BKGTD, delta_BKGT1, lse_BKGT1 = (
        _heads_first(_padded(x, block), k_BSKD)
        for x in (scaled_BTHD, dout_BTHD, delta_BTH1, lse_BHT.swapaxes(1, 2)[..., None])
    )
    q_rows = [_padded(x, block) for x in (rows.q_positions_BT, rows.q_segments_BT)]
    k_BKSD, v_BKSD = k_BSKD.swapaxes(1, 2), v_BSKD.swapaxes(1, 2)
    dqs = []
    dk_BKSD, dv_BKSD = (jnp.zeros_like(x, jnp.float32) for x in (k_BKSD, v_BKSD))
    for queries, keys in _runs(T, S, block, options):

        def body(carry, xs, keys=keys):
            dk_BKCD, dv_BKCD = carry
            q_BKGQD, dout_BKGQD, lse_BKGQ, delta_BKGQ, positions_BQ, segments_BQ = xs
            k_BKCD, v_BKCD = k_BKSD[:, :, keys], v_BKSD[:, :, keys]
            visible_BQC = _visible_BQC(positions_BQ, segments_BQ, rows, keys, options)
            scores_BKCGQ = einsum_f32("BKCD,BKGQD->BKCGQ", k_BKCD, q_BKGQD)
            scores_BKCGQ, slope_BKCGQ = _capped(scores_BKCGQ * factor, options.soft_cap)
            mask_B1C1Q = visible_BQC.swapaxes(1, 2)[:, None, :, None]
            scores_BKCGQ = jnp.where(mask_B1C1Q, scores_BKCGQ, -jnp.inf)
            p_BKCGQ = jnp.exp(scores_BKCGQ - lse_BKGQ[:, :, None])
            dp_BKCGQ = einsum_f32("BKCD,BKGQD->BKCGQ", v_BKCD, dout_BKGQD)
            ds_BKCGQ = p_BKCGQ * (dp_BKCGQ - delta_BKGQ[:, :, None]) * slope_BKCGQ
            ds_BKCGQ = ds_BKCGQ.astype(k_BKCD.dtype)
            dv_BKCD += einsum_f32("BKCGQ,BKGQD->BKCD", p_BKCGQ.astype(v_BKCD.dtype), dout_BKGQD)
            dk_BKCD += einsum_f32("BKCGQ,BKGQD->BKCD", ds_BKCGQ, q_BKGQD)
            dq_BKDGQ = einsum_f32("BKCD,BKCGQ->BKDGQ", k_BKCD, ds_BKCGQ) * options.scale
            return (dk_BKCD, dv_BKCD), dq_BKDGQ.astype(q_BTHD.dtype)

        arrays = [
            (q_BKGTD[:, :, :, queries], 3),
            (dout_BKGTD[:, :, :, queries], 3),
            (lse_BKGT1[:, :, :, queries, 0], 3),
            (delta_BKGT1[:, :, :, queries, 0], 3),
            *((x[:, queries], 1) for x in q_rows),
        ]
        carry = (dk_BKSD[:, :, keys], dv_BKSD[:, :, keys])
        (dk_BKCD, dv_BKCD), dq_NBKDGQ = _each_block(body, carry, arrays, block)
        dk_BKSD, dv_BKSD = _put(dk_BKSD, keys, dk_BKCD), _put(dv_BKSD, keys, dv_BKCD)
        dqs.append(_join(dq_NBKDGQ, axis=4))
    dq_BTHD = _tokens_first(jnp.concatenate(dqs, -1).transpose(0, 1, 3, 4, 2))[:, :T]
    dk_BSKD = (dk_BKSD * factor).swapaxes(1, 2).astype(k_BSKD.dtype)
    dv_BSKD = dv_BKSD.swapaxes(1, 2).astype(v_BSKD.dtype)
    return dq_BTHD, dk_BSKD, dv_BSKD


def _runs(T: int, S: int, block: int, options: Options) -> list[tuple[slice, slice]]:
    """The queries, of the padded length, and the keys of each run; all static."""
    blocks = -(-T // block)
    if not options.packed:
        return [(slice(0, blocks * block), slice(0, S))]
    length = math.ceil(blocks / min(RUNS, blocks)) * block
    back = T if options.window is None else options.window - 1
    return [
        (slice(a, min(a + length, blocks * block)), slice(max(a - back, 0), min(a + length, S)))
        for a in range(0, T, length)
    ]


def _visible_BQC(positions_BQ, segments_BQ, rows: Rows, keys: slice, options: Options):
    kv_positions_BC, kv_segments_BC = rows.kv_positions_BS[:, keys], rows.kv_segments_BS[:, keys]
    block_rows = Rows(positions_BQ, kv_positions_BC, segments_BQ, kv_segments_BC)
    return visible_BTS(block_rows, options.window)


def _scaled(q_BTHD, scale: float):
    """Queries for the products, and the factor that is left for the f32 scores.

    Scaling the queries costs T D products, scaling the scores T S; but 16 bits would round them,
    and float16 overflow.
    """
    return (q_BTHD * scale, 1.0) if q_BTHD.dtype == jnp.float32 else (q_BTHD, scale)


def _capped(scores, soft_cap: float | None):
    """cap * tanh(scores / cap) and its derivative."""
    if soft_cap is None:
        return scores, 1.0
    tanh = jnp.tanh(scores / soft_cap)
    return soft_cap * tanh, 1 - tanh * tanh


def _padded(x_BT, block: int):
    """Queries up to a whole block, with zeros: segment 0 sees nothing and gives 0."""
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % block), *((0, 0),) * (x_BT.ndim - 2)))


def _put(x_BKSD, keys: slice, part_BKCD):
    # Not .at[].set: jaxlib 0.11.2 crashes compiling it for several CPU devices.
    before, after = x_BKSD[:, :, : keys.start], x_BKSD[:, :, keys.stop :]
    return jnp.concatenate([before, part_BKCD, after], axis=2)


def _heads_first(x_BTHD, k_BSKD):
    B, T, H, D = x_BTHD.shape
    K = k_BSKD.shape[2]
    return x_BTHD.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)


def _tokens_first(x_BKGTD):
    B, K, G, T, D = x_BKGTD.shape
    return x_BKGTD.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, D)


def _join(x_NBKGQ, axis: int = 3):
    """Blocks [N, ..., Q, ...] -> [..., N * Q, ...], Q at `axis` once N is gone."""
    x = jnp.moveaxis(x_NBKGQ, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _each_block(body, carry, arrays, block):
    """Runs `body(carry, blocks)` over blocks of the query axis; arrays are (array, axis) pairs.

    Blocks come out stacked on a leading axis N. One block needs no scan.
    """

    def split(x, axis):
        x = x.reshape(*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    blocks = [split(x, axis) for x, axis in arrays]
    if blocks[0].shape[0] == 1:
        carry, out = body(carry, [x[0] for x in blocks])
        return carry, jax.tree.map(lambda x: x[None], out)
    return lax.scan(body, carry, blocks)
