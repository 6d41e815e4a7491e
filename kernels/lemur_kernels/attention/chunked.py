"""Attention with memory linear in the length, in plain XLA, forward and backward.

The queries are cut into blocks and a block sees whole rows of scores, so the softmax is the
ordinary one (no running rescale) and only [B, H, block, S] scores exist at a time. The forward
pass keeps the log-sum-exp of each row; the backward pass recomputes the probabilities from it
(FlashAttention-2, arXiv:2307.08691, section 3.1.2, with the key loop left whole).

For packed rows the query axis is first cut into at most PREFIXES runs, each against the static
prefix of the keys it can see. With n runs (n + 1) / 2n of the score matrix is computed: 5/8 at
4, 9/16 at 8. Inside a run, blocks follow one another in a scan.

XLA's CPU gemm reads a transposed right operand in place but copies a transposed left one. So the
backward pass computes its scores keys first, [B, K, C, G, Q]: the left operands that then need
such a copy are [C, D] slices of k, never scores (forward and backward on 4 CPU cores, 8 x 512
tokens: 10 % less CPU time than queries first). The forward pass needs none queries first.

Axis key: B batch, T query length, S key length, H heads, K kv heads, G = H / K, D head dim,
Q queries in a block, C keys in sight of a run, N blocks in a run.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from lemur_kernels.attention.reference import visible_BTS
from lemur_kernels.product import einsum_f32
from lemur_kernels.varying import varying_alike

# Measured on 4 CPU cores, 8 x 512 tokens, head_dim 64, forward and backward, CPU time: 64 and
# 128 are alike, 256 takes 1.15 to 1.3 times as long.
QUERY_BLOCK = 128
PREFIXES = 8


def chunked(
    q_BTHD, k_BSKD, v_BSKD, q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS,
    *, packed: bool, scale: float,
) -> jax.Array:  # fmt: skip
    """See lemur_kernels.attention.attention; gradients flow to q, k and v only."""
    T = q_BTHD.shape[1]
    block = min(QUERY_BLOCK, T)
    pad = -T % block
    if pad:  # padded queries have segment 0: they see nothing and give 0
        q_BTHD = jnp.pad(q_BTHD, ((0, 0), (0, pad), (0, 0), (0, 0)))
        q_positions_BT = jnp.pad(q_positions_BT, ((0, 0), (0, pad)))
        q_segments_BT = jnp.pad(q_segments_BT, ((0, 0), (0, pad)))
    runs = _runs(T + pad, k_BSKD.shape[1], block, packed)
    q_BTHD, k_BSKD, v_BSKD, *rows = varying_alike(
        q_BTHD, k_BSKD, v_BSKD, q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS
    )
    return _attend(q_BTHD, k_BSKD, v_BSKD, tuple(rows), runs, block, scale)[:, :T]


def _runs(T: int, S: int, block: int, packed: bool) -> tuple[tuple[int, int, int], ...]:
    """(first query, end query, end key) of each run; all static."""
    if not packed:
        return ((0, T, S),)
    blocks = T // block
    length = math.ceil(blocks / min(PREFIXES, blocks)) * block
    return tuple((a, min(a + length, T), min(a + length, S)) for a in range(0, T, length))


def _heads_first(x_BTHD, K: int):
    B, T, H, D = x_BTHD.shape
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q_BTHD, k_BSKD, v_BSKD, rows, runs, block, scale):
    return _forward(q_BTHD, k_BSKD, v_BSKD, rows, runs, block, scale)[0]


def _forward(q_BTHD, k_BSKD, v_BSKD, rows, runs, block, scale):
    q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS = rows
    # Scaling the queries costs T D products, scaling the scores T S.
    q_BKGTD = _heads_first((q_BTHD * scale).astype(q_BTHD.dtype), k_BSKD.shape[2])
    k_BKSD, v_BKSD = k_BSKD.swapaxes(1, 2), v_BSKD.swapaxes(1, 2)
    outs, lses = [], []
    for first, end, keys in runs:

        def body(carry, xs, keys=keys):
            q_BKGQD, positions_BQ, segments_BQ = xs
            k_BKCD, v_BKCD = k_BKSD[:, :, :keys], v_BKSD[:, :, :keys]
            visible_BQC = visible_BTS(
                positions_BQ, kv_positions_BS[:, :keys], segments_BQ, kv_segments_BS[:, :keys]
            )
            scores_BKGQC = einsum_f32("BKGQD,BKCD->BKGQC", q_BKGQD, k_BKCD)
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

        part = slice(first, end)
        arrays = [
            (q_BKGTD[:, :, :, part], 3),
            (q_positions_BT[:, part], 1),
            (q_segments_BT[:, part], 1),
        ]
        _, (out_NBKGQD, lse_NBKGQ) = _each_block(body, (), arrays, block)
        outs.append(_join(out_NBKGQD))
        lses.append(_join(lse_NBKGQ))
    out_BTHD = _tokens_first(jnp.concatenate(outs, 3))
    return out_BTHD, (q_BTHD, k_BSKD, v_BSKD, rows, out_BTHD, jnp.concatenate(lses, -1))


def _backward(runs, block, scale, residuals, dout_BTHD):
    q_BTHD, k_BSKD, v_BSKD, rows, out_BTHD, lse_BKGT = residuals
    q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS = rows
    K = k_BSKD.shape[2]
    delta_BTH1 = jnp.sum(
        dout_BTHD.astype(jnp.float32) * out_BTHD.astype(jnp.float32), -1, keepdims=True
    )
    delta_BKGT = _heads_first(delta_BTH1, K)[..., 0]
    q_BKGTD = _heads_first((q_BTHD * scale).astype(q_BTHD.dtype), K)
    dout_BKGTD = _heads_first(dout_BTHD, K)
    k_BKSD, v_BKSD = k_BSKD.swapaxes(1, 2), v_BSKD.swapaxes(1, 2)
    dqs = []
    dk_BKSD, dv_BKSD = (jnp.zeros_like(x, jnp.float32) for x in (k_BKSD, v_BKSD))
    for first, end, keys in runs:

        def body(carry, xs, keys=keys):
            dk_BKCD, dv_BKCD = carry
            q_BKGQD, dout_BKGQD, lse_BKGQ, delta_BKGQ, positions_BQ, segments_BQ = xs
            k_BKCD, v_BKCD = k_BKSD[:, :, :keys], v_BKSD[:, :, :keys]
            visible_BQC = visible_BTS(
                positions_BQ, kv_positions_BS[:, :keys], segments_BQ, kv_segments_BS[:, :keys]
            )
            mask_B1C1Q = visible_BQC.swapaxes(1, 2)[:, None, :, None]
            scores_BKCGQ = einsum_f32("BKCD,BKGQD->BKCGQ", k_BKCD, q_BKGQD)
            scores_BKCGQ = jnp.where(mask_B1C1Q, scores_BKCGQ, -jnp.inf)
            p_BKCGQ = jnp.exp(scores_BKCGQ - lse_BKGQ[:, :, None])
            dp_BKCGQ = einsum_f32("BKCD,BKGQD->BKCGQ", v_BKCD, dout_BKGQD)
            ds_BKCGQ = (p_BKCGQ * (dp_BKCGQ - delta_BKGQ[:, :, None])).astype(k_BKCD.dtype)
            dv_BKCD += einsum_f32("BKCGQ,BKGQD->BKCD", p_BKCGQ.astype(v_BKCD.dtype), dout_BKGQD)
            dk_BKCD += einsum_f32("BKCGQ,BKGQD->BKCD", ds_BKCGQ, q_BKGQD)
            dq_BKDGQ = einsum_f32("BKCD,BKCGQ->BKDGQ", k_BKCD, ds_BKCGQ) * scale
            return (dk_BKCD, dv_BKCD), dq_BKDGQ.astype(q_BTHD.dtype)

        part = slice(first, end)
        arrays = [
            (q_BKGTD[:, :, :, part], 3),
            (dout_BKGTD[:, :, :, part], 3),
            (lse_BKGT[..., part], 3),
            (delta_BKGT[..., part], 3),
            (q_positions_BT[:, part], 1),
            (q_segments_BT[:, part], 1),
        ]
        carry = (dk_BKSD[:, :, :keys], dv_BKSD[:, :, :keys])
        (dk_BKCD, dv_BKCD), dq_NBKDGQ = _each_block(body, carry, arrays, block)
        # Not .at[].set: jaxlib 0.11.2 crashes compiling it for several CPU devices.
        dk_BKSD = jnp.concatenate([dk_BKCD, dk_BKSD[:, :, keys:]], axis=2)
        dv_BKSD = jnp.concatenate([dv_BKCD, dv_BKSD[:, :, keys:]], axis=2)
        dqs.append(_join(dq_NBKDGQ, axis=4))
    dq_BTHD = _tokens_first(jnp.concatenate(dqs, -1).transpose(0, 1, 3, 4, 2))
    dk_BSKD = dk_BKSD.swapaxes(1, 2).astype(k_BSKD.dtype)
    dv_BSKD = dv_BKSD.swapaxes(1, 2).astype(v_BSKD.dtype)
    return dq_BTHD, dk_BSKD, dv_BSKD, None


_attend.defvjp(_forward, _backward)
