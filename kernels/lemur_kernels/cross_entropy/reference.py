"""The meaning of the loss over the vocabulary: full logits, then log-softmax in f32.

Axis key: B batch, T length, E embed, V vocab.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lemur_kernels.cross_entropy import shards
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


def logits_BTV(x_BTE: jax.Array, w_EV: jax.Array, valid_vocab) -> jax.Array:
    """Logits accumulated in f32; columns from valid_vocab on (padding) are -inf."""
    logits_BTV = einsum_f32("BTE,EV->BTV", x_BTE, w_EV)
    if isinstance(valid_vocab, int) and valid_vocab == w_EV.shape[1]:
        return logits_BTV
    return jnp.where(jnp.arange(w_EV.shape[1]) < valid_vocab, logits_BTV, -jnp.inf)


def reference(
    x_BTE, w_EV, targets_BT, weights_BT, z_loss: float, valid_vocab: int, axis_name=None
) -> CrossEntropy:
    """Cross-entropy of whole logits: memory O(B T V)."""
    first, limit = shards.columns(w_EV.shape[1], valid_vocab, axis_name)
    logits = logits_BTV(x_BTE, w_EV, limit)
    top_BT = shards.maximum(jax.lax.stop_gradient(logits.max(-1)), axis_name)
    total_BT = jnp.exp(logits - top_BT[..., None]).sum(-1)
    column_BT = shards.local_targets(targets_BT, first, w_EV.shape[1])
    target_BT = jnp.take_along_axis(logits, jnp.maximum(column_BT, 0)[..., None], axis=-1)[..., 0]
    target_BT = jnp.where(column_BT >= 0, target_BT, 0)
    total_BT, target_BT = shards.sums((total_BT, target_BT), axis_name)
    log_z_BT = top_BT + jnp.log(total_BT)
    nll_BT = log_z_BT - target_BT
    weights_BT = jax.lax.stop_gradient(weights_BT)
    return CrossEntropy(
        loss=jnp.sum(weights_BT * nll_BT),
        z_loss=jnp.sum(weights_BT * z_loss * log_z_BT**2),
        nll_BT=jax.lax.stop_gradient(nll_BT),
    )
