"""Tile sizes of the TPU kernels: what fits each chip's VMEM and keeps its matrix unit fed.

A tile of `tokens` x `columns` logits reads (tokens + columns) * E * 2 bytes for
2 * tokens * columns * E operations, so it must be about 2 * FLOP/s / (bytes/s) wide: 450 on v4,
480 on v5e, 330 on v5p, 1120 on v6e. README.md has the table of what was tried.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lemur_kernels.target import DEVICE_KINDS

LANES = 128
STRIP = 64  # rows whose exp, sum and maximum are taken together; all of them in registers


@dataclasses.dataclass(frozen=True)
class Blocks:
    """tokens x columns of logits at a time, `depth` of E at a time; VMEM that they may take."""

    tokens: int
    columns: int
    depth: int
    vmem_bytes: int
    strip: int = STRIP
    gradient_tokens: int = 512


MIB = 2**20
CHIPS = {
    "v4": Blocks(1024, 512, 512, 16 * MIB),
    "v5e": Blocks(1024, 1024, 512, 64 * MIB),
    "v5p": Blocks(1024, 1024, 512, 48 * MIB),
    "v6e": Blocks(2048, 1024, 1024, 96 * MIB),
    "v7x": Blocks(1024, 1024, 1024, 48 * MIB),
}


def chip_of(device: jax.Device) -> str:
    """The key of CHIPS for a device.

    Raises:
      ValueError: the device is no TPU that the kernels have blocks for.
    """
    if device.device_kind not in DEVICE_KINDS:
        raise ValueError(
            f"implementation='pallas_tpu' has no blocks for device {device.device_kind!r} "
            f"(known: {', '.join(DEVICE_KINDS)}): use 'chunked', or, to compile for a TPU that is "
            f"not here, pass chip=, one of {', '.join(CHIPS)}"
        )
    return DEVICE_KINDS[device.device_kind]


def choose(chip: str, N: int, E: int, V: int, dtype) -> Blocks:
    """The chip's blocks, cut to an array of N tokens, width E and V columns.

    Raises:
      ValueError: E cannot be cut into blocks, or no such chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip={chip!r} is unknown; legal: {', '.join(CHIPS)}")
    base = CHIPS[chip]
    wide = jnp.dtype(dtype).itemsize // 2 or 1  # f32 takes twice the room
    depth = max(base.depth // wide, LANES)
    if depth < E:
        if E % LANES:
            raise ValueError(
                f"embed={E} is more than {depth} and no multiple of {LANES}, as "
                f"implementation='pallas_tpu' needs: nearest {round(E / LANES) * LANES}; "
                "or use 'chunked'"
            )
        depth = LANES * math.gcd(E // LANES, depth // LANES)
    return dataclasses.replace(
        base,
        tokens=min(base.tokens, -(-N // STRIP) * STRIP),
        columns=min(max(base.columns // wide, LANES), -(-V // LANES) * LANES),
        depth=min(depth, E),
        gradient_tokens=min(base.gradient_tokens, -(-N // STRIP) * STRIP),
    )
