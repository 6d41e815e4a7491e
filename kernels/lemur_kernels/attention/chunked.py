"""Attention with memory linear in the length, in plain XLA, forward and backward.

The queries are cut into blocks and a block sees whole rows of scores, so the softmax is the
ordinary one (no running rescale) and only [B, H, block, S] scores exist at a time. The forward
pass keeps the log-sum-exp of each row; the backward pass recomputes the probabilities from it
(FlashAttention-2, arXiv:2307.08691, section 3.1.2, with the key loop left whole).

For packed rows the query axis is first cut into at most PREFIXES runs, each against the static
prefix of the keys it can see. With n runs (n + 1) / 2n of the score matrix is computed: 5/8 at
4, 9/16 at 8. Inside a run, blocks follow one another in a scan.

Axis key: B batch, T query length, S key length, H heads, K kv heads, G = H / K, D head dim,
Q queries in a block, C keys in sight of a run, N blocks in a run.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from lemur_kernels.attention.reference import visible_BTS

QUERY_BLOCK = 128
PREFIXES = 8


def chunked(
    q_BTHD, k_BSKD, v_BSKD, q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS,
    *, packed: bool, scale: float,
) -> jax.Array:  # fmt: skip
    """See lemur_kernels.attention.attention; gradients flow to q, k and v only."""
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    block = min(QUERY_BLOCK, T)
    pad = -T % block
    if pad:  # padded queries have segment 0: they see nothing and give 0
        q_BTHD = jnp.pad(q_BTHD, ((0, 0), (0, pad), (0, 0), (0, 0)))
        q_positions_BT = jnp.pad(q_positions_BT, ((0, 0), (0, pad)))
        q_segments_BT = jnp.pad(q_segments_BT, ((0, 0), (0, pad)))
    runs = _runs(T + pad, S, block, packed)
    q_BKGTD = q_BTHD.reshape(B, T + pad, K, H // K, D).transpose(0, 2, 3, 1, 4)
    # Scaling the queries here costs T D products instead of T S on the scores.
    q_BKGTD = (q_BKGTD * scale).astype(q_BTHD.dtype)
    out_BKGTD = _attend(
        q_BKGTD,
        k_BSKD.transpose(0, 2, 1, 3),
        v_BSKD.transpose(0, 2, 1, 3),
        (q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS),
        runs,
        block,
    )
    out_BTHD = out_BKGTD.transpose(0, 3, 1, 2, 4).reshape(B, T + pad, H, D)
    return out_BTHD[:, :T]


def _runs(T: int, S: int, block: int, packed: bool) -> tuple[tuple[int, int, int], ...]:
    """(first query, end query, end key) of each run; ends are static."""
    if not packed:
        return ((0, T, S),)
    blocks = T // block
    length = math.ceil(blocks / min(PREFIXES, blocks)) * block
    return tuple((a, min(a + length, T), min(a + length, S)) for a in range(0, T, length))


def _scores(q_BKGQD, k_BKCD, visible_BQC):
    """Masked scores of one block, f32; hidden keys are -inf."""
    scores_BKGQC = jnp.einsum(
        "BKGQD,BKCD->BKGQC", q_BKGQD, k_BKCD, preferred_element_type=jnp.float32
    )
    return jnp.where(visible_BQC[:, None, None], scores_BKGQC, -jnp.inf)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BKGTD, k_BKSD, v_BKSD, rows, runs, block):
    return _attend_forward(q_BKGTD, k_BKSD, v_BKSD, rows, runs, block)[0]


def _attend_forward(q_BKGTD, k_BKSD, v_BKSD, rows, runs, block):
    q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS = rows
    B, K, G, _, D = q_BKGTD.shape
    outs, lses = [], []
    for first, end, keys in runs:
        k_BKCD, v_BKCD = k_BKSD[:, :, :keys], v_BKSD[:, :, :keys]

        def body(carry, xs, k_BKCD=k_BKCD, v_BKCD=v_BKCD, keys=keys):
            q_BKGQD, positions_BQ, segments_BQ = xs
            visible = visible_BTS(
                positions_BQ, kv_positions_BS[:, :keys], segments_BQ, kv_segments_BS[:, :keys]
            )
            scores_BKGQC = _scores(q_BKGQD, k_BKCD, visible)
            top_BKGQ = scores_BKGQC.max(-1)
            top_BKGQ = jnp.where(top_BKGQ == -jnp.inf, 0, top_BKGQ)
            weights_BKGQC = jnp.exp(scores_BKGQC - top_BKGQ[..., None])
            total_BKGQ = weights_BKGQC.sum(-1)
            out_BKGQD = jnp.einsum(
                "BKGQC,BKCD->BKGQD",
                weights_BKGQC.astype(v_BKCD.dtype),
                v_BKCD,
                preferred_element_type=jnp.float32,
            )
            empty_BKGQ = total_BKGQ == 0
            out_BKGQD = out_BKGQD / jnp.where(empty_BKGQ, 1, total_BKGQ)[..., None]
            # +inf makes every recomputed probability of an empty row exp(-inf) = 0.
            lse_BKGQ = jnp.where(empty_BKGQ, jnp.inf, top_BKGQ + jnp.log(total_BKGQ))
            return carry, (out_BKGQD.astype(q_BKGQD.dtype), lse_BKGQ)

        part = slice(first, end)
        _, (out_NBKGQD, lse_NBKGQ) = _each_block(
            body,
            (),
            [
                (q_BKGTD[:, :, :, part], 3),
                (q_positions_BT[:, part], 1),
                (q_segments_BT[:, part], 1),
            ],
            block,
        )
        outs.append(jnp.moveaxis(out_NBKGQD, 0, 3).reshape(B, K, G, end - first, D))
        lses.append(jnp.moveaxis(lse_NBKGQ, 0, 3).reshape(B, K, G, end - first))
    out_BKGTD, lse_BKGT = jnp.concatenate(outs, 3), jnp.concatenate(lses, 3)
    return out_BKGTD, (q_BKGTD, k_BKSD, v_BKSD, rows, out_BKGTD, lse_BKGT)


def _attend_backward(runs, block, residuals, dout_BKGTD):
    q_BKGTD, k_BKSD, v_BKSD, rows, out_BKGTD, lse_BKGT = residuals
    q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS = rows
    B, K, G, _, D = q_BKGTD.shape
    f32 = {"preferred_element_type": jnp.float32}
    delta_BKGT = jnp.sum(dout_BKGTD.astype(jnp.float32) * out_BKGTD.astype(jnp.float32), -1)
    dqs = []
    dk_BKSD = jnp.zeros_like(k_BKSD, jnp.float32)
    dv_BKSD = jnp.zeros_like(v_BKSD, jnp.float32)
    for first, end, keys in runs:
        k_BKCD, v_BKCD = k_BKSD[:, :, :keys], v_BKSD[:, :, :keys]

        def body(carry, xs, k_BKCD=k_BKCD, v_BKCD=v_BKCD, keys=keys):
            dk_BKCD, dv_BKCD = carry
            q_BKGQD, dout_BKGQD, lse_BKGQ, delta_BKGQ, positions_BQ, segments_BQ = xs
            visible = visible_BTS(
                positions_BQ, kv_positions_BS[:, :keys], segments_BQ, kv_segments_BS[:, :keys]
            )
            scores_BKGQC = _scores(q_BKGQD, k_BKCD, visible)
            p_BKGQC = jnp.exp(scores_BKGQC - lse_BKGQ[..., None])
            dp_BKGQC = jnp.einsum("BKGQD,BKCD->BKGQC", dout_BKGQD, v_BKCD, **f32)
            ds_BKGQC = (p_BKGQC * (dp_BKGQC - delta_BKGQ[..., None])).astype(k_BKCD.dtype)
            p_BKGQC = p_BKGQC.astype(dout_BKGQD.dtype)
            dv_BKCD += jnp.einsum("BKGQC,BKGQD->BKCD", p_BKGQC, dout_BKGQD, **f32)
            dk_BKCD += jnp.einsum("BKGQC,BKGQD->BKCD", ds_BKGQC, q_BKGQD, **f32)
            dq_BKGQD = jnp.einsum("BKGQC,BKCD->BKGQD", ds_BKGQC, k_BKCD, **f32)
            return (dk_BKCD, dv_BKCD), dq_BKGQD.astype(q_BKGQD.dtype)

        part = slice(first, end)
        (dk_BKCD, dv_BKCD), dq_NBKGQD = _each_block(
            body,
            (dk_BKSD[:, :, :keys], dv_BKSD[:, :, :keys]),
            [
                (q_BKGTD[:, :, :, part], 3),
                (dout_BKGTD[:, :, :, part], 3),
                (lse_BKGT[..., part], 3),
                (delta_BKGT[..., part], 3),
                (q_positions_BT[:, part], 1),
                (q_segments_BT[:, part], 1),
            ],
            block,
        )
        dk_BKSD = dk_BKSD.at[:, :, :keys].set(dk_BKCD)
        dv_BKSD = dv_BKSD.at[:, :, :keys].set(dv_BKCD)
        dqs.append(jnp.moveaxis(dq_NBKGQD, 0, 3).reshape(B, K, G, end - first, D))
    dq_BKGTD = jnp.concatenate(dqs, 3)
    return dq_BKGTD, dk_BKSD.astype(k_BKSD.dtype), dv_BKSD.astype(v_BKSD.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
