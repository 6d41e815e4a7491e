"""The public attention functions: checks, then the implementation that the caller names.

An implementation is a module with two plain functions; the one custom gradient is here:

    forward(q_BTHD, k_BSKD, v_BSKD, rows, options) -> out_BTHD, lse_BHT
    backward(q_BTHD, k_BSKD, v_BSKD, rows, options, out_BTHD, lse_BHT, dout_BTHD) -> dq, dk, dv

lse is the f32 natural log of the sum of a row's exp(score), +inf where no key is visible, so that
exp(score - lse) is always the probability. `backward` must compute the probabilities from the lse
that it is given and not from its own softmax: a ring (ring.py) passes out and lse of all keys with
the keys of one device.

Axis key: B batch, T query length, S key length, H heads, K kv heads, G = H / K, D head dim.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lemur_kernels import arguments
from lemur_kernels.attention import chunked, cudnn, reference
from lemur_kernels.attention.mask import Options, Rows
from lemur_kernels.differentiation import no_derivative
from lemur_kernels.varying import refuse_varying, varying_alike

IMPLEMENTATIONS = ("reference", "chunked", "cudnn", "pallas_gpu", "pallas_tpu")
# What the backward pass reads besides q, k and v. A jax.checkpoint policy that saves both names
# spares the recomputation of the forward kernel; one alone spares nothing.
SAVED_NAMES = ("attention_kernel_out", "attention_kernel_lse")
DTYPES = ("float32", "bfloat16", "float16")


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
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: str,
) -> jax.Array:
    """Softmax attention under one mask rule, grouped kv heads, softmax in f32.

    Key j is visible to query i iff both have the same non-zero segment and
    kv_positions[j] <= q_positions[i]; with a window also q_positions[i] - kv_positions[j] < window.
    A query with no visible key gives 0 and gradient 0.
    Query head h reads kv head h // G (GQA, arXiv:2305.13245); repeated k and v never exist.

    Args:
      q_BTHD: queries, f32, bf16 or (not "pallas_tpu") f16; "cudnn" takes 16 bits only.
      k_BSKD, v_BSKD: keys and values, the queries' dtype; K divides H.
      q_positions_BT, kv_positions_BS: place of each token in its document, integers from 0, int32
        or narrower.
      q_segments_BT, kv_segments_BS: document of each token, int32 or narrower; 0 is padding or a
        free slot, and -2^31 is reserved.
      packed: the caller's promise that T == S, queries and keys are the same tokens, documents
        are contiguous and positions grow by one inside each (training, prefill), so nothing
        visible lies above the diagonal. False makes no promise (decoding against a cache).
      scale: factor on the scores; 1 / sqrt(D) when None.
      window: a query sees itself and the window - 1 positions before it (sliding window,
        arXiv:2310.06825); None sees the whole document.
      soft_cap: scaled scores become soft_cap * tanh(score / soft_cap) (Gemma 2, arXiv:2408.00118);
        None leaves them.
      implementation: "reference" (the definition, memory O(T S)), "chunked" (plain XLA, memory
        O(T + S) in both passes), "cudnn" (NVIDIA GPUs, 16-bit, no soft_cap), "pallas_gpu" (NVIDIA
        GPUs, skips blocks by segment) or "pallas_tpu".

    Returns:
      out_BTHD in q's dtype. Differentiable once with respect to q, k and v, in reverse mode.

    Raises:
      ValueError: unknown implementation, or shapes, dtypes, options or a backend that do not fit
        it, with the fix.
      NotImplementedError: the gradient is differentiated again.
    """
    return attention_with_lse(
        q_BTHD,
        k_BSKD,
        v_BSKD,
        q_positions_BT=q_positions_BT,
        kv_positions_BS=kv_positions_BS,
        q_segments_BT=q_segments_BT,
        kv_segments_BS=kv_segments_BS,
        packed=packed,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        implementation=implementation,
    )[0]


def attention_with_lse(
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
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: str,
) -> tuple[jax.Array, jax.Array]:
    """`attention`, and the log-sum-exp of each row's scores.

    Returns:
      out_BTHD as `attention`; lse_BHT, f32, natural log, of scaled and capped scores, +inf where no
      key is visible. Gradients flow through out only: lse is a constant (stop_gradient).

    Raises:
      ValueError: as `attention`.
    """
    rows = Rows(q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS)
    call = prepared(q_BTHD, k_BSKD, v_BSKD, rows, packed, scale, window, soft_cap, implementation)
    out_BTHD, lse_BHT = _attend(*call, implementation)
    return out_BTHD, jax.lax.stop_gradient(lse_BHT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BTHD, k_BSKD, v_BSKD, rows, options, implementation):
    return implementation_named(implementation).forward(q_BTHD, k_BSKD, v_BSKD, rows, options)


def _attend_forward(q_BTHD, k_BSKD, v_BSKD, rows, options, implementation):
    out_BTHD, lse_BHT = _attend(q_BTHD, k_BSKD, v_BSKD, rows, options, implementation)
    out_BTHD, lse_BHT = saved(out_BTHD, lse_BHT)
    return (out_BTHD, lse_BHT), (q_BTHD, k_BSKD, v_BSKD, rows, out_BTHD, lse_BHT)


def _attend_backward(options, implementation, residuals, cotangents):
    dout_BTHD, _ = cotangents  # lse leaves through stop_gradient
    residuals, dout_BTHD = differentiable_once(residuals, dout_BTHD)
    q_BTHD, k_BSKD, v_BSKD, rows, out_BTHD, lse_BHT = residuals
    return *implementation_named(implementation).backward(
        q_BTHD, k_BSKD, v_BSKD, rows, options, out_BTHD, lse_BHT, dout_BTHD
    ), None


_attend.defvjp(_attend_forward, _attend_backward)


def saved(out_BTHD, lse_BHT):
    """What the forward kernel gives the backward pass, under SAVED_NAMES."""
    return checkpoint_name(out_BTHD, SAVED_NAMES[0]), checkpoint_name(lse_BHT, SAVED_NAMES[1])


def differentiable_once(*inputs):
    """The inputs of a backward pass: differentiating it raises, where it would be wrong (lse's
    cotangent is dropped)."""
    return no_derivative(
        "attention is differentiable once: its gradient was differentiated again (grad of grad, "
        "hessian, jvp of grad). No implementation has a second derivative: write the softmax out "
        "in jax.numpy for one, or stop_gradient what need not be differentiated",
        *inputs,
    )


def implementation_named(name: str) -> ModuleType:
    """The module with `forward` and `backward`.

    Raises:
      ValueError: there is none of this name.
    """
    if name == "pallas_tpu":  # imported only when named: Pallas is slow to import
        from lemur_kernels.attention import pallas_tpu

        return pallas_tpu
    if name == "pallas_gpu":
        from lemur_kernels.attention import pallas_gpu

        return pallas_gpu
    modules = {"reference": reference, "chunked": chunked, "cudnn": cudnn}
    if name not in modules:
        raise ValueError(f"implementation={name!r} is unknown; legal: {IMPLEMENTATIONS}")
    return modules[name]


def prepared(
    q_BTHD, k_BSKD, v_BSKD, rows: Rows, packed: bool, scale, window, soft_cap, implementation: str
):
    """The checked arguments of a call as every form takes them: q, k, v, Rows of int32, Options.

    Raises:
      ValueError: as `attention`.
    """
    options = checked(q_BTHD, k_BSKD, v_BSKD, rows, packed, scale, window, soft_cap)
    implementation_named(implementation)
    if implementation.startswith("pallas"):
        refuse_varying(implementation, q_BTHD, k_BSKD, v_BSKD, *rows)
    q_BTHD, k_BSKD, v_BSKD, *rows = varying_alike(
        q_BTHD, k_BSKD, v_BSKD, *(x.astype(jnp.int32) for x in rows)
    )
    return q_BTHD, k_BSKD, v_BSKD, Rows(*rows), options


def checked(q_BTHD, k_BSKD, v_BSKD, rows: Rows, packed: bool, scale, window, soft_cap) -> Options:
    """The static options of a call, after every check that all implementations share.

    Raises:
      ValueError: names the argument, its value and the fix.
    """
    for name, x in (("q_BTHD", q_BTHD), ("k_BSKD", k_BSKD), ("v_BSKD", v_BSKD)):
        arguments.array(name, x, name[2:], DTYPES)
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    if k_BSKD.shape != v_BSKD.shape:
        raise ValueError(f"k {list(k_BSKD.shape)} and v {list(v_BSKD.shape)} must have one shape")
    if (k_BSKD.shape[0], k_BSKD.shape[3]) != (B, D):
        raise ValueError(
            f"q {list(q_BTHD.shape)} and k {list(k_BSKD.shape)} must agree in batch and head_dim"
        )
    if H % K:
        raise ValueError(f"heads={H} must be a multiple of kv_heads={K}")
    if not q_BTHD.dtype == k_BSKD.dtype == v_BSKD.dtype:
        raise ValueError(
            f"q, k, v must share a dtype; got {q_BTHD.dtype}, {k_BSKD.dtype}, {v_BSKD.dtype}"
        )
    if not isinstance(packed, (bool, np.bool_)):
        raise ValueError(f"packed={packed!r} must be True or False")
    if packed and S != T:
        raise ValueError(f"packed=True promises T == S; got T={T}, S={S}: pass packed=False")
    for name, x, shape in zip(Rows._fields, rows, ((B, T), (B, S)) * 2):
        arguments.integers(name, x, shape)
        if jnp.iinfo(x.dtype).max > jnp.iinfo(jnp.int32).max:
            raise ValueError(
                f"{name} is {x.dtype}, which int32 would cut: pass {name}.astype(jnp.int32), with "
                "numbers that it holds"
            )
    if window is not None:
        window = arguments.integer("window", window, 1, fix="or None for no window")
    if soft_cap is not None:
        soft_cap = arguments.number("soft_cap", soft_cap, above=0, fix="or None for no cap")
    scale = D**-0.5 if scale is None else arguments.number("scale", scale)
    return Options(bool(packed), scale, window, soft_cap)
