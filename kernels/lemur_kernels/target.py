"""The device that a function is being traced for."""

import jax


def target_device():
    """The mesh's, which need not be attached (ahead-of-time compilation), or else the default one.

    Returns:
      Something with a `device_kind`: jax.Device or jax.sharding.AbstractDevice.
    """
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
