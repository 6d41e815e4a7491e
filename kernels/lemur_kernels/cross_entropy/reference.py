"""The meaning of the loss over the vocabulary: full logits, then log-softmax in f32.

Axis key: B batch, T length, E embed, V vocab.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lemur_kernels.product import einsum_f32


class CrossEntropy(NamedTuple):
    """Sums over the tokens, so the caller divides once by the total weight.

    loss: f32 scalar, sum of weights * -log p(target).
    z_loss: f32 scalar, sum of weights * z_loss * log(Z)^2, Z the softmax's normaliser.
    nll_BT: f32, -log p(target) of each token, unweighted; no gradient flows through it.
    """

    loss: jax.Array
    z_loss: jax.Array
    nll_BT: jax.Array


def logits_BTV(x_BTE: jax.Array, w_EV: jax.Array, valid_vocab: int) -> jax.Array:
    """Logits accumulated in f32; columns from valid_vocab on (padding) are -inf."""
    logits_BTV = einsum_f32("BTE,EV->BTV", x_BTE, w_EV)
    if valid_vocab == w_EV.shape[1]:
        return logits_BTV
    return jnp.where(jnp.arange(w_EV.shape[1]) < valid_vocab, logits_BTV, -jnp.inf)


def reference(x_BTE, w_EV, targets_BT, weights_BT, z_loss: float, valid_vocab: int) -> CrossEntropy:
    """Cross-entropy of whole logits: memory O(B T V)."""
    logits = logits_BTV(x_BTE, w_EV, valid_vocab)
    log_z_BT = jax.nn.logsumexp(logits, axis=-1)
    nll_BT = log_z_BT - jnp.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
    weights_BT = jax.lax.stop_gradient(weights_BT)
    return CrossEntropy(
        loss=jnp.sum(weights_BT * nll_BT),
        z_loss=jnp.sum(weights_BT * z_loss * log_z_BT**2),
        nll_BT=jax.lax.stop_gradient(nll_BT),
    )
