"""The TPU chips that libtpu compiles for, and what their peaks are per TensorCore."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation as libtpu 0.0.42.1 names it, peaks per JAX device.

    Attributes:
      topology: name for `jax.experimental.topologies.get_topology_desc`.
      megacore: the chip's two TensorCores are one device (`chip_config_name="megacore"`).
      cores: TensorCores per device.
      clock_hz: TensorCore clock. flops / (cores clock) is the bf16 peak per cycle below.
      hbm_bytes_per_s: bandwidth of one device.
      mxus: matrix units per TensorCore; mxu_size: their rows and columns.
      mxu_rows_per_cycle: bf16 rows one matrix unit takes in a cycle: peak bf16 FLOP/s
        / (cores clock mxus 2 mxu_size^2), which is 1.00 on v4, v5e, v5p and 2.00 on v6e.
      branch_delay: bundles after a branch that run whether or not it is taken.
      vmem_bytes: VMEM of one TensorCore.

    Sources: cloud.google.com/tpu/docs/system-architecture-tpu-vm for FLOP/s and bandwidth,
    jax/_src/pallas/mosaic/tpu_info.py for matrix units and VMEM. v7x's clock is not published:
    it is the clock at which its published 1153 TFLOP/s per core are 2 rows per cycle.
    """

    topology: str
    megacore: bool
    cores: int
    clock_hz: float
    hbm_bytes_per_s: float
    mxus: int
    mxu_size: int
    mxu_rows_per_cycle: int
    branch_delay: int
    vmem_bytes: int

    @property
    def flops_per_cycle(self) -> int:
        """Peak bf16 floating point operations per cycle of one TensorCore."""
        return 2 * self.mxus * self.mxu_size**2 * self.mxu_rows_per_cycle


MIB = 2**20
CHIPS = {
    "v4": Chip("v4:2x2x1", True, 2, 1.05e9, 1.228e12, 4, 128, 1, 1, 16 * MIB),
    "v5e": Chip("v5e:2x2", False, 1, 1.5e9, 0.819e12, 4, 128, 1, 4, 128 * MIB),
    "v5p": Chip("v5:2x2x1", True, 2, 1.75e9, 2.765e12, 4, 128, 1, 4, 64 * MIB),
    "v6e": Chip("v6e:2x2", False, 1, 1.75e9, 1.64e12, 2, 256, 2, 4, 128 * MIB),
    "v7x": Chip("tpu7x:2x2x1", False, 1, 2.2e9, 3.7e12, 2, 256, 2, 1, 64 * MIB),
}


def chip_named(name: str) -> Chip:
    """The chip, or a ValueError naming the legal ones."""
    if name not in CHIPS:
        raise ValueError(f"chip={name!r} is unknown; legal: {', '.join(CHIPS)}")
    return CHIPS[name]


def one_device(name: str):
    """One abstract device of the chip (`jax.Device`) to compile for; libtpu must be installed."""
    from jax.experimental import topologies

    chip = chip_named(name)
    config = {"chip_config_name": "megacore"} if chip.megacore else {}
    description = topologies.get_topology_desc(
        platform="tpu",
        topology_name=chip.topology,
        chips_per_host_bounds=(2, 2, 1),
        **config,
    )
    return description.devices[0]
