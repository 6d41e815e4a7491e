"""Which devices a collective joins, and what that is on the mesh.

Device numbers in a compiled program are positions in the flattened mesh, so the mesh's axis names
and sizes are all that is needed to name a group.
"""

import itertools
import math
import re
from collections.abc import Mapping

from lemur_jax.plan.hlo import HloError, Instruction

Groups = tuple[tuple[int, ...], ...]

_IOTA = r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?"
_MESH = re.compile(
    r"replica_groups=@?mesh\[([^\]]*)\](?:,?\s*device_ids=\(([^)]*(?:\([^)]*\))?[^)]*)\))?\s*\{([^}]*)\}"
)


def replica_groups(collective: Instruction, devices: int) -> Groups:
    """The groups of device numbers that a collective works in, in every form that XLA prints.

    Args:
      collective: an instruction of a collective opcode.
      devices: of the program; what an empty list of groups means.

    Raises:
      HloError: a form that is not known.
    """
    text = collective.rest
    if collective.opcode.startswith("collective-permute"):
        return _permuted(collective)
    if match := _MESH.search(text):
        return _mesh_groups(*match.groups(), collective)
    if match := re.search(rf"replica_groups={_IOTA}", text):
        tile, reshape, order = match.groups()
        groups, size = _numbers(tile)
        ids = _iota(_numbers(reshape) if reshape else [groups * size], order)
        return tuple(tuple(ids[g * size : (g + 1) * size]) for g in range(groups))
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        groups = tuple(tuple(_numbers(g)) for g in re.findall(r"\{([\d,]*)\}", match.group(1)))
        return groups or (tuple(range(devices)),)
    if match := re.search(r"group_size = (\d+)", text):  # an XLA pass's own note
        size = int(match.group(1))
        return tuple(tuple(range(i, i + size)) for i in range(0, devices, size))
    raise HloError(f"{collective.opcode} {collective.name}: no known replica_groups in its text")


def group_axes(groups: Groups, mesh: Mapping[str, int]) -> str:
    """The mesh axes that vary inside the groups: "fsdp", "data,fsdp", "tensor". A group that holds
    a part of what its axes span says so: "fsdp (8 of 256)". "none" for groups of one device.

    Args:
      groups: device numbers.
      mesh: sizes by axis name, outermost first.
    """
    sizes = list(mesh.values())
    if max(map(max, groups)) >= math.prod(sizes):
        raise HloError(f"device {max(map(max, groups))} is outside of the mesh {dict(mesh)}")
    varying = set()
    for group in groups:
        places = [_place(device, sizes) for device in group]
        varying |= {axis for axis in range(len(sizes)) if len({p[axis] for p in places}) > 1}
    names = [name for axis, name in enumerate(mesh) if axis in varying]
    whole = math.prod(mesh[name] for name in names)
    size = max(map(len, groups))
    if not names:
        return "none"
    return ",".join(names) + (f" ({size} of {whole})" if size != whole else "")


def _place(device: int, sizes: list[int]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        device, digit = divmod(device, size)
        place.append(digit)
    return tuple(reversed(place))


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n]


def _iota(dims: list[int], order: str | None) -> list[int]:
    """0, 1, ... in an array of `dims`, transposed, flattened."""
    axes = _numbers(order) or list(range(len(dims)))
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    places = itertools.product(*(range(dims[axis]) for axis in axes))
    return [sum(p * strides[a] for p, a in zip(place, axes, strict=True)) for place in places]


def _mesh_groups(mesh: str, ids: str | None, axes: str, collective: Instruction) -> Groups:
    """`mesh['a'=2,'b'=4] {'b'}`; an axis may be a part of one: 'b':(2)2, of 4, the inner 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    order = list(range(math.prod(sizes.values())))
    if ids:
        order = _device_ids(ids, len(order), collective)
    inside = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    dims: list[int] = []
    joined: list[bool] = []
    for name, size in sizes.items():
        parts = [(int(a), int(b)) if b else (1, size) for n, a, b in inside if n == name]
        before = 1
        for start, part in sorted(parts):
            dims += [start // before, part]
            joined += [False, True]
            before = start * part
        dims.append(size // before)
        joined.append(False)
    outer = [a for a, j in enumerate(joined) if not j]
    inner = [a for a, j in enumerate(joined) if j]
    moved = _iota(dims, ",".join(map(str, outer + inner)))
    size = math.prod(dims[a] for a in inner)
    return tuple(
        tuple(order[place] for place in moved[start : start + size])
        for start in range(0, len(moved), size)
    )


def _device_ids(text: str, count: int, collective: Instruction) -> list[int]:
    if match := re.match(r"\s*\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text):
        tile, reshape, order = match.groups()
        ids = _iota(_numbers(reshape or tile), order)
    else:
        ids = [int(n) for n in re.findall(r"\d+", text)]
    if sorted(ids) != list(range(count)):
        raise HloError(f"{collective.name}: device_ids=({text}) do not name {count} devices once")
    return ids


def _permuted(permute: Instruction) -> Groups:
    """The rings and chains of devices that a permute's pairs connect."""
    match = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", permute.rest)
    if not match:
        raise HloError(f"collective-permute {permute.name} has no source_target_pairs")
    parent: dict[int, int] = {}

    def find(device: int) -> int:
        while parent.setdefault(device, device) != device:
            device = parent[device]
        return device

    for source, target in re.findall(r"\{(\d+),(\d+)\}", match.group(1)):
        parent[find(int(source))] = find(int(target))
    groups: dict[int, list[int]] = {}
    for device in sorted(parent):
        groups.setdefault(find(device), []).append(device)
    return tuple(tuple(group) for group in groups.values())
