"""Cross-entropy of a micro-batch, as sums: whoever adds them up divides once."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from lemur_kernels.cross_entropy import CrossEntropy, cross_entropy
from lemur_kernels.target import DEVICE_KINDS

from lemur_jax import sharding
from lemur_jax.config import ConfigError, LossConfig
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


def resolve_implementation(config: LossConfig, device: jax.Device) -> str:
    """What "auto" means on a device, decided before tracing.

    Raises:
      ConfigError: a named kernel does not exist on this device.
    """
    tpu = device.device_kind in DEVICE_KINDS
    if config.implementation == "pallas_tpu" and not tpu:
        raise ConfigError(
            [
                f"LossConfig.implementation='pallas_tpu' needs one of "
                f"{', '.join(DEVICE_KINDS)}, this is {device.device_kind!r}: use 'auto'"
            ]
        )
    if config.implementation != "auto":
        return config.implementation
    return "pallas_tpu" if tpu else "chunked"


def loss_sums(model: Decoder, batch: Batch, config: LossConfig) -> LossSums:
    """Runs the model on a batch of [B,T] arrays; full logits never exist.

    Args:
      config: with an implementation other than "auto".
    """
    x_BTE, _ = model.hidden(batch.inputs, batch.positions, batch.segment_ids)
    arguments = (x_BTE, model.head_EV(), batch.targets, batch.weights)
    loss = functools.partial(
        cross_entropy,
        z_loss=config.z_loss,
        chunk_tokens=config.chunk_tokens,
        valid_vocab=model.config.vocab_size,
        implementation=config.implementation,
    )
    if config.implementation == "reference":
        nll, z, _ = loss(*arguments)
    else:
        nll, z = _per_device(loss, *arguments)
    return LossSums(nll, z, jnp.sum(batch.weights))


def _per_device(loss: Callable[..., CrossEntropy], *arguments: jax.Array) -> jax.Array:
    """[loss, z_loss] from each device's tokens and its part of the vocabulary.

    XLA cannot split a kernel; left to split the chunks' scan, it gathers the head and every row's
    logits' gradient, and sums the head's gradient, once for each chunk. Here the head is gathered
    once over the axes that split E, and its gradient summed over the devices once, in its dtype.
    """
    split = sharding.axis_size("act_vocab") > 1
    axis_name = sharding.mesh_axis("act_vocab") if split else None

    def local(x_BTE, w_EV, targets_BT, weights_BT):
        result = loss(x_BTE, w_EV, targets_BT, weights_BT, axis_name=axis_name)
        return jnp.stack([result.loss, result.z_loss])[None, None]

    tokens = ("batch", "length")
    in_axes = ((*tokens, None), (None, "act_vocab"), tokens, tokens)
    return sharding.per_device(local, in_axes, (*tokens, None))(*arguments).sum((0, 1))
