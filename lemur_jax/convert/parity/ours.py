"""What our model computes, operation by operation, at full precision on the CPU.

`layer` is the model's own path (Block.qkv, self_attention, Block.finish). `compute` runs single
operations on given inputs, so that an error can be told from an error that was handed on.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from lemur_kernels.product import einsum_f32

from lemur_jax.config import ModelConfig
from lemur_jax.model import param, rope
from lemur_jax.model.attention import resolve_implementation, self_attention
from lemur_jax.model.block import ACTIVATION, Block, dense, rms_norm


@contextlib.contextmanager
def exact():
    """Float32 products at full precision, on the CPU whatever else there is."""
    with (
        jax.default_device(jax.local_devices(backend="cpu")[0]),
        jax.default_matmul_precision("highest"),
    ):
        yield


class Ours:
    """Our code at given positions; `load` a layer before computing with it."""

    def __init__(self, config: ModelConfig, positions_BT: np.ndarray):
        config = dataclasses.replace(config, dtype="float32")
        self.config = dataclasses.replace(
            config,
            attention=resolve_implementation(dataclasses.replace(config, attention="auto"), "cpu"),
        )
        self.positions_BT = jnp.asarray(positions_BT, jnp.int32)
        self.segments_BT = jnp.ones_like(self.positions_BT)
        self.cos, self.sin = rope.tables(
            config.rope, config.head_dim, self.positions_BT, self.segments_BT
        )
        self.like = jax.eval_shape(functools.partial(Block, self.config), jax.random.key(0))
        self.block = None

    def load(self, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """Takes the weights of one layer, (name in the block, array of any dtype) pairs."""
        arrays = {name: jnp.asarray(array) for name, array in weights}
        self.block = param.unflatten(self.like, arrays)

    def drop(self) -> None:
        """Lets go of the layer: one is resident at a time."""
        self.block = None

    def layer(self, x_BTE: np.ndarray) -> np.ndarray:
        """The layer as the model runs it; rows of x are this object's rows, once or repeated."""
        times = x_BTE.shape[0] // self.positions_BT.shape[0]
        positions, segments, cos, sin = (
            jnp.concatenate([array] * times)
            for array in (self.positions_BT, self.segments_BT, self.cos, self.sin)
        )
        x = jnp.asarray(x_BTE, jnp.float32)
        q, k, v = self.block.qkv(x, cos, sin)
        attended = self_attention(q, k, v, positions, segments, self.config.attention)
        return np.asarray(self.block.finish(x, attended))

    def compute(self, name: str, inputs: list[np.ndarray]) -> np.ndarray:
        """One operation of `reference.GRAPH`, with the shapes that it has there."""
        values = [jnp.asarray(value, jnp.float32) for value in inputs]
        return np.asarray(getattr(self, "_" + name)(*values))

    def _attention_norm(self, x):
        return rms_norm(x, self.block.attention_norm[...], self.config.norm_eps)

    def _mlp_norm(self, x):
        return rms_norm(x, self.block.mlp_norm[...], self.config.norm_eps)

    def _linear(self, x, w, b, inputs=1):
        weight = getattr(self.block, w)[...].astype(jnp.float32)
        y = dense(x, weight.reshape(x.shape[-1], -1))
        if hasattr(self.block, b):
            y = y + getattr(self.block, b)[...].astype(jnp.float32).reshape(-1)
        return y

    def _heads(self, y):
        return y.reshape(*y.shape[:2], -1, self.config.head_dim)

    def _q(self, x):
        return self._heads(self._linear(x, "wq", "bq"))

    def _k(self, x):
        return self._heads(self._linear(x, "wk", "bk"))

    def _v(self, x):
        return self._heads(self._linear(x, "wv", "bv"))

    def _rope_q(self, q):
        return rope.rotate(q, self.cos, self.sin)

    _rope_k = _rope_q

    def _attended(self, q, k, v):
        attended = self_attention(
            q, k, v, self.positions_BT, self.segments_BT, self.config.attention
        )
        return attended.reshape(*q.shape[:2], -1)

    def _scores(self, q, k):
        """The kernel's own scores [B,H,T,S]: values that are unit vectors come out as weights."""
        length, size = q.shape[1], q.shape[3]
        parts = []
        for start in range(0, length, size):
            unit_SD = jnp.eye(length, size, -start, dtype=jnp.float32)
            v = jnp.broadcast_to(unit_SD[None, :, None, :], k.shape)
            parts.append(self._heads(self._attended(q, k, v)))
        return jnp.concatenate(parts, axis=-1)[..., :length].swapaxes(1, 2)

    def _o(self, x):
        return self._linear(x, "wo", "bo")

    def _middle(self, x, o):
        return x + o

    def _gate(self, x):
        return self._linear(x, "w_gate", "b_gate")

    def _up(self, x):
        return self._linear(x, "w_up", "b_up")

    def _activated(self, gate, up):
        return ACTIVATION[self.config.activation](gate) * up

    def _down(self, x):
        return self._linear(x, "w_down", "b_down")

    def _out(self, middle, down):
        return middle + down

    def final_norm(self, x_BTE: np.ndarray, scale_E: np.ndarray) -> np.ndarray:
        """The norm in front of the head."""
        x = jnp.asarray(x_BTE, jnp.float32)
        return np.asarray(rms_norm(x, jnp.asarray(scale_E), self.config.norm_eps))

    def logits(self, x_BTE: np.ndarray, rows_VE: np.ndarray) -> np.ndarray:
        """Logits of some rows of the vocabulary."""
        head_EV = jnp.asarray(rows_VE).astype(jnp.float32).T
        return np.asarray(einsum_f32("BTE,EV->BTV", jnp.asarray(x_BTE, jnp.float32), head_EV))
