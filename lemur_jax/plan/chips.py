"""The TPU chips that libtpu compiles for, and what their peaks are per JAX device.

Imports nothing heavy: tools/tpu_compiler and the time model both read this table.
"""

import dataclasses

from lemur_jax.config import ConfigError

GIB = 2**30
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation as libtpu 0.0.42.1 names it, peaks per JAX device.

    Attributes:
      name: of the generation: v4, v5e, v5p, v6e, v7x.
      platform: prefix of the name for `jax.experimental.topologies.get_topology_desc`.
      device_kind: what a device of it says it is.
      dimensions: of its interconnect: a mesh or torus of 2 or 3.
      megacore: the chip's two TensorCores are one device (`chip_config_name="megacore"`).
      cores: TensorCores per device.
      devices: JAX devices per chip.
      clock_hz: TensorCore clock.
      flops_per_s: published bf16 peak of one device.
      hbm_bytes: what the compiler lets a program use, by its own out-of-memory message.
      hbm_bytes_per_s: bandwidth of one device.
      ici_bytes_per_s: payload of one torus axis, both directions together, per device.
      dcn_bytes_per_s: data-centre network per device, between slices.
      mxus: matrix units per TensorCore; mxu_size: their rows and columns.
      mxu_rows_per_cycle: bf16 rows one matrix unit takes in a cycle: peak bf16 FLOP/s
        / (cores clock mxus 2 mxu_size^2), which is 1.00 on v4, v5e, v5p and 2.00 on v6e.
      branch_delay: bundles after a branch that run whether or not it is taken.
      vmem_bytes: VMEM of one TensorCore.

    Sources: cloud.google.com/tpu/docs/system-architecture-tpu-vm for FLOP/s and bandwidth,
    jax/_src/pallas/mosaic/tpu_info.py for matrix units and VMEM. v7x's clock is not published:
    it is the clock at which its published 1153 TFLOP/s per core are 2 rows per cycle. ICI: nine
    tenths of a chip's published bandwidth over its axes; on v4 that is the rate that XLA's own
    latency model uses (85.3 B a cycle). DCN: the published Gb/s per chip; v4's is not published and
    taken to be v5p's.
    """

    name: str
    platform: str
    device_kind: str
    dimensions: int
    megacore: bool
    cores: int
    devices: int
    clock_hz: float
    flops_per_s: float
    hbm_bytes: int
    hbm_bytes_per_s: float
    ici_bytes_per_s: float
    dcn_bytes_per_s: float
    mxus: int
    mxu_size: int
    mxu_rows_per_cycle: int
    branch_delay: int
    vmem_bytes: int

    @property
    def flops_per_cycle(self) -> int:
        """Peak bf16 floating point operations per cycle of one TensorCore."""
        return 2 * self.mxus * self.mxu_size**2 * self.mxu_rows_per_cycle


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            platform="v4",
            device_kind="TPU v4",
            dimensions=3,
            megacore=True,
            cores=2,
            devices=1,
            clock_hz=1.05e9,
            flops_per_s=275e12,
            hbm_bytes=int(30.75 * GIB),
            hbm_bytes_per_s=1.228e12,
            ici_bytes_per_s=90e9,
            dcn_bytes_per_s=6.25e9,
            mxus=4,
            mxu_size=128,
            mxu_rows_per_cycle=1,
            branch_delay=1,
            vmem_bytes=16 * MIB,
        ),
        Chip(
            name="v5e",
            platform="v5e",
            device_kind="TPU v5 lite",
            dimensions=2,
            megacore=False,
            cores=1,
            devices=1,
            clock_hz=1.5e9,
            flops_per_s=197e12,
            hbm_bytes=int(15.75 * GIB),
            hbm_bytes_per_s=0.819e12,
            ici_bytes_per_s=90e9,
            dcn_bytes_per_s=12.5e9,
            mxus=4,
            mxu_size=128,
            mxu_rows_per_cycle=1,
            branch_delay=4,
            vmem_bytes=128 * MIB,
        ),
        Chip(
            name="v5p",
            platform="v5",
            device_kind="TPU v5",
            dimensions=3,
            megacore=True,
            cores=2,
            devices=1,
            clock_hz=1.75e9,
            flops_per_s=459e12,
            hbm_bytes=int(95.74 * GIB),
            hbm_bytes_per_s=2.765e12,
            ici_bytes_per_s=180e9,
            dcn_bytes_per_s=6.25e9,
            mxus=4,
            mxu_size=128,
            mxu_rows_per_cycle=1,
            branch_delay=4,
            vmem_bytes=64 * MIB,
        ),
        Chip(
            name="v6e",
            platform="v6e",
            device_kind="TPU v6 lite",
            dimensions=2,
            megacore=False,
            cores=1,
            devices=1,
            clock_hz=1.75e9,
            flops_per_s=918e12,
            hbm_bytes=int(31.25 * GIB),
            hbm_bytes_per_s=1.64e12,
            ici_bytes_per_s=180e9,
            dcn_bytes_per_s=12.5e9,
            mxus=2,
            mxu_size=256,
            mxu_rows_per_cycle=2,
            branch_delay=4,
            vmem_bytes=128 * MIB,
        ),
        Chip(
            name="v7x",
            platform="tpu7x",
            device_kind="TPU7x",
            dimensions=3,
            megacore=False,
            cores=1,
            devices=2,
            clock_hz=2.2e9,
            flops_per_s=1153e12,
            hbm_bytes=int(94.75 * GIB),
            hbm_bytes_per_s=3.7e12,
            ici_bytes_per_s=180e9,
            dcn_bytes_per_s=6.25e9,
            mxus=2,
            mxu_size=256,
            mxu_rows_per_cycle=2,
            branch_delay=1,
            vmem_bytes=64 * MIB,
        ),
    )
}


def chip_named(name: str) -> Chip:
    """The chip, or a ConfigError (a ValueError) naming the legal ones."""
    if name not in CHIPS:
        raise ConfigError([f"chip={name!r} is unknown; legal: {', '.join(CHIPS)}"])
    return CHIPS[name]
