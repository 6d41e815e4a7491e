"""Attention by cuDNN's fused kernel, through jax.nn.dot_product_attention. NVIDIA GPUs only.

Through the public JAX function cuDNN takes a causal flag, one length per row, or a mask; packed
documents fit neither of the first two, so segments go in as a mask [B, 1, T, S], one for all
heads. JAX turns it into a 16-bit bias: 2 B T S bytes, the only quadratic memory. `packed` adds
the causal flag, which lets the kernel skip the blocks above the diagonal.

What it supports (jax 0.10, jax/_src/cudnn/fused_attention_stablehlo.py, check_is_flash_attention):
f16 and bf16; head_dim a multiple of 8, at most 128, 256 from Hopper on; even T and S.
"""

import jax
import jax.numpy as jnp

MAX_HEAD_DIM = 256


def cudnn(q_BTHD, k_BSKD, v_BSKD, visible_BTS, *, packed: bool, scale: float) -> jax.Array:
    """See lemur_kernels.attention.attention.

    Raises:
      ValueError: the backend, a dtype or a shape that the kernel does not take.
    """
    _check(q_BTHD, k_BSKD, v_BSKD)
    out_BTHD = jax.nn.dot_product_attention(
        q_BTHD,
        k_BSKD,
        v_BSKD,
        mask=visible_BTS[:, None],
        scale=scale,
        is_causal=packed,
        implementation="cudnn",
    )
    # The mask is a large negative bias, under which an empty row becomes an average of v.
    empty_BT = ~visible_BTS.any(-1)
    return jnp.where(empty_BT[:, :, None, None], 0, out_BTHD)


def _check(q_BTHD, k_BSKD, v_BSKD) -> None:
    backend = jax.default_backend()
    if backend not in ("gpu", "cuda"):
        raise ValueError(
            f"attention implementation='cudnn' needs an NVIDIA GPU, the backend is {backend!r}; "
            "use implementation='chunked'"
        )
    for name, x in (("q", q_BTHD), ("k", k_BSKD), ("v", v_BSKD)):
        if x.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"attention implementation='cudnn' takes bfloat16 or float16, {name} is {x.dtype}; "
                "cast it or use implementation='chunked'"
            )
    D = q_BTHD.shape[-1]
    if D % 8 or D > MAX_HEAD_DIM:
        raise ValueError(
            f"attention implementation='cudnn' takes head_dim a multiple of 8 up to "
            f"{MAX_HEAD_DIM}, got {D}; use implementation='chunked'"
        )
    for name, length in (("T", q_BTHD.shape[1]), ("S", k_BSKD.shape[1])):
        if length % 2:
            raise ValueError(
                f"attention implementation='cudnn' takes even lengths, {name}={length}; "
                "pad it with segment 0 or use implementation='chunked'"
            )
