"""One shard_map type for all inputs of a custom gradient."""

import jax
import jax.numpy as jnp


def varying_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays, all varying over every mesh axis that one of them varies over.

    Inside shard_map JAX tracks over which axes a value may differ. A scan's carry and the result
    of a custom gradient must have the type of their counterpart, so a projection that is the
    same on all devices must enter as one that may differ; the sum of its gradient over the
    devices is then JAX's own. A choice between an array and a number that is never made takes
    the type of both; XLA drops it. (jax.lax.pcast would say the same, but the attribute that
    lists an array's axes has had two names between jax 0.8 and 0.10.)
    """
    number = jnp.float32(0)
    for array in arrays:
        number = jax.lax.select(False, array[(0,) * array.ndim].astype(jnp.float32), number)
    return tuple(
        jax.lax.select(
            False, jnp.broadcast_to(jax.lax.stop_gradient(number), a.shape).astype(a.dtype), a
        )
        for a in arrays
    )
