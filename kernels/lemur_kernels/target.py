"""The device that a function is being traced for, and what the tables call it."""

import jax

# `device_kind` -> name of the chip in the kernels' tables.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
}


def target_device():
    """The mesh's, which need not be attached (ahead-of-time compilation), or else the default one.

    Returns:
      Something with a `device_kind`: jax.Device or jax.sharding.AbstractDevice.
    """
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
