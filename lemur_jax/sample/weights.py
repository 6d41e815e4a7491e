"""Weights as decoding wants to read them: cast once, one block for each layer."""

import dataclasses

import jax

from lemur_jax.config import ModelConfig
from lemur_jax.model import attention, param
from lemur_jax.model.decoder import Block, Decoder, abstract, unstack


def for_sampling(model: Decoder, dtype: str | None = None) -> Decoder:
    """The model that the sampler runs: weights in the compute dtype, layers unstacked.

    A decode step reads every weight once, so a master copy in float32 would double its time, and
    slicing stacked layers would copy each of them at every token. Norm scales stay float32.

    Args:
      model: layers stacked or not; not changed, and its arrays are shared where nothing differs.
      dtype: to compute in; `model.config.dtype` when None.
    """
    config = sampling_config(model.config, dtype)
    stacked = isinstance(model.layers, Block)
    like = jax.eval_shape(unstack, abstract(config)) if not stacked else abstract(config)
    flat = {name: _cast(name, leaf, config.dtype) for name, leaf in param.flatten(model).items()}
    model = param.unflatten(like, flat)
    return unstack(model) if stacked else model


def sampling_config(config: ModelConfig, dtype: str | None) -> ModelConfig:
    """The config of `for_sampling`'s result: one dtype, a kernel of this backend, no remat.

    Raises:
      ConfigError: the dtype is unknown, or the config names a kernel that this backend lacks.
    """
    dtype = dtype or config.dtype
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype, remat="none")
    kernel = attention.resolve_implementation(config, jax.default_backend())
    return dataclasses.replace(config, attention=kernel)


def _cast(name: str, leaf: jax.Array, dtype: str) -> jax.Array:
    return leaf if name.endswith("norm") else leaf.astype(dtype)
