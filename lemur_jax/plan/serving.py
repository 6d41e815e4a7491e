"""The sampler's programs on abstract arguments: what `lemur plan` compiles for serving.

The functions are those that the sampler jits (lemur_jax.sample.loop), under a mesh: weights,
cache and rows lie where the sharding table puts them.

Dimension key: B batch, P prompt bucket, S cache bucket, V vocab (padded), C tokens of a chunk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lemur_jax import sharding
from lemur_jax.config import ModelConfig, TrainConfig
from lemur_jax.model import decoder, param
from lemur_jax.model.cache import KVCache
from lemur_jax.sample import loop as sampling
from lemur_jax.sample import methods, weights
from lemur_jax.sample.sampler import CHUNK
from lemur_jax.train import programs as training

STOP_IDS = 8  # columns of Rows.stop_ids: what sample.rows.constants makes of up to eight


@dataclasses.dataclass(frozen=True)
class Serving:
    """Shapes of the prefill and decode programs.

    Attributes:
      batch: B, rows of a batch, over all devices.
      prompt: P, tokens of the prompt bucket.
      cache: S, slots of the decode program's cache.
    """

    batch: int
    prompt: int
    cache: int


def default_serving(config: TrainConfig) -> Serving:
    """Eight rows for each part of the mesh's batch axes, prompts of half the context, a full
    cache; `config` is resolved."""
    ways = sharding.batch_ways(config.mesh)
    length = config.data.sequence_length
    return Serving(batch=8 * ways, prompt=length // 2, cache=length)


def prefill(config: TrainConfig, mesh: Mesh, serving: Serving) -> training.Program:
    array, batch = functools.partial(_array, mesh), serving.batch
    arguments = (
        sampling_model(config.model, mesh),
        array((batch, serving.prompt), jnp.int32, ("batch", None)),
        array((batch,), jnp.int32, ("batch",)),
        _rows(batch, mesh),
        array((), jnp.bool_, ()),
    )
    return training.Program(jax.jit(sampling.prefill), arguments)


def decode(config: TrainConfig, mesh: Mesh, serving: Serving) -> training.Program:
    array, batch = functools.partial(_array, mesh), serving.batch
    model = sampling_model(config.model, mesh)

    def steps_of(model, state, rows, stopped_B, steps, want_logprobs):
        return sampling.decode(lambda: model, state, rows, stopped_B, steps, want_logprobs, CHUNK)

    arguments = (
        model,
        _decode_state(model.config, batch, serving.cache, mesh),
        _rows(batch, mesh),
        array((batch,), jnp.bool_, ("batch",)),
        array((), jnp.int32, ()),
        array((), jnp.bool_, ()),
    )
    return training.Program(jax.jit(steps_of, donate_argnums=1), arguments)


def sampling_model(config: ModelConfig, mesh: Mesh) -> decoder.Decoder:
    """The sampler's model as ShapeDtypeStructs: compute dtype, layers unstacked, sharded."""
    ready = functools.partial(weights.for_sampling, backend="tpu")
    model = jax.eval_shape(ready, decoder.abstract(config))
    return param.abstract_with_shardings(model, mesh)


def _array(mesh: Mesh, shape, dtype, axes) -> jax.ShapeDtypeStruct:
    where = sharding.sharding(axes, mesh, shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _rows(batch: int, mesh: Mesh) -> sampling.Rows:
    array = functools.partial(_array, mesh)
    chain = methods.stack([methods.standard(temperature=0.0)])
    return sampling.Rows(
        seed=array((batch,), jnp.uint32, ("batch",)),
        sample=array((batch,), jnp.uint32, ("batch",)),
        limit=array((batch,), jnp.int32, ("batch",)),
        stop_ids=array((batch, STOP_IDS), jnp.int32, ("batch", None)),
        chain=jax.tree.map(lambda x: array((batch,), x.dtype, ("batch",)), chain),
    )


def _decode_state(config: ModelConfig, batch: int, slots: int, mesh: Mesh) -> sampling.DecodeState:
    array = functools.partial(_array, mesh)

    def cache():
        shape = (batch, slots, config.kv_heads, config.head_dim)
        axes = ("batch", None, "kv_heads", None)
        return tuple(array(shape, jnp.dtype(config.dtype), axes) for _ in range(config.layers))

    numbers = array((batch,), jnp.int32, ("batch",))
    return sampling.DecodeState(
        cache=KVCache(
            k=cache(),
            v=cache(),
            positions=array((batch, slots), jnp.int32, ("batch", None)),
            segment_ids=array((batch, slots), jnp.int32, ("batch", None)),
            end=array((), jnp.int32, ()),
        ),
        token=numbers,
        position=numbers,
        generated=numbers,
        done=array((batch,), jnp.bool_, ("batch",)),
        seen_BV=array((batch, sharding.padded_vocab(config)), jnp.bool_, ("batch", "act_vocab")),
    )
