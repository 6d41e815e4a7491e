"""The vocabulary over a mesh axis: what each device computes from its own columns, and the rest.

Every function takes `axis_name`, the shard_map axis (or axes) that splits w's columns in order,
or None when w is whole.
"""

import jax
import jax.numpy as jnp
from jax import lax


def count(axis_name) -> int:
    """Devices that share the vocabulary."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def columns(width: int, valid_vocab: int, axis_name):
    """(number of this device's first column, how many of its `width` columns exist)."""
    if axis_name is None:
        return 0, valid_vocab
    first = lax.axis_index(axis_name) * width
    return first, jnp.clip(valid_vocab - first, 0, width)


def local_targets(targets: jax.Array, first, width: int) -> jax.Array:
    """Each target's column of this device's w; -1 where another device has it."""
    column = targets - first
    return jnp.where((column >= 0) & (column < width), column, -1)


def sums(tree, axis_name):
    """Sums over the devices."""
    return tree if axis_name is None else lax.psum(tree, axis_name)


def maximum(x: jax.Array, axis_name) -> jax.Array:
    """Maximum over the devices."""
    return x if axis_name is None else lax.pmax(x, axis_name)


def join(log_z: jax.Array, target_logit: jax.Array, axis_name):
    """(log Z, target's logit) over the whole vocabulary from each device's own."""
    if axis_name is None:
        return log_z, target_logit
    top = maximum(log_z, axis_name)  # a device of padding alone has -inf
    total, target_logit = sums((jnp.exp(log_z - top), target_logit), axis_name)
    return top + jnp.log(total), target_logit
