"""One abstract device of a chip to compile for; the table of chips is lemur_jax.plan's."""

from lemur_jax.plan.chips import CHIPS, Chip, chip_named
from lemur_jax.plan.slices import slice_named, topology

__all__ = ["CHIPS", "Chip", "chip_named", "one_device"]


def one_device(name: str):
    """One abstract device of the chip (`jax.Device`) to compile for; libtpu must be installed."""
    smallest = 4 if chip_named(name).dimensions == 2 else 8
    return topology(slice_named(f"{name}-{smallest}")).devices[0]
