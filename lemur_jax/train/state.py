"""What a training step takes and returns, and how it comes into being."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lemur_jax.config import ModelConfig
from lemur_jax.model import param
from lemur_jax.model.decoder import Decoder


class Guard(NamedTuple):
    """What decides whether a step is applied.

    Attributes:
      mean_norm: float32, running mean of the gradient norm over the applied steps.
      applied: int32, steps applied so far; spikes are judged only after WARM_STEPS of them.
      skipped_in_a_row: int32, steps skipped since the last applied one.
    """

    mean_norm: jax.Array
    applied: jax.Array
    skipped_in_a_row: jax.Array


class TrainState(NamedTuple):
    """Everything that changes from step to step.

    Attributes:
      step: int32, steps taken, skipped ones included; also the number of the next step.
      model: master weights.
      opt_state: moments are Decoder-shaped, so they carry the weights' axes and shard like them.
      guard: skip statistics.
    """

    step: jax.Array
    model: Decoder
    opt_state: Any
    guard: Guard


def _fresh(model: Decoder, transform: optax.GradientTransformation) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    guard = Guard(mean_norm=jnp.zeros((), jnp.float32), applied=zero, skipped_in_a_row=zero)
    return TrainState(zero, model, transform.init(model), guard)


def abstract_state(
    config: ModelConfig, transform: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
    """The state as ShapeDtypeStructs, with shardings when a mesh is given. Costs nothing."""
    state = jax.eval_shape(lambda key: _fresh(Decoder(config, key), transform), jax.random.key(0))
    return state if mesh is None else param.abstract_with_shardings(state, mesh)


def random_state(
    config: ModelConfig, transform: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """Initial state, made where it lies: nothing is ever whole on one device."""
    where = param.shardings(abstract_state(config, transform), mesh)
    init = jax.jit(lambda key: _fresh(Decoder(config, key), transform), out_shardings=where)
    return init(jax.random.key(seed))


def state_from_model(
    model: Decoder, transform: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Step 0 of a run that starts from given weights, which are taken over."""
    where = param.shardings(abstract_state(model.config, transform), mesh)
    return jax.jit(lambda m: _fresh(m, transform), out_shardings=where, donate_argnums=0)(model)
