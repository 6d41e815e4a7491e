"""One layer of the decoder, and the product that its weights take part in.

Dimension key: B batch, T length, E embed, H heads, K kv heads, D head dim, F mlp; N = B*T tokens,
I and O a weight's input and output features.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from lemur_kernels.attention import api as attention_api

from lemur_jax.config import ACTIVATION_NAMES, ModelConfig
from lemur_jax.model import param, rope
from lemur_jax.model.param import weight
from lemur_jax.sharding import constrain

ACTIVATION = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

# What config.ACTIVATION_NAMES mean to jax.checkpoint: a name of its own, but for what the attention
# kernel's backward pass reads.
CHECKPOINT_NAMES = {name: (name,) for name in ACTIVATION_NAMES} | {
    "attention": attention_api.SAVED_NAMES
}


def rms_norm(x_BTE: jax.Array, scale_E: jax.Array, eps: float) -> jax.Array:
    """RMSNorm (arXiv:1910.07467), float32 inside, dtype kept."""
    x = x_BTE.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * scale_E.astype(jnp.float32)).astype(x_BTE.dtype)


@jax.custom_vjp
def dense(x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """x times w: [B,T,O]. Its own gradient: XLA's CPU compiler is bad at autodiff's.

    There dW is written as (dy^T x)^T, and dy's producer (the derivative of silu, say) is fused into
    a transposing, scalar copy: 28 % of a training step. Here dW = x^T dy, and on CPU a barrier ends
    the fusion. Measured on CPU, 12.6 M parameters: 1.37x the speed of the step.
    """
    y_NO = jax.lax.dot_general(_rows(x_BTI), w_IO, (((1,), (0,)), ((), ())))
    return y_NO.reshape(*x_BTI.shape[:2], -1)


def _rows(x_BTI: jax.Array) -> jax.Array:
    return x_BTI.reshape(-1, x_BTI.shape[-1])


def _dense_forward(x, w):
    return dense(x, w), (x, w)


def _dense_backward(saved, dy):
    x, w = saved
    # Chosen when lowering, so that compiling ahead of time for a TPU is not affected.
    x, dy = jax.lax.platform_dependent(
        x, dy, cpu=lambda *pair: jax.lax.optimization_barrier(pair), default=lambda *pair: pair
    )
    dx = jax.lax.dot_general(_rows(dy), w, (((1,), (1,)), ((), ())))
    dw = jax.lax.dot_general(_rows(x), _rows(dy), (((0,), (0,)), ((), ())))
    return dx.reshape(x.shape), dw


dense.defvjp(_dense_forward, _dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(gate, up, activation):
    return _gated_forward(gate, up, activation)[0]


def _gated_forward(gate, up, activation):
    import os
    v = os.environ["GATED"]
    if "f" in v:
        gate, up = jax.lax.optimization_barrier((gate, up))
    y = ACTIVATION[activation](gate) * up
    if "y" in v:
        y = jax.lax.optimization_barrier(y)
    return y, (gate, up)


def _gated_backward(activation, saved, dy):
    import os
    v = os.environ["GATED"]
    gate, up = saved
    if "b" in v:
        dy = jax.lax.optimization_barrier(dy)
    _, pull = jax.vjp(lambda g, u: ACTIVATION[activation](g) * u, gate, up)
    d = pull(dy)
    return jax.lax.optimization_barrier(d) if "o" in v else d


gated.defvjp(_gated_forward, _gated_backward)


class Block(nnx.Module):
    """One layer. Biases exist only where the config has them."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        c = config
        keys = iter(jax.random.split(key, 7))

        def matrix(shape, axes):
            return weight(next(keys), shape, axes, c.param_dtype, c.initializer_range)

        def zeros(shape, axes):
            return weight(None, shape, axes, c.param_dtype)

        e, h, k, d, f = c.embed, c.heads, c.kv_heads, c.head_dim, c.mlp
        self.config = c
        self.attention_norm = weight(None, (e,), ("norm",), c.param_dtype)
        self.wq = matrix((e, h, d), ("embed", "heads", "head_dim"))
        self.wk = matrix((e, k, d), ("embed", "kv_heads", "head_dim"))
        self.wv = matrix((e, k, d), ("embed", "kv_heads", "head_dim"))
        self.wo = matrix((h, d, e), ("heads", "head_dim", "embed"))
        if c.attention_bias:
            self.bq = zeros((h, d), ("heads", "head_dim"))
            self.bk = zeros((k, d), ("kv_heads", "head_dim"))
            self.bv = zeros((k, d), ("kv_heads", "head_dim"))
            self.bo = zeros((e,), ("embed",))
        self.mlp_norm = weight(None, (e,), ("norm",), c.param_dtype)
        self.w_gate = matrix((e, f), ("embed", "mlp"))
        self.w_up = matrix((e, f), ("embed", "mlp"))
        self.w_down = matrix((f, e), ("mlp", "embed"))
        if c.mlp_bias:
            self.b_gate = zeros((f,), ("mlp",))
            self.b_up = zeros((f,), ("mlp",))
            self.b_down = zeros((e,), ("embed",))

    def _linear(self, x: jax.Array, w: str, b: str, inputs: int = 1) -> jax.Array:
        """The last `inputs` dimensions of x times a weight in the compute dtype, plus its bias if
        the model has one: [B,T] and the weight's other dimensions."""
        dtype = self.config.dtype
        weight = param.whole(getattr(self, w), dtype)
        size = math.prod(weight.shape[:inputs])
        y = dense(x.reshape(*x.shape[:2], size), weight.reshape(size, -1))
        y = y.reshape(*x.shape[:2], *weight.shape[inputs:])
        if hasattr(self, b):
            y = y + param.whole(getattr(self, b), dtype)
        return y

    def qkv(self, x_BTE, cos_BTd, sin_BTd):
        """Rotated queries and keys, and values: [B,T,H,D], [B,T,K,D], [B,T,K,D]."""
        x = rms_norm(x_BTE, self.attention_norm[...], self.config.norm_eps)
        q = self._linear(x, "wq", "bq")
        k = self._linear(x, "wk", "bk")
        v = self._linear(x, "wv", "bv")
        q, k = rope.rotate(q, cos_BTd, sin_BTd), rope.rotate(k, cos_BTd, sin_BTd)
        q = constrain(q, "batch", "length", "act_heads", None)
        return tuple(checkpoint_name(y, "qkv") for y in (q, k, v))

    def finish(self, x_BTE, attended_BTHD):
        """Output projection, residuals and MLP: [B,T,E]."""
        x = x_BTE + self._linear(attended_BTHD, "wo", "bo", inputs=2)
        x = constrain(x, "batch", "length", "act_embed")
        x = checkpoint_name(x, "mlp_residual")
        y = rms_norm(x, self.mlp_norm[...], self.config.norm_eps)
        gate = checkpoint_name(self._linear(y, "w_gate", "b_gate"), "gate")
        up = checkpoint_name(self._linear(y, "w_up", "b_up"), "up")
        gate = constrain(gate, "batch", "length", "act_mlp")
        import os
        if os.environ.get("GATED"):
            y = gated(gate, up, self.config.activation)
        else:
            y = ACTIVATION[self.config.activation](gate) * up
        x = x + self._linear(y, "w_down", "b_down")
        return constrain(x, "batch", "length", "act_embed")
