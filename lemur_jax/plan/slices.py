"""TPU slices by the names that users know: v4-512, v5e-256, v7x-128, 2xv4-256.

What N counts differs by generation. v4, v5p, v7x: TensorCores, two to a chip. v5e, v6e: chips, of
one core each. A JAX device is a chip, but on v7x a core: v4-512 is 256 devices, v7x-128 is 128.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import re

from lemur_jax.config import ConfigError
from lemur_jax.plan.chips import CHIPS, Chip

# Shapes smaller than a cube of 4 x 4 x 4 chips; larger slices are made of such cubes.
_SMALL_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBE = 4
# Generation -> chips of the largest slice, longest side. v5p: up to 6144 chips are sold as one
# slice, and two pods beyond. v7x: as v5p, and its own largest.
_LIMITS = {"v4": (4096, 16), "v5p": (6144, 244), "v7x": (6144, 244)}
_PODS = {
    "v5p": ((12, 24, 24), (16, 20, 28)),
    "v7x": ((12, 24, 24), (16, 16, 32), (16, 20, 28), (16, 24, 24)),
}

_OTHER_NAMES = {"tpu7x": "v7x", "v5litepod": "v5e", "v5": "v5p"}  # as other tools say it


@dataclasses.dataclass(frozen=True)
class Slice:
    """One or several equal TPU slices.

    Attributes:
      name: as the user wrote it.
      chip: generation.
      shape: chips of each slice along its axes.
      slices: how many, connected by the data-centre network.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes are rings. 3D: all of them once a slice is made of whole cubes; 2D: a full
        side of 16."""
        if self.chip.dimensions == 2:
            return (*(side == 16 for side in self.shape), False)
        return (all(side % _CUBE == 0 for side in self.shape),) * 3

    def description(self) -> str:
        """One line: `v4-512: 256 chips (4x8x8 torus), 256 devices of 30.75 GiB`."""
        axes = "x".join(map(str, self.shape))
        kind = "torus" if all(self.wrap[: self.chip.dimensions]) else "mesh"
        if any(self.wrap) and kind == "mesh":
            kind = "mesh, one axis a ring"
        each = f"{self.slices} x {axes} {kind}" if self.slices > 1 else f"{axes} {kind}"
        return (
            f"{self.name}: {self.chips} chips ({each}), {self.devices} JAX devices of "
            f"{self.chip.hbm_bytes / 2**30:.2f} GiB HBM"
        )


@functools.cache
def shapes(chip: str) -> dict[int, tuple[int, ...]]:
    """N of a legal name -> chips along each axis: of several shapes, the most compact."""
    spec = CHIPS[chip]
    cores = spec.cores * spec.devices
    if spec.dimensions == 2:
        found = _2D
    else:
        found = (*_SMALL_3D, *_cubes(*_LIMITS[chip]), *_PODS.get(chip, ()))
    return {cores * math.prod(shape): shape for shape in found}


def _cubes(most_chips: int, longest: int) -> list[tuple[int, int, int]]:
    """For each number of cubes, the box nearest to a cube."""
    best: dict[int, tuple[int, int, int]] = {}
    most, side = most_chips // _CUBE**3, longest // _CUBE
    for a in range(1, round(most ** (1 / 3)) + 1):
        for b in range(a, math.isqrt(most // a) + 1):
            for c in range(b, min(most // (a * b), side) + 1):
                n = a * b * c
                if n not in best or a + b + c < sum(best[n]):
                    best[n] = (a, b, c)
    return [tuple(_CUBE * x for x in best[n]) for n in sorted(best)]


def legal_names(chip: str) -> list[str]:
    """Names of one slice of a generation, smallest first."""
    return [f"{chip}-{n}" for n in shapes(chip)]


def slice_named(name: str) -> Slice:
    """The slice of a name such as `v4-512` or `2xv4-256`.

    Raises:
      ConfigError: no such slice; lists the legal names of the generation, the nearest first.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+?)-(\d+)", name.strip())
    chip = (
        {"tpu7x": "v7x", "v7": "v7x", "v5litepod": "v5e"}.get(match[2], match[2]) if match else ""
    )
    if not match or chip not in CHIPS or match[1] == "0":
        near = difflib.get_close_matches(name, _all_names(), n=3, cutoff=0.3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ConfigError(
            [
                f"topology={name!r} is unknown: {hint}A name is GENERATION-N, or KxGENERATION-N "
                f"for K slices. {_legend()}"
            ]
        )
    n, slices = int(match[3]), int(match[1] or 1)
    if n not in shapes(chip):
        nearest = sorted(shapes(chip), key=lambda legal: abs(math.log(max(n, 1) / legal)))
        raise ConfigError(
            [
                f"topology={name!r}: {chip} has no slice of {n} {_counted(chip)}; nearest first: "
                f"{', '.join(f'{chip}-{legal}' for legal in nearest[:12])}"
                + (f", and {len(nearest) - 12} more" if len(nearest) > 12 else "")
            ]
        )
    return Slice(name.strip(), CHIPS[chip], shapes(chip)[n], slices)


def _counted(chip: str) -> str:
    if CHIPS[chip].cores * CHIPS[chip].devices == 1:
        return "chips"
    return "TensorCores (two a chip)"


def _legend() -> str:
    lines = []
    for chip in CHIPS:
        names = legal_names(chip)
        shown = names if len(names) <= 12 else [*names[:10], "...", names[-1]]
        lines.append(f"{chip}, N = {_counted(chip)}: {', '.join(shown)}")
    return "\n  ".join(["Legal:", *lines])


def _all_names() -> list[str]:
    return list(itertools.chain.from_iterable(map(legal_names, CHIPS)))


def topology(where: Slice):
    """libtpu's description of the slice: `.devices` to compile for, none of them attached.

    Raises:
      CompilerMissing: libtpu is not installed, or another version.
      LemurError: libtpu refuses.
    """
    from jax.experimental import topologies

    from lemur_jax.plan import libtpu

    options = {}
    if where.chip.megacore:
        options["chip_config_name"] = "megacore"
    if where.slices > 1:
        options["num_slices"] = where.slices
    small = math.prod(where.shape) < 4
    libtpu.prepare()
    with libtpu.explained():
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{where.chip.platform}:{'x'.join(map(str, where.shape))}",
            chips_per_host_bounds=(1, 1, 1) if small else (2, 2, 1),
            wrap=where.wrap,
            **options,
        )
