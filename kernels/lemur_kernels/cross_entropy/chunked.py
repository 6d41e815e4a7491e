"""Cross-entropy whose logits exist for a few tokens of each row at a time.

The loss is linear in its cotangent, so the forward pass under differentiation already computes
the gradients with respect to x and w and the backward pass only scales them: three matrix
products in all and no logits kept (as in Liger's fused linear cross-entropy, arXiv:2410.10989,
section 3.2). Chunks run along T and keep the batch axis whole, so a batch that is sharded over
devices stays sharded.

Axis key: B batch, T length, E embed, V vocab, C tokens of a row in one chunk, N chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lemur_kernels.cross_entropy.reference import CrossEntropy, logits_BTV
from lemur_kernels.product import einsum_f32
from lemur_kernels.varying import varying_alike


def chunked(
    x_BTE, w_EV, targets_BT, weights_BT, z_loss: float, chunk_tokens: int, valid_vocab: int
) -> CrossEntropy:
    """See lemur_kernels.cross_entropy.cross_entropy."""
    chunk_tokens = min(chunk_tokens, x_BTE.shape[1])
    inputs = varying_alike(x_BTE, w_EV, targets_BT, weights_BT)
    return CrossEntropy(*_losses(*inputs, z_loss, chunk_tokens, valid_vocab))


def _chunks(chunk_tokens: int, *arrays):
    """[B, T, ...] -> [N, B, C, ...]; T is padded with zeros (weight 0) to whole chunks."""
    T = arrays[0].shape[1]
    N = -(-T // chunk_tokens)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, N * chunk_tokens - T)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], N, chunk_tokens, *x.shape[2:]), 1, 0)

    return [split(x) for x in arrays]


def _unchunk(x, T: int):
    """[N, B, C, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def _chunk_values(logits_BCV, targets_BC):
    """(log Z, -log p(target)) of each token."""
    top_BC = logits_BCV.max(-1)
    log_z_BC = top_BC + jnp.log(jnp.exp(logits_BCV - top_BC[..., None]).sum(-1))
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return log_z_BC, log_z_BC - target_BC


def _sums(nll_BT, log_z_BT, weights_BT, z_loss):
    weights_BT = weights_BT.astype(jnp.float32)
    return jnp.sum(weights_BT * nll_BT), z_loss * jnp.sum(weights_BT * log_z_BT**2), nll_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _losses(x_BTE, w_EV, targets_BT, weights_BT, z_loss, chunk_tokens, valid_vocab):
    """(loss, z_loss, nll_BT), values only: one matrix product per chunk."""

    def body(_, chunk):
        x_BCE, targets_BC = chunk
        return (), _chunk_values(logits_BTV(x_BCE, w_EV, valid_vocab), targets_BC)

    _, (log_z_NBC, nll_NBC) = lax.scan(body, (), _chunks(chunk_tokens, x_BTE, targets_BT))
    T = x_BTE.shape[1]
    return _sums(_unchunk(nll_NBC, T), _unchunk(log_z_NBC, T), weights_BT, z_loss)


def _losses_and_gradients(
    x_BTE, w_EV, targets_BT, weights_BT, z_loss, chunk_tokens, valid_vocab, g_loss, g_z
):
    """The values, and (dx, dw) of g_loss * loss + g_z * z_loss; dw accumulates in f32."""

    def body(dw_EV, chunk):
        x_BCE, targets_BC, weights_BC = chunk
        logits_BCV = logits_BTV(x_BCE, w_EV, valid_vocab)
        log_z_BC, nll_BC = _chunk_values(logits_BCV, targets_BC)
        p_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
        weights_BC = weights_BC.astype(jnp.float32)
        weight_of_p_BC = weights_BC * (g_loss + g_z * 2 * z_loss * log_z_BC)
        is_target_BCV = targets_BC[..., None] == jnp.arange(w_EV.shape[1])
        dlogits_BCV = weight_of_p_BC[..., None] * p_BCV - jnp.where(
            is_target_BCV, g_loss * weights_BC[..., None], 0
        )
        # 16-bit inputs take 16-bit cotangents, as their product's own transpose would.
        dlogits_BCV = dlogits_BCV.astype(x_BCE.dtype)
        dx_BCE = einsum_f32("BCV,EV->BCE", dlogits_BCV, w_EV).astype(x_BCE.dtype)
        dw_EV += einsum_f32("BCE,BCV->EV", x_BCE, dlogits_BCV)
        return dw_EV, (log_z_BC, nll_BC, dx_BCE)

    chunks = _chunks(chunk_tokens, x_BTE, targets_BT, weights_BT)
    dw_EV, out = lax.scan(body, jnp.zeros_like(w_EV, jnp.float32), chunks)
    log_z_BT, nll_BT, dx_BTE = (_unchunk(x, x_BTE.shape[1]) for x in out)
    values = _sums(nll_BT, log_z_BT, weights_BT, z_loss)
    return values, (dx_BTE, dw_EV)


def _forward(x_BTE, w_EV, targets_BT, weights_BT, z_loss, chunk_tokens, valid_vocab):
    values, gradients = _losses_and_gradients(
        x_BTE, w_EV, targets_BT, weights_BT, z_loss, chunk_tokens, valid_vocab, 1.0, 1.0
    )
    return values, (gradients, (x_BTE, w_EV, targets_BT, weights_BT))


def _backward(z_loss, chunk_tokens, valid_vocab, residuals, cotangents):
    (dx_BTE, dw_EV), inputs = residuals
    g_loss, g_z, _ = cotangents  # nll_BT is a report: no gradient flows through it

    def scaled():
        return dx_BTE * g_loss, dw_EV * g_loss

    def recomputed():
        _, gradients = _losses_and_gradients(
            *inputs, z_loss, chunk_tokens, valid_vocab, g_loss, g_z
        )
        return gradients

    if z_loss == 0:
        dx_BTE, dw_EV = scaled()
    else:
        # The saved gradients are those of loss + z_loss. A caller who weighs the two apart
        # pays for a second pass instead of getting a wrong gradient.
        dx_BTE, dw_EV = lax.cond(g_loss == g_z, scaled, recomputed)
    x_BTE, w_EV = inputs[:2]
    return dx_BTE.astype(x_BTE.dtype), dw_EV.astype(w_EV.dtype), None, None


_losses.defvjp(_forward, _backward)
