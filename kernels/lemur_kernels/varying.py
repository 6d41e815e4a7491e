"""shard_map's types: which axes of a mesh a value may differ over."""

import jax
import jax.numpy as jnp


def refuse_varying(implementation: str, *arrays: jax.Array) -> None:
    """For kernels whose results carry no such type.

    Raises:
      ValueError: inside shard_map with check_vma=True, JAX's default.
    """
    axes = frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))
    if axes:
        raise ValueError(
            f"implementation={implementation!r} inside shard_map over {', '.join(sorted(axes))}: "
            "its kernels cannot say over which axes their results differ; pass check_vma=False to "
            "shard_map"
        )


def varying_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays, all varying over every mesh axis that one of them varies over.

    Inside shard_map JAX tracks over which axes a value may differ. A scan's carry and the result
    of a custom gradient must have the type of their counterpart, so a projection that is the
    same on all devices must enter as one that may differ; the sum of its gradient over the
    devices is then JAX's own. A choice between an array and a number that is never made takes
    the type of both; XLA drops it. (jax.lax.pcast would say the same, but the attribute that
    lists an array's axes has had two names between jax 0.8 and 0.10.)
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return arrays  # not inside shard_map; an Explicit axis would not let one element be read
    number = jnp.float32(0)
    for array in arrays:
        number = jax.lax.select(False, array[(0,) * array.ndim].astype(jnp.float32), number)
    return tuple(
        jax.lax.select(
            False, jnp.broadcast_to(jax.lax.stop_gradient(number), a.shape).astype(a.dtype), a
        )
        for a in arrays
    )
