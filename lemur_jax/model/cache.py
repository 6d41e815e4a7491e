"""Key/value cache of the sampler.

Dimension key: L layers, B batch, S cache length, K kv heads, D head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lemur_jax.config import ModelConfig


class KVCache(NamedTuple):
    """What attention needs of the tokens seen so far.

    All rows write the same slots, `end` and up; a row's own positions and segment ids say which
    of them count, so ragged rows need neither left-padding nor a mode. Unused slots have segment 0.

    Worked example, two prompts of 3 and 1 tokens in a bucket of 4, after one decoded token:
      positions   [[0,1,2,0,3], [0,0,0,0,1]]    segment_ids [[1,1,1,0,1], [1,0,0,0,1]]    end 5

    Attributes:
      k, v: one [B,S,K,D] for each layer, or one stacked [L,B,S,K,D] when the model's layers are.
      positions: [B,S] int32, of each slot's token in its row.
      segment_ids: [B,S] int32; 0 where the slot holds nothing.
      end: int32 scalar, the first slot not yet written.
    """

    k: tuple[jax.Array, ...] | jax.Array
    v: tuple[jax.Array, ...] | jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    end: jax.Array


def empty_cache(config: ModelConfig, batch: int, length: int, *, stacked: bool) -> KVCache:
    """A cache with no tokens. k and v are separate buffers: a shared one could not be donated."""
    shape = (batch, length, config.kv_heads, config.head_dim)

    def zeros():
        if stacked:
            return jnp.zeros((config.layers, *shape), config.dtype)
        return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.layers))

    return KVCache(
        k=zeros(),
        v=zeros(),
        positions=jnp.zeros((batch, length), jnp.int32),
        segment_ids=jnp.zeros((batch, length), jnp.int32),
        end=jnp.zeros((), jnp.int32),
    )
