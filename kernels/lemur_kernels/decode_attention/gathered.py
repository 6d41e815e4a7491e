"""Decode attention in plain XLA for CPUs and GPUs: blocks of pages gathered in a loop.

The loop runs to the longest row's last page, so its time follows the live cache and not the size
of the page table; the softmax is the online one (FlashAttention-2, arXiv:2307.08691, section
3.1.1). Memory: one block of keys, B x BLOCK_TOKENS x K x C.

Axis key: B rows, N query tokens, H heads, K kv heads, G = H / K, D head dim, P pages in the
cache, M pages in a row's table, W pages in a block, Z tokens in a page, T = W * Z.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lemur_kernels.decode_attention.pages import split
from lemur_kernels.decode_attention.reference import (
    pages_in_use,
    pages_of_rows,
    query_positions,
    visible,
)
from lemur_kernels.product import einsum_f32
from lemur_kernels.varying import varying_alike

BLOCK_TOKENS = 512
LOWEST = -1e30  # the running maximum before the first visible key; finite, so that no inf - inf


def gathered(
    q_BNHD, kv_pages_PKZC, *, page_table_BM, lengths_B, new_tokens_B, k_scales_PK, v_scales_PK,
    scale, window, soft_cap,
) -> jax.Array:  # fmt: skip
    """See lemur_kernels.decode_attention.decode_attention."""
    B, N, H, D = q_BNHD.shape
    K, Z = kv_pages_PKZC.shape[1:3]
    M, G, W = page_table_BM.shape[1], H // K, max(1, BLOCK_TOKENS // Z)
    pad = -M % W
    page_table_BM = jnp.pad(page_table_BM, ((0, 0), (0, pad)))
    positions_BN, exists_BN = query_positions(lengths_B, new_tokens_B, N)
    q_BKNGD = q_BNHD.reshape(B, N, K, G, D).swapaxes(1, 2)

    def block(j, carry):
        top_BKNG, total_BKNG, out_BKNGD = carry
        first_W = (j * W + jnp.arange(W)) * Z
        used_BW = pages_in_use(first_W, Z, lengths_B, new_tokens_B, window)
        ids_BW = lax.dynamic_slice_in_dim(page_table_BM, j * W, W, 1)
        kv_BWKZC = pages_of_rows(kv_pages_PKZC, ids_BW, used_BW)
        kv_BKTC = kv_BWKZC.swapaxes(1, 2).reshape(B, K, W * Z, -1).astype(q_BNHD.dtype)
        k_BKTD, v_BKTD = split(kv_BKTC, D)
        seen_BNT = visible(j * W * Z + jnp.arange(W * Z), positions_BN, exists_BN, window)
        seen_B1N1T = seen_BNT[:, None, :, None]
        v_BKTD = jnp.where(seen_BNT.any(1)[:, None, :, None], v_BKTD, 0)  # 0 * NaN would be NaN

        scores_BKNGT = einsum_f32("BKNGD,BKTD->BKNGT", q_BKNGD, k_BKTD) * scale
        if k_scales_PK is not None:
            scores_BKNGT *= per_key(k_scales_PK, ids_BW, used_BW)
        if soft_cap is not None:
            scores_BKNGT = soft_cap * jnp.tanh(scores_BKNGT / soft_cap)
        scores_BKNGT = jnp.where(seen_B1N1T, scores_BKNGT, -jnp.inf)
        new_top_BKNG = jnp.maximum(top_BKNG, scores_BKNGT.max(-1))
        p_BKNGT = jnp.exp(scores_BKNGT - new_top_BKNG[..., None])
        shrink_BKNG = jnp.exp(top_BKNG - new_top_BKNG)
        total_BKNG = total_BKNG * shrink_BKNG + p_BKNGT.sum(-1)
        if v_scales_PK is not None:
            p_BKNGT *= per_key(v_scales_PK, ids_BW, used_BW)
        part_BKNGD = einsum_f32("BKNGT,BKTD->BKNGD", p_BKNGT.astype(v_BKTD.dtype), v_BKTD)
        return new_top_BKNG, total_BKNG, out_BKNGD * shrink_BKNG[..., None] + part_BKNGD

    def per_key(scales_PK, ids_BW, used_BW):
        """Each page's scale at each of its tokens, [B, K, 1, 1, T]."""
        scales_BKW = pages_of_rows(scales_PK, ids_BW, used_BW).swapaxes(1, 2)
        return jnp.repeat(scales_BKW, Z, -1)[:, :, None, None]

    shape = (B, K, N, G)
    start = (jnp.full(shape, LOWEST), jnp.zeros(shape), jnp.zeros((*shape, D)))
    _, *start = varying_alike(q_BNHD, *start)
    longest = jnp.minimum(jnp.max(lengths_B), M * Z)  # else a wrong length overflows the sum
    blocks = (longest + W * Z - 1) // (W * Z)
    _, total_BKNG, out_BKNGD = lax.fori_loop(0, blocks, block, tuple(start))
    out_BKNGD = out_BKNGD / jnp.where(total_BKNG == 0, 1, total_BKNG)[..., None]
    return out_BKNGD.swapaxes(1, 2).reshape(B, N, H, D).astype(q_BNHD.dtype)
