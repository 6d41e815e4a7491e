"""What a page of the KV cache looks like in memory.

A page holds the keys and values of Z consecutive tokens of one row, for all K kv heads of this
device, in one contiguous piece [K, Z, C]: one copy fetches it. Keys and values share the lanes
(the last axis, C): TPU memory stores it in units of 128, so two arrays of head_dim 64 would be
half empty. Values begin at lane `value_lane(D)`:

    head_dim     C     keys      values     of C used
    64           128   0..63     64..127    100 %      (smaller ones likewise, padded)
    80           256   0..79     128..207   63 %
    96           256   0..95     128..223   75 %
    128          256   0..127    128..255   100 %
    256          512   0..255    256..511   100 %

Unused lanes must hold finite numbers; `join` writes zeros.

Axis key: P pages, K kv heads, Z tokens in a page, C lanes, D head dim.
"""

import jax
import jax.numpy as jnp

from lemur_kernels import arguments

LANES = 128
MAX_HEAD_DIM = 256
PAGE_TOKENS = [16, 32, 64, 128, 256]


def value_lane(head_dim: int) -> int:
    """First lane of the values; also the width of the keys' part."""
    return LANES // 2 if head_dim <= LANES // 2 else -(-head_dim // LANES) * LANES


def page_shape(kv_heads: int, page_tokens: int, head_dim: int) -> tuple[int, int, int]:
    """Shape (K, Z, C) of one page; a cache is [P, K, Z, C], f32, bf16 or int8.

    Under tensor parallelism shard K and pass the heads of one device to decode_attention.

    Raises:
      ValueError: a head_dim or page size that no implementation supports.
    """
    head_dim = _head_dim(head_dim)
    fix = f"and one of {PAGE_TOKENS}"
    page_tokens = arguments.integer("page_tokens", page_tokens, 1, fix=fix)
    if page_tokens not in PAGE_TOKENS:
        nearest = min(PAGE_TOKENS, key=lambda size: abs(size - page_tokens))
        raise ValueError(
            f"page_tokens={page_tokens} must be one of {PAGE_TOKENS}; nearest: {nearest}"
        )
    kv_heads = arguments.integer("kv_heads", kv_heads, 1)
    return kv_heads, page_tokens, 2 * value_lane(head_dim)


def join(k_D: jax.Array, v_D: jax.Array) -> jax.Array:
    """Keys and values [..., D] side by side as the cache stores them, [..., C].

    Raises:
      ValueError: keys and values of two shapes or dtypes, or a head_dim that no page holds.
    """
    if k_D.shape != v_D.shape or k_D.dtype != v_D.dtype:
        raise ValueError(
            f"k_D is {k_D.dtype}{list(k_D.shape)}, v_D is {v_D.dtype}{list(v_D.shape)}; join takes "
            "keys and values of one shape [..., head_dim] and one dtype"
        )
    if not k_D.shape or not 1 <= k_D.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"k_D {list(k_D.shape)}: head_dim, the last axis, is 1..{MAX_HEAD_DIM}")
    width = value_lane(k_D.shape[-1])
    pad = [(0, 0)] * (k_D.ndim - 1) + [(0, width - k_D.shape[-1])]
    return jnp.concatenate([jnp.pad(k_D, pad), jnp.pad(v_D, pad)], -1)


def split(kv_C: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of `join`: keys [..., D] and values [..., D].

    Raises:
      ValueError: a head_dim that no page holds, or another than the one that kv_C was joined from.
    """
    _check_lanes("kv_C", kv_C, head_dim)
    first = value_lane(head_dim)
    return kv_C[..., :head_dim], kv_C[..., first : first + head_dim]


def quantize(kv_PKZC: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whole pages to int8 with one f32 scale per page, head and part (keys, values).

    Returns (kv_pages_PKZC int8, k_scales_PK, v_scales_PK); value = int8 * scale, the largest
    magnitude of a part becomes 127. A part of zeros gets scale 0. A part with a NaN or an inf gets
    that for its scale and reads as NaN, all of it: quantize pages whose every slot is finite, as
    `join` into zeros leaves them.

    Raises:
      ValueError: pages that are int8 already or no pages, or a head_dim that is not theirs.
    """
    arguments.array("kv_PKZC", kv_PKZC, "PKZC", ("float32", "bfloat16"))
    _check_lanes("kv_PKZC", kv_PKZC, head_dim)
    scales_PK, parts = [], []
    for part_PKZD in split(kv_PKZC.astype(jnp.float32), head_dim):
        scale_PK = jnp.abs(part_PKZD).max((-1, -2)) / 127
        divisor_PK11 = jnp.where(scale_PK == 0, 1, scale_PK)[..., None, None]
        parts.append(jnp.round(part_PKZD / divisor_PK11).astype(jnp.int8))
        scales_PK.append(scale_PK)
    return join(*parts), scales_PK[0], scales_PK[1]


def _head_dim(value) -> int:
    return arguments.integer("head_dim", value, 1, MAX_HEAD_DIM, fix="and an integer")


def _check_lanes(name: str, kv_C, head_dim) -> None:
    lanes = 2 * value_lane(_head_dim(head_dim))
    if kv_C.shape[-1:] != (lanes,):
        raise ValueError(
            f"{name} is {list(kv_C.shape)}, with head_dim={head_dim} the last axis has {lanes} "
            "lanes (page_shape); pass the head_dim of the keys and values given to `join`"
        )
