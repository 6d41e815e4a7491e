"""One optimizer step, pure: (state, batch) -> (state, metrics).

Dimension key: M micro-batches, R rows of one micro-batch, T length.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from lemur_jax import sharding
from lemur_jax.config import LossConfig, OptimizerConfig
from lemur_jax.data.pipeline import Batch
from lemur_jax.model import lora, param
from lemur_jax.model.decoder import Decoder
from lemur_jax.train.loss import LossSums, loss_sums
from lemur_jax.train.state import Guard, TrainState

WARM_STEPS = 20  # applied steps before the running mean of the norm is worth comparing to
NORM_MEMORY = 0.98  # of the running mean: about the last fifty steps


class Metrics(NamedTuple):
    """Scalars of one step. `skipped`: 0 applied, 1 non-finite, 2 spike."""

    loss: jax.Array  # nats per weighted token
    z_loss: jax.Array  # per weighted token
    grad_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    tokens: jax.Array  # weighted tokens
    skipped: jax.Array
    skipped_in_a_row: jax.Array


Trained = Decoder | lora.Adapters


def gradients(
    model: Decoder, batch: Batch, config: LossConfig, adapters: lora.Adapters | None = None
) -> tuple[LossSums, Trained]:
    """Loss sums and their gradient, summed over the M micro-batches of a [M,R,T] batch.

    Sums and weights are added up and divided once by the caller: packing, padding and the number
    of micro-batches do not change the loss.

    Args:
      adapters: have the gradient in place of the model, which then has none.
    """
    trained = model if adapters is None else adapters

    def total(trained: Trained, part: Batch):
        adapted = trained if adapters is None else lora.attach(model, trained)
        sums = loss_sums(adapted, part, config)
        return sums.nll + sums.z, sums

    grad_fn = jax.grad(total, has_aux=True)
    if batch.inputs.shape[0] == 1:
        grads, sums = grad_fn(trained, jax.tree.map(lambda x: x[0], batch))
        return sums, grads

    def add(carry, part: Batch):
        grads, sums = grad_fn(trained, part)
        return jax.tree.map(jnp.add, carry, (sums, grads)), None

    zero = jnp.zeros((), jnp.float32)
    start = (LossSums(zero, zero, zero), jax.tree.map(jnp.zeros_like, trained))
    return jax.lax.scan(add, start, batch)[0]


def explicit_gradients(
    model: Decoder, batch: Batch, config: LossConfig, adapters: lora.Adapters | None = None
) -> tuple[LossSums, Trained]:
    """`gradients`, with the collectives of weights written out (`sharding.gathered`) instead of
    left to the compiler: one per_device around loss and gradient. Needs MeshConfig.tensor=1."""
    mesh = jax.sharding.get_abstract_mesh()
    if math.prod(mesh.shape.values()) == 1:
        return gradients(model, batch, config, adapters)
    weights = (model,) if adapters is None else (model, adapters)
    specs = jax.tree.map(lambda where: where.spec, param.shardings(weights, mesh))
    rows = sharding.spec((None, "batch", "length"), mesh)

    def local(weights: tuple[Decoder] | tuple[Decoder, lora.Adapters], batch: Batch):
        sums, grads = gradients(weights[0], batch, config, *weights[1:])
        sums = jax.tree.map(lambda x: sharding.sum_over_batch(x, PartitionSpec()), sums)
        return sums, jax.tree.map(sharding.sum_over_batch, grads, specs[-1])

    return sharding.per_device_specs(local, (specs, rows), (PartitionSpec(), specs[-1]))(
        weights, batch
    )


def make_step(
    transform: optax.GradientTransformation,
    rate: Callable[[jax.Array], jax.Array],
    optimizer: OptimizerConfig,
    loss: LossConfig,
    explicit: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step for one configuration; jit it with the state donated.

    `explicit`: `explicit_gradients` in place of `gradients`. A state with adapters has these
    trained, and its model returned as it came.

    A step whose loss or gradient is not finite, or whose gradient norm is a spike, leaves model and
    optimizer as they were and says so in the metrics.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        differentiate = explicit_gradients if explicit else gradients
        sums, grads = differentiate(state.model, batch, loss, state.adapters)
        tokens = jnp.maximum(sums.tokens, 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        norm, mean_loss = optax.global_norm(grads), sums.nll / tokens

        guard = state.guard
        finite = jnp.isfinite(norm) & jnp.isfinite(mean_loss)
        spike = jnp.asarray(False)
        if optimizer.spike_factor:
            limit = optimizer.spike_factor * guard.mean_norm
            spike = finite & (guard.applied >= WARM_STEPS) & (norm > limit)
        apply = finite & ~spike

        learning_rate = rate(state.step)
        updates, opt_state = transform.update(grads, state.opt_state, state.trained)
        trained = jax.tree.map(
            lambda w, u: jnp.where(apply, w - learning_rate * u, w).astype(w.dtype),
            state.trained,
            updates,
        )
        opt_state = jax.tree.map(
            lambda new, old: jnp.where(apply, new, old), opt_state, state.opt_state
        )
        mean_norm = jnp.where(
            guard.applied == 0,
            norm,
            NORM_MEMORY * guard.mean_norm + (1 - NORM_MEMORY) * norm,
        )
        guard = Guard(
            mean_norm=jnp.where(apply, mean_norm, guard.mean_norm),
            applied=guard.applied + apply,
            skipped_in_a_row=jnp.where(apply, 0, guard.skipped_in_a_row + 1),
        )
        metrics = Metrics(
            loss=mean_loss,
            z_loss=sums.z / tokens,
            grad_norm=norm,
            learning_rate=learning_rate,
            tokens=sums.tokens,
            skipped=jnp.where(apply, 0, jnp.where(finite, 2, 1)),
            skipped_in_a_row=guard.skipped_in_a_row,
        )
        changed = state._replace(step=state.step + 1, opt_state=opt_state, guard=guard)
        return changed.with_trained(trained), metrics

    return step
