"""cuDNN attention without a GPU: what is lowered for one, and what surrounds the kernel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_float64 import float64, packed_rows, qkv
from jax._src.cudnn import fused_attention_stablehlo as fused
from lemur_kernels.attention import attention, attention_with_lse
from lemur_kernels.attention.mask import Rows, visible_BTS


@pytest.fixture(autouse=True)
def pretend_gpu(monkeypatch):
    """A Hopper GPU with cuDNN 9.10, as far as tracing and lowering ask."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)


def rows_of(positions, segments):
    return Rows(positions, positions, segments, segments)


def ours(q, k, v, positions, segments, **options):
    rows = rows_of(positions, segments)
    return attention_with_lse(q, k, v, **rows._asdict(), implementation="cudnn", **options)


def public(q, k, v, positions, segments, packed, window):
    mask_B1TS = visible_BTS(rows_of(positions, segments), window)[:, None]
    back = None if window is None or not packed else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask_B1TS, is_causal=packed, local_window_size=back, implementation="cudnn"
    )


def kernels_of(fn, packed, window):
    """Name, settings and operand types of each cuDNN call in the forward and backward pass."""
    q, dout = (jax.ShapeDtypeStruct((2, 64, 4, 16), jnp.bfloat16),) * 2
    k = jax.ShapeDtypeStruct((2, 64, 2, 16), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def run(q, k, v, dout, positions, segments):
        def out(q, k, v):
            result = fn(q, k, v, positions, segments, packed=packed, window=window)
            return result[0] if isinstance(result, tuple) else result

        out, pull = jax.vjp(out, q, k, v)
        return out, *pull(dout)

    lowered = jax.jit(run).trace(q, k, k, dout, row, row).lower(lowering_platforms=("cuda",))
    call = r"@(__cudnn\$\w+)\(.*(backend_config = .*), operand_layouts = (.*), result.* : (\(.*) ->"
    return re.findall(call, lowered.as_text())


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("packed", [True, False])
def test_the_kernels_are_those_of_the_public_function(packed, window):
    """Red when: the window is off by one, the causal flag is always set, arrays of different types
    change places, or the backward pass runs the forward kernel again."""
    got, want = (kernels_of(fn, packed, window) for fn in (ours, public))
    assert got == want
    names = ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]
    assert [call[0] for call in got] == names


def kernel_as_documented(q, k, v, mask, scale, mask_type, sliding_window_length, return_residual):
    """Softmax with the mask as a finite bias, so that an empty row is an average of v."""
    bias = fused.combine_bias_and_mask(None, mask, q.dtype).astype(jnp.float32)
    return softmax_with_bias(q, k, v, bias, scale)


def softmax_with_bias(q, k, v, bias, scale):
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(jnp.float32), group, 2) for x in (k, v))
    scores = jnp.einsum("BTHD,BSHD->BHTS", q.astype(jnp.float32), k) * scale + bias
    lse = jax.nn.logsumexp(scores, -1)
    out = jnp.einsum("BHTS,BSHD->BTHD", jnp.exp(scores - lse[..., None]), v)
    return out.astype(q.dtype), lse


def backward_as_documented(scale, *rest):
    *_, (q, k, v, bias, _, _, _, _, _, _, lse, out), dout = rest

    def total(q, k, v):
        group = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x.astype(jnp.float32), group, 2) for x in (k, v))
        scores = jnp.einsum("BTHD,BSHD->BHTS", q.astype(jnp.float32), k) * scale
        p = jnp.exp(scores + bias.astype(jnp.float32) - lse[..., None])
        dp = jnp.einsum("BTHD,BSHD->BHTS", dout.astype(jnp.float32), v)
        delta = jnp.einsum("BTHD,BTHD->BHT", dout.astype(jnp.float32), out.astype(jnp.float32))
        return jnp.sum(p * (dp - delta[..., None]))

    return (*jax.grad(total, (0, 1, 2))(q, k, v), *(None,) * 7)


def test_rows_that_see_nothing_and_the_lse(monkeypatch):
    """Red when: the `empty` guard of out or lse goes, or backward leaves lse = inf to the kernel.
    A model of the kernel stands in for it."""
    monkeypatch.setattr(fused, "dot_product_attention", kernel_as_documented)
    monkeypatch.setattr(fused, "_dot_product_attention_bwd_rule", backward_as_documented)
    q, k, v, dout = qkv(T=20, dtype=jnp.bfloat16)
    rows = packed_rows([6, 9], [], T=20)
    up = [x.astype(jnp.float32) for x in (q, k, v, dout)]
    want = float64(*up, rows_of(*rows), window=4)
    (out, lse), pull = jax.vjp(lambda *x: ours(*x, *rows, packed=True, window=4), q, k, v)
    gradients = pull((dout, jnp.zeros_like(lse)))
    np.testing.assert_allclose(lse, want.lse, rtol=1e-5)
    for name, a, b in zip(("out", "dq", "dk", "dv"), (out, *gradients), want[:1] + want[2:]):
        a = a.astype(np.float32)
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-2, name
        assert not np.any(a[0, 15:]) and not np.any(a[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"soft_cap": 30.0}, "no soft cap, soft_cap=30.0; use implementation='chunked'"),
        ({"dtype": jnp.float32}, "takes bfloat16 or float16, q is float32"),
        ({"D": 12}, "head_dim a multiple of 8 up to 256, got 12"),
        ({"T": 7}, "even lengths, T=7; pad it with segment 0"),
    ],
)
def test_errors_name_the_value_and_the_fix(change, message):
    """Red when: a check is removed from cudnn._check."""
    T = change.get("T", 8)
    q, k, v, _ = qkv(T=T, D=change.get("D", 8), dtype=change.get("dtype", jnp.bfloat16))
    rows = rows_of(*packed_rows([T], [T], T=T))._asdict()
    with pytest.raises(ValueError, match=message):
        attention(
            q, k, v, **rows, packed=True, implementation="cudnn", soft_cap=change.get("soft_cap")
        )
