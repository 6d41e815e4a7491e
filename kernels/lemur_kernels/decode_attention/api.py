"""The public decode attention function: checks, then the implementation that the caller names.

Axis key: B rows (serving slots), N new query tokens of a row, H heads, K kv heads, G = H / K,
D head dim, P pages in the cache, M pages in a row's table, Z tokens in a page, C lanes of a page
(keys and values side by side, see pages.py).
"""

import jax
import jax.numpy as jnp

from lemur_kernels import arguments
from lemur_kernels.decode_attention.gathered import gathered
from lemur_kernels.decode_attention.pages import page_shape
from lemur_kernels.decode_attention.pallas_tpu import pallas_tpu
from lemur_kernels.decode_attention.reference import legal_rows, reference
from lemur_kernels.differentiation import no_derivative
from lemur_kernels.varying import varying_alike

IMPLEMENTATIONS = ("reference", "gathered", "pallas_tpu")


def decode_attention(
    q_BNHD: jax.Array,
    kv_pages_PKZC: jax.Array,
    *,
    page_table_BM: jax.Array,
    lengths_B: jax.Array,
    new_tokens_B: jax.Array | None = None,
    k_scales_PK: jax.Array | None = None,
    v_scales_PK: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: str,
    interpret=False,
) -> jax.Array:
    """Causal attention of each row's newest tokens over that row's pages; softmax in f32.

    Row b has lengths_B[b] tokens in the cache, the n = new_tokens_B[b] newest of which are the
    queries: query i sits at position lengths_B[b] - n + i and sees the keys at positions <= its
    own, and with a window only the newest `window` of those. Position s of row b is token s % Z
    of page page_table_BM[b, s // Z]. Query head h reads kv head h // G; repeated k and v never
    exist. Rows with length 0 (free slots), queries i >= n and queries before the row's start
    give 0. One decoding step is N = 1; speculative verification and chunked prefill are N > 1.

    Args:
      q_BNHD: queries, f32 or bf16; left-aligned: row b uses the first new_tokens_B[b].
      kv_pages_PKZC: the cache, shaped [P, *page_shape(K, Z, D)] and written with `join`; q's
        dtype or int8. It already holds the new tokens. What lies in a page beyond the row's
        length never matters, not even NaN.
      page_table_BM: int32 page ids in 0..P-1. In use are the pages that some query of the row
        sees: the first ceil(lengths_B / Z) entries, with a window only the last of those, and
        none in a row with new_tokens_B = 0. The others, their ids, pages and scales, may be
        anything.
      lengths_B: int32 tokens of each row, the new ones included; at most M * Z. 0: free slot.
      new_tokens_B: int32 queries of each row, at most N; N in every row when None.
        A row with a length, a count or a page id in use that is out of range gives NaN (and
        under pltpu.InterpretParams such a page id is an IndexError); no value is clamped into
        range silently.
      k_scales_PK, v_scales_PK: f32, with int8 pages only: value = int8 * scale.
      scale: factor on the scores; 1 / sqrt(D) when None.
      window: sliding window in tokens, the query's own included; None, or M * Z and more: all.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap); None: off.
      implementation: "reference" (the definition), "gathered" (plain XLA, any backend, memory
        O(B N H) per block of keys, time of the longest row for every row) or "pallas_tpu"
        (bytes read = the pages in sight, once).
      interpret: pallas_call's argument of that name, to run "pallas_tpu" on a CPU.

    Returns:
      out_BNHD in q's dtype. Not differentiable.

    Raises:
      ValueError: unknown implementation, shapes, dtypes or numbers that do not fit, with the fix.
      NotImplementedError: it is differentiated.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; legal: {IMPLEMENTATIONS}")
    _check_cache(q_BNHD, kv_pages_PKZC, k_scales_PK, v_scales_PK)
    B, N, _, D = q_BNHD.shape
    if new_tokens_B is None:
        new_tokens_B = jnp.full((B,), N, jnp.int32)
    arguments.array("page_table_BM", page_table_BM, "BM", ("int32",))
    M = page_table_BM.shape[1]
    rows = (("page_table_BM", page_table_BM, (B, M)), ("lengths_B", lengths_B, (B,)),
            ("new_tokens_B", new_tokens_B, (B,)))  # fmt: skip
    for name, x, shape in rows:
        arguments.integers(name, x, shape, "int32")
    if window is not None:
        window = arguments.integer("window", window, 1, fix="or None for no window")
        if window >= M * kv_pages_PKZC.shape[2]:  # all that a page table holds
            window = None  # position - window would underflow int32 near 2^31
    if soft_cap is not None:
        soft_cap = arguments.number("soft_cap", soft_cap, above=0, fix="or None for no cap")
    scale = D**-0.5 if scale is None else arguments.number("scale", scale)
    if interpret and implementation != "pallas_tpu":
        raise ValueError(f"interpret is for 'pallas_tpu', implementation={implementation!r}")
    q_BNHD, kv_pages_PKZC, k_scales_PK, v_scales_PK = no_derivative(
        "decode_attention is not differentiable in any implementation: use "
        "lemur_kernels.attention.attention where gradients are needed, or stop_gradient the inputs",
        q_BNHD,
        kv_pages_PKZC,
        k_scales_PK,
        v_scales_PK,
    )
    # Inside shard_map the output varies over every mesh axis that an input varies over.
    q_BNHD, *_ = varying_alike(
        q_BNHD, kv_pages_PKZC[0, 0, 0], page_table_BM[0], lengths_B, new_tokens_B
    )
    given = dict(
        page_table_BM=page_table_BM,
        lengths_B=lengths_B,
        new_tokens_B=new_tokens_B,
        k_scales_PK=k_scales_PK,
        v_scales_PK=v_scales_PK,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    if implementation == "pallas_tpu":
        out_BNHD = pallas_tpu(q_BNHD, kv_pages_PKZC, **given, interpret=interpret)
    elif implementation == "gathered":
        out_BNHD = gathered(q_BNHD, kv_pages_PKZC, **given)
    else:
        out_BNHD = reference(q_BNHD, kv_pages_PKZC, **given)
    P, _, Z, _ = kv_pages_PKZC.shape
    legal_B = legal_rows(page_table_BM, lengths_B, new_tokens_B, N, P, Z, window)
    return jnp.where(legal_B[:, None, None, None], out_BNHD, jnp.nan)


def _check_cache(q_BNHD, kv_pages_PKZC, k_scales_PK, v_scales_PK) -> None:
    arguments.array("q_BNHD", q_BNHD, "BNHD", ("float32", "bfloat16"))
    arguments.array("kv_pages_PKZC", kv_pages_PKZC, "PKZC", ("float32", "bfloat16", "int8"))
    if kv_pages_PKZC.dtype not in (q_BNHD.dtype, jnp.int8):
        raise ValueError(
            f"kv_pages are {kv_pages_PKZC.dtype}, q is {q_BNHD.dtype}; pages must have q's dtype "
            "or int8"
        )
    H, D = q_BNHD.shape[2:]
    P, K, Z, _ = kv_pages_PKZC.shape
    expected = page_shape(K, Z, D)
    if kv_pages_PKZC.shape[1:] != expected:
        raise ValueError(
            f"kv_pages have pages {list(kv_pages_PKZC.shape[1:])}; for head_dim={D} pass "
            f"{list(expected)} (page_shape), written with `join`"
        )
    if H % K:
        raise ValueError(f"heads={H} must be a multiple of kv_heads={K}")
    quantized = kv_pages_PKZC.dtype == jnp.int8
    for name, x in (("k_scales_PK", k_scales_PK), ("v_scales_PK", v_scales_PK)):
        if (x is not None) != quantized:
            raise ValueError(
                f"{name} is {'given' if x is not None else 'missing'} with "
                f"{kv_pages_PKZC.dtype} pages; pass scales with int8 pages and only with them"
            )
        if x is not None and (x.shape != (P, K) or x.dtype != jnp.float32):
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}; pass float32 {[P, K]}")
