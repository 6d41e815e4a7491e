"""Cross-entropy of a micro-batch, as sums: whoever adds them up divides once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from lemur_kernels.cross_entropy import cross_entropy

from lemur_jax.config import LossConfig
from lemur_jax.data.pipeline import Batch
from lemur_jax.model.decoder import Decoder


class LossSums(NamedTuple):
    """Float32 scalars over the weighted tokens.

    Attributes:
      nll: sum of -log p in nats.
      z: sum of the z-loss, its weight included.
      tokens: sum of the weights.
    """

    nll: jax.Array
    z: jax.Array
    tokens: jax.Array


def loss_sums(model: Decoder, batch: Batch, config: LossConfig) -> LossSums:
    """Runs the model on a batch of [B,T] arrays; full logits never exist."""
    x_BTE, _ = model.hidden(batch.inputs, batch.positions, batch.segment_ids)
    result = cross_entropy(
        x_BTE,
        model.head_EV(),
        batch.targets,
        batch.weights,
        z_loss=config.z_loss,
        chunk_tokens=config.chunk_tokens,
        valid_vocab=model.config.vocab_size,
        implementation="chunked",
    )
    return LossSums(result.loss, result.z_loss, jnp.sum(batch.weights))
