"""A loss over the vocabulary whose forward pass computes the gradients too.

The loss is linear in its cotangent, so the forward pass under differentiation already computes
the gradients with respect to x and w and the backward pass only scales them: three matrix
products in all and no logits kept (as in Liger's fused linear cross-entropy, arXiv:2410.10989,
section 3.2). Chunks run along T and keep the batch axis whole, so a batch that is sharded over
devices stays sharded. How one chunk's logits become losses and gradients is the implementation's.

Axis key: B batch, T length, E embed, V vocab (of this device), C tokens of a row in one chunk,
N chunks.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from lemur_kernels.cross_entropy import shards
from lemur_kernels.cross_entropy.reference import CrossEntropy
from lemur_kernels.product import einsum_f32
from lemur_kernels.varying import varying_alike


class Setting(NamedTuple):
    """What the loss is, apart from its arrays; hashable."""

    z_loss: float
    chunk_tokens: int
    valid_vocab: int
    axis_name: str | tuple[str, ...] | None


class Chunk(NamedTuple):
    """Tokens whose logits exist at one time, and the projection."""

    x_BCE: jax.Array
    w_EV: jax.Array
    targets_BC: jax.Array


class Implementation(Protocol):
    """One way through a chunk; a hashable value, as it is an argument of a custom gradient."""

    def values(self, chunk: Chunk, setting: Setting):
        """(log Z, -log p(target)) of each token, [B,C] f32, over the whole vocabulary."""

    def logits_gradient(self, chunk: Chunk, setting: Setting, token_weights):
        """The same two, and the loss's gradient by logits [B,C,V] in x's dtype.

        token_weights(log_z_BC) gives two [B,C]: the factor of softmax, and what is taken off at
        the target.
        """


def losses(
    implementation: Implementation, x_BTE, w_EV, targets_BT, weights_BT, setting: Setting
) -> CrossEntropy:
    """See lemur_kernels.cross_entropy.cross_entropy."""
    inputs = varying_alike(x_BTE, w_EV, targets_BT, weights_BT)
    loss, z_loss, nll_BT = _losses(implementation, setting, *inputs)
    return CrossEntropy(*shards.sums((loss, z_loss), setting.axis_name), nll_BT)


def _chunks(chunk_tokens: int, *arrays):
    """[B, T, ...] -> [N, B, C, ...]; T is padded with zeros (weight 0) to whole chunks."""
    T = arrays[0].shape[1]
    C = min(chunk_tokens, T)
    N = -(-T // C)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, N * C - T)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], N, C, *x.shape[2:]), 1, 0)

    return [split(x) for x in arrays]


def _unchunk(x, T: int):
    """[N, B, C, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def _sums(nll_BT, log_z_BT, weights_BT, setting: Setting):
    """This device's share of both sums: what JAX's own psum adds up, and differentiates."""
    weights_BT = weights_BT.astype(jnp.float32) / shards.count(setting.axis_name)
    loss = jnp.sum(weights_BT * nll_BT)
    return loss, setting.z_loss * jnp.sum(weights_BT * log_z_BT**2), nll_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(implementation, setting, x_BTE, w_EV, targets_BT, weights_BT):
    """(loss, z_loss, nll_BT), values only: one matrix product per chunk."""

    def body(_, chunk):
        x_BCE, targets_BC = chunk
        return (), implementation.values(Chunk(x_BCE, w_EV, targets_BC), setting)

    _, (log_z_NBC, nll_NBC) = lax.scan(body, (), _chunks(setting.chunk_tokens, x_BTE, targets_BT))
    T = x_BTE.shape[1]
    return _sums(_unchunk(nll_NBC, T), _unchunk(log_z_NBC, T), weights_BT, setting)


def _losses_and_gradients(
    implementation, setting, x_BTE, w_EV, targets_BT, weights_BT, g_loss, g_z
):
    """The values, and (dx, dw) of g_loss * loss + g_z * z_loss; dw accumulates in f32."""

    def body(dw_EV, chunk):
        x_BCE, targets_BC, weights_BC = chunk
        weights_BC = weights_BC.astype(jnp.float32)

        def token_weights(log_z_BC):
            of_p_BC = weights_BC * (g_loss + g_z * 2 * setting.z_loss * log_z_BC)
            return of_p_BC, g_loss * weights_BC

        log_z_BC, nll_BC, dlogits_BCV = implementation.logits_gradient(
            Chunk(x_BCE, w_EV, targets_BC), setting, token_weights
        )
        dx_BCE = einsum_f32("BCV,EV->BCE", dlogits_BCV, w_EV).astype(x_BCE.dtype)
        dw_EV += einsum_f32("BCE,BCV->EV", x_BCE, dlogits_BCV)
        return dw_EV, (log_z_BC, nll_BC, dx_BCE)

    chunks = _chunks(setting.chunk_tokens, x_BTE, targets_BT, weights_BT)
    dw_EV, out = lax.scan(body, jnp.zeros_like(w_EV, jnp.float32), chunks)
    log_z_BT, nll_BT, dx_BTE = (_unchunk(x, x_BTE.shape[1]) for x in out)
    return _sums(nll_BT, log_z_BT, weights_BT, setting), (dx_BTE, dw_EV)


def _forward(implementation, setting, *inputs):
    values, gradients = _losses_and_gradients(implementation, setting, *inputs, 1.0, 1.0)
    return values, (gradients, inputs)


def _backward(implementation, setting, residuals, cotangents):
    (dx_BTE, dw_EV), inputs = residuals
    g_loss, g_z, _ = cotangents  # nll_BT is a report: no gradient flows through it

    def scaled():
        return (dx_BTE * g_loss).astype(dx_BTE.dtype), dw_EV * g_loss

    def recomputed():
        return _losses_and_gradients(implementation, setting, *inputs, g_loss, g_z)[1]

    if setting.z_loss == 0:
        dx_BTE, dw_EV = scaled()
    else:
        # The saved gradients are those of loss + z_loss. A caller who weighs the two apart
        # pays for a second pass instead of getting a wrong gradient.
        dx_BTE, dw_EV = lax.cond(g_loss == g_z, scaled, recomputed)
    x_BTE, w_EV = inputs[:2]
    return dx_BTE.astype(x_BTE.dtype), dw_EV.astype(w_EV.dtype), None, None


_losses.defvjp(_forward, _backward)
