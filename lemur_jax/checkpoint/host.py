"""Compiled code of JAX for work on the host: no GIL, and one pass where numpy makes twenty."""

import functools

import jax


@functools.cache
def host_device() -> jax.Device | None:
    """The CPU as a device of JAX; None where JAX_PLATFORMS leaves it out, and numpy has to do."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
