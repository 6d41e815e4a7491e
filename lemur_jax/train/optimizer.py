"""Learning-rate schedules and update rules, as optax transformations.

The learning rate is not inside the optax chain: the step multiplies it in, so that it follows the
step number even when a step is skipped.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lemur_jax.config import OptimizerConfig
from lemur_jax.model.decoder import Decoder


def schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of each step: linear warm-up from 0, then the configured form until `steps`.

    The first step (number 0) has the first non-zero rate, peak / warmup_steps.
    """
    peak, warmup = config.peak_learning_rate, config.warmup_steps
    end, rest = peak * config.end_fraction, steps - warmup
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.end_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, end, rest)
    elif config.schedule == "wsd":
        decay = optax.linear_schedule(peak, end, config.decay_steps)
        after = optax.join_schedules(
            [optax.constant_schedule(peak), decay], [rest - config.decay_steps]
        )
    else:
        after = optax.constant_schedule(peak)

    def rate(step: jax.Array) -> jax.Array:
        rising = peak * (step + 1) / max(warmup, 1)
        return jnp.where(step < warmup, rising, after(step - warmup)).astype(jnp.float32)

    return rate


def decay_mask(model: Any) -> Any:
    """True for matrices, False for norms and biases, from their axes rather than their names.

    `heads` and `head_dim` are one dimension of a projection, so a query bias is a vector.
    """

    def is_matrix(param: nnx.Param) -> nnx.Param:
        axes = set(param.get_metadata()["axes"])
        return jax.tree.map(lambda _: len(axes - {"head_dim"}) >= 2, param)

    return jax.tree.map(is_matrix, model, is_leaf=lambda x: isinstance(x, nnx.Param))


def optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients to updates of unit learning rate: clip, precondition, add decoupled decay."""
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == "adamw":
        parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    else:
        parts.append(per_layer(_adafactor()))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, decay_mask))
    return optax.chain(*parts)


def _adafactor() -> optax.GradientTransformation:
    """Adafactor without momentum (arXiv:1804.04235): factored second moments, clipped updates,
    steps relative to the size of the parameter."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def per_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `transform` to each layer on its own, although their weights are stacked.

    Adafactor's statistics are those of one matrix: over [L, ...] they would mix the layers and
    might factor the layer axis.
    """

    def split(model: Decoder) -> tuple[Any, dict[str, nnx.Param]]:
        rest = {name: param for name, param in vars(model).items() if isinstance(param, nnx.Param)}
        return model.layers, rest

    def init(model: Decoder):
        layers, rest = split(model)
        return jax.vmap(transform.init)(layers), transform.init(rest)

    def update(gradients: Decoder, state, model: Decoder):
        layer_grads, rest_grads = split(gradients)
        layers, rest = split(model)
        layer_updates, layer_state = jax.vmap(transform.update)(layer_grads, state[0], layers)
        rest_updates, rest_state = transform.update(rest_grads, state[1], rest)
        updates = jax.tree.map(lambda g: g, gradients)  # a new module of the same structure
        updates.layers = layer_updates
        for name, param in rest_updates.items():
            setattr(updates, name, param)
        return updates, (layer_state, rest_state)

    return optax.GradientTransformation(init, update)
