"""The compiler's own buffer assignment: which value lies where in HBM, and when it is live.

libtpu writes it as text when a program is compiled with `dump_options`. It is exact: the same
numbers decide whether a program fits.
"""

import dataclasses
import re
from pathlib import Path

from lemur_jax.plan.hlo import HBM, HOST, HloError, Shape, shapes_in

SMALL = 4096  # bytes: smaller outputs are counted, not named

_ALLOCATION = re.compile(r"allocation \d+: size (\d+),?(.*):$")
_VALUE = re.compile(
    r" value: <(\d+) ([^{\s]+?)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> "
    r"\(size=(\d+),offset=(\d+)\): (.*)"
)
_PLACES = re.compile(r"^<(\d+) .*\n positions:\n((?:  \S.*\n)*)", re.M)
_RANGE = re.compile(r"    ([^{\s]+)\{([\d,]*)\}:(\d+)-(\d+)$")


@dataclasses.dataclass(frozen=True)
class Value:
    """One array in the temporary buffer.

    Attributes:
      name, index: of the instruction that makes it, and where in its result if that is a tuple.
      places: other instructions whose result it is.
      shape: as the program has it; a tuple's own table of pointers has none.
      first, last: the time, in scheduled instructions, of its birth and last use.
    """

    name: str
    index: tuple[int, ...]
    places: tuple[str, ...]
    shape: Shape | None
    offset: int
    size: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Assignment:
    """HBM of one program on one device, in bytes.

    Attributes:
      parameters: by the number of the entry computation's parameter.
      outputs: that alias no parameter; output_shapes: those of more than a few numbers, with their
        bytes. constants, small: what their names say; `small` is scratch
        of computations that hold a few scalars.
      temporary: the one buffer that all temporaries share over time; values: what lies in it.
      host: temporaries in the host's memory.
    """

    parameters: dict[int, int]
    outputs: int
    output_shapes: tuple[tuple[Shape, int], ...]
    constants: int
    small: int
    temporary: int
    values: tuple[Value, ...]
    host: int

    @property
    def total(self) -> int:
        """Bytes of HBM that the program takes, without its code."""
        known = sum(self.parameters.values()) + self.outputs + self.constants
        return known + self.small + self.temporary

    def peak(self) -> tuple[int, list[tuple[Value, int]]]:
        """The time at which most of the temporary buffer is live, and what is: (value, bytes that
        no value before it in the list covers), by offset."""
        best, live_then = -1, []
        moment = 0
        for time in sorted({value.first for value in self.values}):
            live = _covered([v for v in self.values if v.first <= time <= v.last])
            covered = sum(size for _, size in live)
            if covered > best:
                best, live_then, moment = covered, live, time
        return moment, live_then


def _covered(values: list[Value]) -> list[tuple[Value, int]]:
    found, end = [], 0
    for value in sorted(values, key=lambda v: (v.offset, -v.size)):
        top = value.offset + value.size
        if top > end:
            found.append((value, top - max(value.offset, end)))
            end = top
    return found


def dump_options(directory: Path) -> dict[str, str]:
    """Compiler options that make `lowered.compile(compiler_options=...)` write what `read_dump`
    reads. The directory must be empty or new, one for each program."""
    return {"xla_dump_to": str(directory)}


def read_dump(directory: Path) -> Assignment:
    """Reads what a compilation with `dump_options(directory)` wrote.

    Raises:
      HloError: not one program's dump.
    """
    found = sorted(directory.glob("*after_optimizations-buffer-assignment.txt"))
    if len(found) != 1:
        raise HloError(
            f"{directory} holds {len(found)} buffer assignments, not 1: compile one program into "
            "an empty directory, with xla_dump_to"
        )
    name = found[0].name
    ranges = found[0].with_name(name.replace("buffer-assignment", "live-range"))
    values = found[0].with_name(name.replace("assignment", "assignment-values"))
    return read_assignment(found[0].read_text(), ranges.read_text(), values.read_text())


def read_assignment(assignment: str, live_ranges: str, places: str = "") -> Assignment:
    """Reads the texts of *-buffer-assignment.txt, *-live-range.txt and, to name more values,
    *-buffer-assignment-values.txt.

    Raises:
      HloError: a temporary without a live range: the two are not of one program.
    """
    live = {
        (m.group(1), _index(m.group(2))): (int(m.group(3)), int(m.group(4)))
        for m in map(_RANGE.match, live_ranges.splitlines())
        if m
    }
    places_of = {
        m.group(1): tuple(re.findall(r"^  (\S+)", m.group(2), re.M))
        for m in _PLACES.finditer(places)
    }
    parameters: dict[int, int] = {}
    sums = {"outputs": 0, "constants": 0, "small": 0, "temporary": 0, "host": 0}
    values, shapes_out, base, inside, leaving = [], [], 0, False, 0
    for line in assignment.splitlines():
        if match := _ALLOCATION.match(line):
            size, kind = int(match.group(1)), match.group(2)
            inside, leaving, base = False, 0, sums["temporary"]
            color = re.search(r"color (\d+)", kind)
            space = int(color.group(1)) if color else HBM
            number = re.search(r"parameter (\d+)", kind)
            if space == HOST:
                sums["host"] += size
            if space != HBM:
                continue
            if number:
                parameters[int(number.group(1))] = size
            elif "constant" in kind:
                sums["constants"] += size
            elif "thread-local" in kind:
                sums["small"] += size
            elif "live-out" in kind:
                sums["outputs"] += size
                leaving = size
                if size > SMALL:
                    shapes_out.append((Shape("u8", (size,)), size))
            else:
                sums["temporary"] += size
                inside = True
        elif leaving > SMALL and (match := _VALUE.match(line)):
            shape = max(shapes_in(match.group(6)), key=lambda s: len(s.dims))
            if len(shape.dims) > len(shapes_out[-1][0].dims):  # other views of it are flatter
                shapes_out[-1] = (shape, leaving)
        elif inside and (match := _VALUE.match(line)):
            number, name, index, size, offset, shape = match.groups()
            key = (name, _index(index))
            if key not in live:
                raise HloError(f"value {name} {{{index or ''}}} has no live range in the dump")
            shapes = () if shape.startswith("(") else shapes_in(shape)
            values.append(
                Value(
                    *key,
                    places=places_of.get(number, ()),
                    shape=next(iter(shapes), None),
                    offset=base + int(offset),
                    size=int(size),
                    first=live[key][0],
                    last=live[key][1],
                )
            )
    if not parameters and not values:
        raise HloError("the text is no buffer assignment")
    return Assignment(parameters, values=tuple(values), output_shapes=tuple(shapes_out), **sums)


def _index(text: str | None) -> tuple[int, ...]:
    return tuple(int(n) for n in (text or "").split(",") if n)
