"""Collectives of a compiled program: what moves, over which mesh axes, and how long links take."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lemur_jax.plan.groups import Groups, group_axes, replica_groups
from lemur_jax.plan.hlo import Instruction

if TYPE_CHECKING:
    from lemur_jax.plan.chips import Chip

OPCODES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective.

    Attributes:
      opcode: without -start and -done. A reduction that XLA fused with the slice that keeps one
        part of it counts as "reduce-scatter".
      dtype: of its largest array, as HLO prints it.
      payload_bytes: of the whole array on one device: gathered, reduced, before it is scattered.
      devices: of one group. axes: the mesh axes that they span.
      asynchronous: XLA may compute while it runs.
      slices: TPU slices that a group spans; above 1 part of it runs over the slow network.
      torus_axes: over how many axes of the torus XLA says that it routes it; 0 if it does not say.
      channel: its number, shared by the pieces of one collective; 0 if it has none.
      op_name: where it comes from.
    """

    opcode: str
    dtype: str
    payload_bytes: int
    devices: int
    axes: str
    asynchronous: bool
    slices: int
    torus_axes: int
    channel: int
    op_name: str

    @property
    def link_bytes(self) -> float:
        """Bytes that a device sends around a ring: a reduction goes around twice."""
        if self.opcode == "collective-permute":
            return float(self.payload_bytes)
        rounds = 2 if self.opcode == "all-reduce" else 1
        return rounds * self.payload_bytes * (self.devices - 1) / self.devices

    def seconds(self, chip: "Chip", most_axes: int) -> float:
        """Time on the links of one slice, and between slices, one after the other.

        Groups of up to 16 devices are given one axis of the torus, up to 64 two, larger ones
        three; never more than `most_axes` or than the chip has. A model: XLA's own latency model
        gives every group one.
        """
        inside = self.devices // self.slices
        axes = 1 if inside <= 16 else 2 if inside <= 64 else 3
        if self.opcode == "collective-permute":
            axes = 1
        seconds = 0.0
        if inside > 1:
            seconds = self.link_bytes / chip.ici_bytes_per_s / min(axes, most_axes, chip.dimensions)
        if self.slices > 1:  # each device's part crosses between the slices
            part = self.link_bytes / max(inside, 1)
            seconds += part / chip.dcn_bytes_per_s
        return seconds


def transfer(
    collective: Instruction,
    mesh: Mapping[str, int],
    *,
    asynchronous: bool,
    scatters: bool = False,
    slices: int = 1,
) -> Transfer:
    """Reads one collective.

    Args:
      collective: the instruction with the replica groups.
      mesh: sizes by axis name, outermost first.
      scatters: an all-reduce of which each device keeps a part (an all-reduce-scatter fusion).
      slices: TPU slices of the mesh, along its outermost axis.
    """
    devices = 1
    for size in mesh.values():
        devices *= size
    groups = replica_groups(collective, devices)
    start = collective.opcode.endswith("-start")
    opcode = collective.opcode.removesuffix("-start")
    size = max(map(len, groups))
    # The result of a start holds its operands and the result that the done will give.
    payload = max(s.nbytes for s in collective.shapes) if start else collective.nbytes
    if opcode == "reduce-scatter" and not start:
        payload *= size
    axes = group_axes(groups, mesh)
    if opcode == "collective-permute":  # its rings need not be all of what the axes span
        axes = axes.split(" (")[0]
    channel = re.search(r"channel_id=(\d+)", collective.rest)
    routed = re.search(r"num_dims:(\d+) active_dims:(\d+)", collective.rest)
    return Transfer(
        opcode="reduce-scatter" if scatters else opcode,
        dtype=max(collective.shapes, key=lambda s: s.nbytes).dtype,
        payload_bytes=payload,
        devices=size,
        axes=axes,
        asynchronous=asynchronous,
        slices=_slices(groups, devices // slices),
        torus_axes=routed.group(2).count("1") if routed else 0,
        channel=int(channel.group(1)) if channel else 0,
        op_name=collective.op_name,
    )


def between_slices(send: Instruction, mesh: Mapping[str, int], slices: int) -> Transfer | None:
    """A collective between slices, which XLA leaves to the hosts as a send and a receive of what
    each device has; None for another send."""
    match = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.rest)
    if not match:
        return None
    sent = send.shapes[0]
    channel = re.search(r"channel_id=(\d+)", send.rest)
    return Transfer(
        opcode=match.group(1).lower().replace("_", "-"),
        dtype=sent.dtype,
        payload_bytes=sent.nbytes,
        devices=slices,
        axes=f"{next(iter(mesh))} (slices)",
        asynchronous=True,
        slices=slices,
        torus_axes=0,
        channel=int(channel.group(1)) if channel else 0,
        op_name=send.op_name,
    )


def _slices(groups: Groups, per_slice: int) -> int:
    return max(len({device // per_slice for device in group}) for group in groups)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same mesh axes, in one step on one device.

    Attributes:
      instructions: in the program text; times: executions.
      payload_bytes: over all executions.
      seconds: by torus axes (3 and 1) at the model's rates.
      torus_axes: that XLA says it routes them over; 0 if it does not say.
    """

    opcode: str
    axes: str
    dtype: str
    asynchronous: bool
    instructions: int
    times: float
    payload_bytes: float
    seconds: Mapping[int, float]
    torus_axes: int


def by_mesh_axis(transfers: Iterable[tuple[float, Transfer]], chip: "Chip") -> list[Traffic]:
    """Sums (times, transfer) up by kind, mesh axes, element type and whether asynchronous; most
    bytes first."""
    groups: dict[tuple, list[tuple[float, Transfer]]] = {}
    for times, t in transfers:
        groups.setdefault((t.opcode, t.axes, t.dtype, t.asynchronous), []).append((times, t))
    traffic = [
        Traffic(
            *key,
            instructions=len(members),
            times=sum(times for times, _ in members),
            payload_bytes=sum(times * t.payload_bytes for times, t in members),
            seconds={a: sum(n * t.seconds(chip, a) for n, t in members) for a in (3, 1)},
            torus_axes=max(t.torus_axes for _, t in members),
        )
        for key, members in groups.items()
    ]
    return sorted(traffic, key=lambda t: -t.payload_bytes)
