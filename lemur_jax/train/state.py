"""What a training step takes and returns, and how it comes into being."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lemur_jax.config import LoraConfig, ModelConfig
from lemur_jax.model import lora, param
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
      opt_state: moments are shaped like what is trained (Decoder or Adapters), so they carry the
        weights' axes and shard like them.
      guard: skip statistics.
      adapters: what is trained in place of `model`, which then never changes; None: no LoRA.
    """

    step: jax.Array
    model: Decoder
    opt_state: Any
    guard: Guard
    adapters: lora.Adapters | None = None

    @property
    def trained(self) -> Decoder | lora.Adapters:
        """What has gradients and optimizer state."""
        return self.model if self.adapters is None else self.adapters

    def with_trained(self, trained: Decoder | lora.Adapters) -> "TrainState":
        """The state with other values of `trained`."""
        if self.adapters is None:
            return self._replace(model=trained)
        return self._replace(adapters=trained)

    @property
    def adapted(self) -> Decoder:
        """The model as it computes: with its adapters, if there are any."""
        return self.model if self.adapters is None else lora.attach(self.model, self.adapters)


def _fresh(
    model: Decoder,
    transform: optax.GradientTransformation,
    adapters: lora.Adapters | None = None,
) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    guard = Guard(mean_norm=jnp.zeros((), jnp.float32), applied=zero, skipped_in_a_row=zero)
    trained = model if adapters is None else adapters
    return TrainState(zero, model, transform.init(trained), guard, adapters)


def _adapters(
    config: LoraConfig | None, model: ModelConfig, key: jax.Array
) -> lora.Adapters | None:
    return None if config is None else lora.Adapters(config, model, key)


def abstract_state(
    config: ModelConfig,
    transform: optax.GradientTransformation,
    mesh: Mesh | None = None,
    adapt: LoraConfig | None = None,
) -> TrainState:
    """The state as ShapeDtypeStructs, with shardings when a mesh is given. Costs nothing."""

    def make(key):
        return _fresh(Decoder(config, key), transform, _adapters(adapt, config, key))

    state = jax.eval_shape(make, jax.random.key(0))
    return state if mesh is None else param.abstract_with_shardings(state, mesh)


def random_state(
    config: ModelConfig, transform: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """Initial state, made where it lies: nothing is ever whole on one device."""
    where = param.shardings(abstract_state(config, transform), mesh)
    init = jax.jit(lambda key: _fresh(Decoder(config, key), transform), out_shardings=where)
    return init(jax.random.key(seed))


def state_from_model(
    model: Decoder,
    transform: optax.GradientTransformation,
    mesh: Mesh,
    adapt: LoraConfig | None = None,
    seed: int = 0,
) -> TrainState:
    """Step 0 of a run that starts from given weights, which are taken over.

    Args:
      adapt: adapters to train in place of the weights; `seed` is theirs.
    """
    where = param.shardings(abstract_state(model.config, transform, adapt=adapt), mesh)

    def make(model, key):
        return _fresh(model, transform, _adapters(adapt, model.config, key))

    return jax.jit(make, out_shardings=where, donate_argnums=0)(model, jax.random.key(seed))
