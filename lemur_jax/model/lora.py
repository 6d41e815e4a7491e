"""Low-rank adapters (LoRA, arXiv:2106.09685) beside a decoder: a tree of A and B, and nothing else.

A layer with adapters computes x W + scale (x A) B (`Block._low_rank`), so a decoder without any is
what it always was. A is drawn as PEFT draws it and B is zero: at first the model is its base.

Dimension key: L layers, R rank; I and O a weight's input and output dimensions, whatever they are.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from lemur_jax.config import LoraConfig, ModelConfig
from lemur_jax.model.block import Block
from lemur_jax.model.decoder import Decoder

# How many of a weight's dimensions a product sums over; 1 for the others.
INPUT_DIMENSIONS = {"wo": 2}
DTYPE = "float32"  # of the adapters, also where the frozen weights are bfloat16


class LayerAdapters(nnx.Module):
    """A [I..., R] and B [R, O...] of each adapted weight of one layer, as wq_a and wq_b."""

    def __init__(self, config: LoraConfig, weights: dict[str, nnx.Param], key: jax.Array):
        keys = jax.random.split(key, len(config.targets))
        for name, own_key in zip(config.targets, keys):
            declared = weights[name].get_metadata()
            shape, axes = declared["declared_shape"], declared["axes"]
            inputs = INPUT_DIMENSIONS.get(name, 1)
            # torch's kaiming_uniform_ with a=sqrt(5), which PEFT draws A with.
            bound = 1 / math.sqrt(math.prod(shape[:inputs]))
            a = (*shape[:inputs], config.rank)
            b = (config.rank, *shape[inputs:])
            drawn = jax.random.uniform(own_key, a, DTYPE, -bound, bound)
            a_axes, b_axes = (*axes[:inputs], "lora_rank"), ("lora_rank", *axes[inputs:])
            setattr(self, f"{name}_a", nnx.Param(drawn, axes=a_axes, declared_shape=a))
            zeros = jnp.zeros(b, DTYPE)
            setattr(self, f"{name}_b", nnx.Param(zeros, axes=b_axes, declared_shape=b))


class Adapters(nnx.Module):
    """What LoRA trains. `layers` holds every layer's, stacked [L, ...] as the decoder's are."""

    def __init__(self, config: LoraConfig, model: ModelConfig, key: jax.Array):
        self.config = config
        block = jax.eval_shape(functools.partial(Block, model), key)
        weights = {name: getattr(block, name) for name in config.targets}
        self.layers = jax.vmap(functools.partial(LayerAdapters, config, weights))(
            jax.random.split(key, model.layers)
        )


def abstract(config: LoraConfig, model: ModelConfig) -> Adapters:
    """The adapters with ShapeDtypeStructs for weights."""
    return jax.eval_shape(functools.partial(Adapters, config, model), jax.random.key(0))


def attach(model: Decoder, adapters: Adapters) -> Decoder:
    """The decoder with its adapters; arrays are shared, `model` is not changed."""
    adapted = jax.tree.map(lambda w: w, model)
    for name, weight in vars(adapters.layers).items():
        if isinstance(weight, nnx.Param):
            setattr(adapted.layers, name, weight)
    adapted.layers.lora = adapters.config
    return adapted


def delta(a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """What the adapters of one layer add to its weight: [I..., O...] in float32 or wider.

    Args:
      a: [I..., R].
      b: [R, O...].
      scale: LoraConfig.scale.
    """
    rank = b.shape[0]
    product = a.reshape(-1, rank) @ b.reshape(rank, -1)
    return scale * product.reshape(*a.shape[:-1], *b.shape[1:])


def merge(model: Decoder, adapters: Adapters) -> Decoder:
    """The decoder whose weights are W + scale A B, in their dtype; it needs no adapters."""
    merged, scale = jax.tree.map(lambda w: w, model), adapters.config.scale
    for name in adapters.config.targets:
        weight = getattr(merged.layers, name)
        a, b = (getattr(adapters.layers, f"{name}_{side}")[...] for side in "ab")
        with jax.default_matmul_precision("float32"):
            added = jax.vmap(functools.partial(delta, scale=scale))(a, b)
        total = weight[...].astype(DTYPE) + added
        setattr(merged.layers, name, weight.replace(total.astype(weight[...].dtype)))
    return merged
