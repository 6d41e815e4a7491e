"""The meaning of decode attention: look the pages up, mask, softmax, in the fewest lines.

Axis key: B rows, N query tokens, H heads, K kv heads, G = H / K, D head dim, P pages in the
cache, M pages in a row's table, Z tokens in a page, S = M * Z keys.
"""

import jax
import jax.numpy as jnp

from lemur_kernels.decode_attention.pages import split


def pages_of_rows(pages_P: jax.Array, page_table: jax.Array, used) -> jax.Array:
    """pages_P[page_table] where `used`, zeros elsewhere; see `legal_rows` for ids out of range."""
    found = pages_P.at[jnp.where(used, page_table, 0)].get(mode="clip")
    return jnp.where(used.reshape(used.shape + (1,) * (pages_P.ndim - 1)), found, 0)


def pages_in_use(first_M, Z: int, lengths_B, new_tokens_B, window: int | None) -> jax.Array:
    """Which pages some query of the row sees, bool [B, M]; first_M: each page's first position.

    The only definition: ids, scales and contents of all other pages are never looked at.
    """
    used_BM = (first_M < lengths_B[:, None]) & (new_tokens_B > 0)[:, None]
    if window is None:
        return used_BM
    return used_BM & (first_M + Z > (lengths_B - new_tokens_B - window + 1)[:, None])


def legal_rows(page_table_BM, lengths_B, new_tokens_B, N, P, Z, window) -> jax.Array:
    """Rows whose lengths and pages in use are in range, bool [B]; the others' output is NaN."""
    M = page_table_BM.shape[1]
    used_BM = pages_in_use(jnp.arange(M) * Z, Z, lengths_B, new_tokens_B, window)
    wrong_BM = used_BM & ((page_table_BM < 0) | (page_table_BM >= P))
    lengths_fit_B = (lengths_B >= 0) & (lengths_B <= M * Z)
    return lengths_fit_B & (new_tokens_B >= 0) & (new_tokens_B <= N) & ~wrong_BM.any(1)


def query_positions(lengths_B, new_tokens_B, N: int) -> tuple[jax.Array, jax.Array]:
    """Position of each query [B, N], and whether there is one (queries i < n)."""
    i_N = jnp.arange(N, dtype=jnp.int32)
    return (lengths_B - new_tokens_B)[:, None] + i_N, i_N < new_tokens_B[:, None]


def visible(key_positions, positions_BN, exists_BN, window: int | None) -> jax.Array:
    """Which of the keys [S] each query may attend to, bool [B, N, S]."""
    seen = (key_positions <= positions_BN[..., None]) & exists_BN[..., None]
    return seen if window is None else seen & (key_positions > positions_BN[..., None] - window)


def reference(
    q_BNHD, kv_pages_PKZC, *, page_table_BM, lengths_B, new_tokens_B, k_scales_PK, v_scales_PK,
    scale, window, soft_cap,
) -> jax.Array:  # fmt: skip
    """See lemur_kernels.decode_attention.decode_attention; all in f32, memory O(B H N S)."""
    B, N, H, D = q_BNHD.shape
    K, Z = kv_pages_PKZC.shape[1:3]
    M = page_table_BM.shape[1]
    used_BM = pages_in_use(jnp.arange(M) * Z, Z, lengths_B, new_tokens_B, window)
    kv_BMKZC = pages_of_rows(kv_pages_PKZC, page_table_BM, used_BM).astype(jnp.float32)
    k_BMKZD, v_BMKZD = split(kv_BMKZC, D)
    if k_scales_PK is not None:
        k_BMKZD *= pages_of_rows(k_scales_PK, page_table_BM, used_BM)[..., None, None]
        v_BMKZD *= pages_of_rows(v_scales_PK, page_table_BM, used_BM)[..., None, None]
    k_BKSD, v_BKSD = (x.swapaxes(1, 2).reshape(B, K, M * Z, D) for x in (k_BMKZD, v_BMKZD))
    seen_BNS = visible(
        jnp.arange(M * Z), *query_positions(lengths_B, new_tokens_B, N), window=window
    )
    seen_B1NGS = seen_BNS[:, None, :, None]
    v_BKSD = jnp.where(seen_BNS.any(1)[:, None, :, None], v_BKSD, 0)  # 0 * NaN would be NaN
    q_BNKGD = q_BNHD.reshape(B, N, K, H // K, D).astype(jnp.float32)
    scores_BKNGS = jnp.einsum("BNKGD,BKSD->BKNGS", q_BNKGD, k_BKSD) * scale
    if soft_cap is not None:
        scores_BKNGS = soft_cap * jnp.tanh(scores_BKNGS / soft_cap)
    scores_BKNGS = jnp.where(seen_B1NGS, scores_BKNGS, -jnp.inf)
    weights_BKNGS = jax.nn.softmax(scores_BKNGS, axis=-1)
    weights_BKNGS = jnp.where(seen_B1NGS.any(-1, keepdims=True), weights_BKNGS, 0)
    out_BNKGD = jnp.einsum("BKNGS,BKSD->BNKGD", weights_BKNGS, v_BKSD)
    return out_BNKGD.reshape(B, N, H, D).astype(q_BNHD.dtype)
