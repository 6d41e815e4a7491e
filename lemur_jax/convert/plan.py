"""What a conversion will do, before it does anything: blocks, bytes, memory, time."""

import hashlib
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lemur_jax.convert import grain
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.model import Source
from lemur_jax.convert.stored import Region, Shape
from lemur_jax.convert.targets import Leaf, Target

USUAL_BLOCK_BYTES = 32 << 20  # a chunk of a checkpoint; large enough for any disk
# A leaf is cut no finer, whatever the budget: a plan has a bounded number of blocks.
LEAST_BLOCK_BYTES = 1 << 20
# The interpreter with JAX, Orbax and TensorStore, headers, journal, chunks in flight: a constant,
# so that the same flags make the same plan, and a killed conversion can go on.
PROGRAM_BYTES = 512 << 20
COPIES = 4  # of a block: as read, in our order, cast or padded, on its way to the disk
WORKERS = 8  # at most, and no more than the machine has cores
_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class Block:
    """A part of a leaf that is read, turned and written as one."""

    number: int
    name: str
    region: Region
    bytes_in: int
    bytes_out: int

    @property
    def memory(self) -> int:
        """Bytes that it takes while it is at work."""
        return COPIES * max(self.bytes_in, self.bytes_out)


@dataclass(frozen=True)
class Plan:
    """All blocks, in order, and what they need.

    Attributes:
      blocks: the same for the same source, flags and budget.
      bytes_in, bytes_out: of weights.
      leaves: how many tensors of ours.
      files_bytes: what the destination needs on disk.
      budget: bytes that blocks may take at a time.
      peak: expected resident memory of the process, bytes.
      max_ram: the budget asked for.
    """

    blocks: Sequence[Block]
    bytes_in: int
    bytes_out: int
    leaves: int
    files_bytes: int
    budget: int
    peak: int
    max_ram: int

    def digest(self) -> str:
        """Of all blocks: another plan is not gone on with."""
        text = repr([(block.name, block.region) for block in self.blocks])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_bytes(text: str) -> int:
    """4GiB, 500MB, 1048576 -> bytes.

    Raises:
      ConversionError: not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise ConversionError([f"--max_ram={text!r} is no size: write 4GiB, 500MB or bytes"])
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


def show_bytes(count: float) -> str:
    """For people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


@dataclass(frozen=True)
class Part:
    """A leaf that is to be cut: name, shape, bytes of an element, and where each side may."""

    name: str
    shape: Shape
    width: int
    a: grain.Grain
    b: grain.Grain


def block_shapes(
    parts: Sequence[Part], max_ram: int, copies: int, usual: int = USUAL_BLOCK_BYTES
) -> dict[str, Shape]:
    """The shape of each leaf's blocks.

    Args:
      parts: the leaves.
      max_ram: bytes of resident memory that the process may reach.
      copies: of a block that are held at a time.
      usual: bytes of a block where it can be cut cheaply.

    Raises:
      ConversionError: too little; names the least that would do.
    """
    budget = max_ram - PROGRAM_BYTES
    most = max(budget // copies, LEAST_BLOCK_BYTES)
    found, sizes = {}, {}
    for part in parts:
        shape = grain.block_shape(part.shape, part.width, part.a, part.b, usual, most)
        found[part.name], sizes[part.name] = shape, math.prod(shape) * part.width
    name = max(sizes, key=sizes.__getitem__)
    if copies * sizes[name] > budget:
        raise ConversionError(
            [
                f"--max_ram={show_bytes(max_ram)} is too little: {name} is not cut into parts of "
                f"less than {show_bytes(sizes[name])}, of which {copies} are held beside "
                f"{show_bytes(PROGRAM_BYTES)} of program; the least is "
                f"{_up(PROGRAM_BYTES + copies * sizes[name])}"
            ]
        )
    return found


def make_plan(source: Source, leaves: Sequence[Leaf], target: Target, max_ram: int) -> Plan:
    """Cuts every leaf into blocks that fit the budget.

    Args:
      source: to read from.
      leaves: as they will be written.
      target: to write to.
      max_ram: bytes of resident memory that the process may reach.

    Raises:
      ConversionError: too little; names the least that would do.
    """
    budget = max_ram - PROGRAM_BYTES
    usual = min(USUAL_BLOCK_BYTES, max(budget // (WORKERS * COPIES), LEAST_BLOCK_BYTES))
    parts = [
        Part(
            leaf.name,
            leaf.shape,
            max(source.dtype(leaf.name).itemsize, leaf.dtype.itemsize),
            leaf.source,
            target.grain(leaf.name),
        )
        for leaf in leaves
    ]
    shapes = block_shapes(parts, max_ram, COPIES, usual)
    blocks: list[Block] = []
    for leaf in leaves:
        width_in, width_out = source.dtype(leaf.name).itemsize, leaf.dtype.itemsize
        for region in grain.regions(leaf.shape, shapes[leaf.name]):
            count = math.prod(part.stop - part.start for part in region)
            blocks.append(
                Block(len(blocks), leaf.name, region, count * width_in, count * width_out)
            )
    largest = max(blocks, key=lambda block: block.memory)
    return Plan(
        blocks=blocks,
        bytes_in=sum(block.bytes_in for block in blocks),
        bytes_out=sum(block.bytes_out for block in blocks),
        leaves=len(leaves),
        files_bytes=target.total_bytes,
        budget=budget,
        peak=PROGRAM_BYTES + min(budget, max(largest.memory, WORKERS * _median(blocks))),
        max_ram=max_ram,
    )


def _up(count: int) -> str:
    return f"{-(-count // 2**20)}MiB"


def _median(blocks: Sequence[Block]) -> int:
    heavy = sorted((block.memory for block in blocks), reverse=True)
    return heavy[min(len(heavy) - 1, WORKERS)]


def check_space(directory: Path, needed: int) -> None:
    """Raises ConversionError unless the disk of `directory` has `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConversionError(
            [f"{directory} has {free} bytes free, {needed} are needed: free some space there"]
        )


def describe(plan: Plan, bytes_per_second: float) -> str:
    """The plan in a few lines."""
    seconds = max(plan.bytes_in, plan.bytes_out) / bytes_per_second
    return "\n".join(
        [
            f"plan: {plan.leaves} leaves in {len(plan.blocks)} blocks; "
            f"{show_bytes(plan.bytes_in)} in, {show_bytes(plan.bytes_out)} out "
            f"({show_bytes(plan.files_bytes)} on disk)",
            f"      memory: {show_bytes(plan.peak)} expected at the peak, "
            f"--max_ram={show_bytes(plan.max_ram)}",
            f"      time: about {seconds:.0f} s at {show_bytes(bytes_per_second)}/s (a guess, "
            "until the progress line measures it)",
        ]
    )
