"""What a run will need, before anything is allocated or compiled: `lemur train --dry_run`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lemur_jax import sharding
from lemur_jax.config import MeshConfig, TrainConfig
from lemur_jax.data.pipeline import Batch
from lemur_jax.model import param
from lemur_jax.train.loss import loss_sums
from lemur_jax.train.metrics import flops_per_token
from lemur_jax.train.optimizer import optimizer
from lemur_jax.train.state import abstract_state


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Sizes of a run; bytes are for one device.

    Attributes:
      parameters: of the model, padded vocabulary included.
      trained: those that have gradients: all, or the adapters'.
      devices: of the mesh.
      parameter_bytes, optimizer_bytes, gradient_bytes: exact, from the shardings.
      activation_bytes: what the backward pass of one micro-batch keeps, traced, under the remat
        policy; an upper bound, since the compiler may recompute or shard more.
      logits_bytes: of one chunk: float32 logits and their gradient; with the loss "pallas_tpu"
        probabilities in the compute dtype.
      flops_per_step: model FLOPs of the global batch.
      tokens: of the whole run.
    """

    parameters: int
    trained: int
    devices: int
    parameter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int
    logits_bytes: int
    flops_per_step: float
    tokens: int

    @property
    def total_bytes(self) -> int:
        """All of the above at one time, on one device."""
        return (
            self.parameter_bytes
            + self.optimizer_bytes
            + self.gradient_bytes
            + self.activation_bytes
            + self.logits_bytes
        )


def estimate(config: TrainConfig, mesh: MeshConfig) -> Estimate:
    """Traces the model abstractly; needs none of the devices of the mesh.

    Args:
      config: with implementations of attention and loss other than "auto".
      mesh: resolved sizes.
    """
    over = sharding.abstract_mesh(mesh)
    state = abstract_state(config.model, optimizer(config.optimizer), over, config.lora)
    rows, length = config.data.batch_size // config.micro_batches, config.data.sequence_length
    batch_ways = sharding.batch_ways(mesh)
    ways = batch_ways * mesh.sequence
    chunk = min(config.loss.chunk_tokens, length)
    vocab = sharding.padded_vocab(config.model)
    kernel = config.loss.implementation == "pallas_tpu"
    logit_bytes = jnp.dtype(config.model.dtype).itemsize if kernel else 2 * 4
    return Estimate(
        parameters=param.size(state.model).parameters,
        trained=param.size(state.trained).parameters,
        devices=over.size,
        parameter_bytes=_bytes_per_device((state.model, state.adapters)),
        optimizer_bytes=_bytes_per_device(state.opt_state),
        gradient_bytes=_bytes_per_device(state.trained),
        activation_bytes=_saved_bytes(config, rows, length) // ways,
        logits_bytes=logit_bytes * rows * chunk * vocab // (batch_ways * mesh.tensor),
        flops_per_step=config.data.batch_size
        * length
        * flops_per_token(config.model, length, config.lora),
        tokens=config.steps * config.data.batch_size * length,
    )


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _saved_bytes(config: TrainConfig, rows: int, length: int) -> int:
    """Bytes that the backward pass of one micro-batch keeps, without the weights themselves."""
    state = abstract_state(config.model, optimizer(config.optimizer), adapt=config.lora)
    model = state.model
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    batch = Batch(tokens, tokens, weights, tokens, tokens)

    def backward(state, batch):
        def total(trained):
            sums = loss_sums(state.with_trained(trained).adapted, batch, config.loss)
            return sums.nll + sums.z

        return jax.vjp(total, state.trained)[1]  # a pytree whose leaves are what it keeps

    kept = jax.tree.leaves(jax.eval_shape(backward, state, batch))
    weight_shapes = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((model, state.adapters))}
    compute = {(shape, jnp.dtype(config.model.dtype)) for shape, _ in weight_shapes}
    return sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in kept
        if (leaf.shape, leaf.dtype) not in weight_shapes | compute
    )
