"""The public attention function: checks, then the implementation that the caller names.

Axis key: B batch, T query length, S key length, H heads, K kv heads, G = H / K, D head dim.
"""

import jax
import jax.numpy as jnp

from lemur_kernels.attention.chunked import chunked
from lemur_kernels.attention.cudnn import cudnn
from lemur_kernels.attention.reference import reference, visible_BTS

IMPLEMENTATIONS = ("reference", "chunked", "cudnn")


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    packed: bool,
    scale: float | None = None,
    implementation: str,
) -> jax.Array:
    """Softmax attention under one mask rule, grouped kv heads, softmax in f32.

    Key j is visible to query i iff both have the same non-zero segment and
    kv_positions[j] <= q_positions[i]. A query with no visible key gives 0 and gradient 0.
    Query head h reads kv head h // G (GQA, arXiv:2305.13245); repeated k and v never exist.

    Args:
      q_BTHD: queries, f32 or bf16.
      k_BSKD, v_BSKD: keys and values, the queries' dtype; K divides H.
      q_positions_BT, kv_positions_BS: int32 place of each token in its document.
      q_segments_BT, kv_segments_BS: int32 document of each token; 0 is padding or a free slot.
      packed: the caller's promise that T == S, queries and keys are the same tokens, documents
        are contiguous and positions grow by one inside each (training, prefill), so nothing
        visible lies above the diagonal. False makes no promise (decoding against a cache).
      scale: factor on the scores; 1 / sqrt(D) when None.
      implementation: "reference" (the definition, memory O(T S)), "chunked" (plain XLA, memory
        O(T + S) in both passes) or "cudnn" (NVIDIA GPUs, 16-bit).

    Returns:
      out_BTHD in q's dtype. Differentiable once with respect to q, k and v.

    Raises:
      ValueError: unknown implementation, shapes or dtypes that do not fit, with the fix.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; legal: {IMPLEMENTATIONS}")
    _check(q_BTHD, k_BSKD, v_BSKD, packed)
    B, T, S = q_BTHD.shape[0], q_BTHD.shape[1], k_BSKD.shape[1]
    rows = (q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS)
    names = ("q_positions_BT", "kv_positions_BS", "q_segments_BT", "kv_segments_BS")
    for name, x, shape in zip(names, rows, ((B, T), (B, S)) * 2):
        if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}; pass integers {list(shape)}")
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "chunked":
        return chunked(q_BTHD, k_BSKD, v_BSKD, *rows, packed=packed, scale=scale)
    mask_BTS = visible_BTS(*rows)
    if implementation == "cudnn":
        return cudnn(q_BTHD, k_BSKD, v_BSKD, mask_BTS, packed=packed, scale=scale)
    return reference(q_BTHD, k_BSKD, v_BSKD, mask_BTS, scale)


def _check(q_BTHD, k_BSKD, v_BSKD, packed: bool) -> None:
    if q_BTHD.ndim != 4 or k_BSKD.ndim != 4 or k_BSKD.shape != v_BSKD.shape:
        raise ValueError(
            f"attention takes q [B,T,H,D] and equal k, v [B,S,K,D]; got q {list(q_BTHD.shape)}, "
            f"k {list(k_BSKD.shape)}, v {list(v_BSKD.shape)}"
        )
    B, T, H, D = q_BTHD.shape
    if (k_BSKD.shape[0], k_BSKD.shape[3]) != (B, D):
        raise ValueError(
            f"q {list(q_BTHD.shape)} and k {list(k_BSKD.shape)} must agree in batch and head_dim"
        )
    if H % k_BSKD.shape[2]:
        raise ValueError(f"heads={H} must be a multiple of kv_heads={k_BSKD.shape[2]}")
    if not q_BTHD.dtype == k_BSKD.dtype == v_BSKD.dtype:
        raise ValueError(
            f"q, k, v must share a dtype; got {q_BTHD.dtype}, {k_BSKD.dtype}, {v_BSKD.dtype}"
        )
    if packed and k_BSKD.shape[1] != T:
        raise ValueError(
            f"packed=True promises T == S; got T={T}, S={k_BSKD.shape[1]}: pass packed=False"
        )
