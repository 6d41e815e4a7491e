"""Attention by cuDNN's fused kernel, through JAX's binding of it. NVIDIA GPUs only.

cuDNN takes a causal flag, one length per row, a window, or a bias; packed documents fit none of
the first three, so the mask goes in as a bias [B, 1, T, S] in q's dtype, one for all heads:
2 B T S bytes, the only quadratic memory. `packed` adds the causal flag and the window, by which
the kernel skips blocks above the diagonal and before the window.

The public jax.nn.dot_product_attention rounds the log-sum-exp to q's dtype (8 bits) and hides the
backward kernel, so this file calls the module beneath it (jax 0.10.2 and 0.11.2 agree on both
functions; tests/kernels/test_attention_cudnn.py compares what is lowered with the public one).

What it supports (check_is_flash_attention there): f16 and bf16; head_dim a multiple of 8, at most
128, 256 from Hopper on; even T and S. No soft cap.
"""

import jax
import jax.numpy as jnp

from lemur_kernels.attention.mask import Options, Rows, visible_BTS

MAX_HEAD_DIM = 256


def forward(q_BTHD, k_BSKD, v_BSKD, rows: Rows, options: Options) -> tuple[jax.Array, jax.Array]:
    """See api.py.

    Raises:
      ValueError: the backend, a dtype, a shape or an option that the kernel does not take.
    """
    _check(q_BTHD, k_BSKD, v_BSKD, options)
    from jax._src.cudnn import fused_attention_stablehlo as fused

    visible = visible_BTS(rows, options.window)
    out_BTHD, lse_BHT = fused.dot_product_attention(
        q_BTHD,
        k_BSKD,
        v_BSKD,
        mask=visible[:, None],
        scale=options.scale,
        mask_type=_mask_type(fused, options),
        sliding_window_length=options.window if options.packed else None,
        return_residual=True,
    )
    # The mask is a large negative bias, under which an empty row becomes an average of v.
    empty_BT = ~visible.any(-1)
    out_BTHD = jnp.where(empty_BT[:, :, None, None], 0, out_BTHD)
    return out_BTHD, jnp.where(empty_BT[:, None], jnp.inf, lse_BHT)


def backward(
    q_BTHD, k_BSKD, v_BSKD, rows: Rows, options: Options, out_BTHD, lse_BHT, dout_BTHD
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See api.py."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    bias_B1TS = fused.combine_bias_and_mask(
        None, visible_BTS(rows, options.window)[:, None], q_BTHD.dtype
    )
    unused = jnp.zeros(0, q_BTHD.dtype)
    # What the kernel does with lse = +inf is undocumented; a zero dout makes a row's gradients 0.
    empty_BHT = lse_BHT == jnp.inf
    lse_BHT = jnp.where(empty_BHT, 0, lse_BHT)
    dout_BTHD = jnp.where(empty_BHT.swapaxes(1, 2)[..., None], 0, dout_BTHD)
    arrays = (q_BTHD, k_BSKD, v_BSKD, bias_B1TS, *(unused,) * 6, lse_BHT, out_BTHD)
    gradients = fused._dot_product_attention_bwd_rule(
        options.scale,
        42,  # seed of the dropout that there is not, as fused.dot_product_attention
        0.0,
        (True, False),  # has a bias, does not want its gradient
        _mask_type(fused, options),
        fused.AttentionLayout.BTNH.value,
        options.window if options.packed else None,
        True,
        False,
        arrays,
        dout_BTHD,
    )
    return gradients[:3]


def _mask_type(fused, options: Options):
    return fused.MaskType.CAUSAL if options.packed else fused.MaskType.NO_MASK


def _check(q_BTHD, k_BSKD, v_BSKD, options: Options) -> None:
    backend = jax.default_backend()
    if backend not in ("gpu", "cuda"):
        raise ValueError(
            f"attention implementation='cudnn' needs an NVIDIA GPU, the backend is {backend!r}; "
            "use implementation='chunked'"
        )
    if options.soft_cap is not None:
        raise ValueError(
            f"attention implementation='cudnn' has no soft cap, soft_cap={options.soft_cap}; "
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
