"""Reads scheduled, optimized HLO text: `compiled.as_text()` of a program compiled for a TPU.

Only what the analyses need: computations, instructions in the order they are scheduled, shapes
with their memory space, who calls whom, how often loops run, and each instruction's origin in the
model's source (`op_name`). Imports nothing but the standard library.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from lemur_jax.errors import LemurError

HBM, HOST = 0, 5  # memory spaces S(n); 1 is VMEM, 2 and 4 are semaphores and scalars, 3 v4's CMEM

_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-<>]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-<>]+)")


class HloError(LemurError, ValueError):
    """Text that is not the HLO of a compiled program."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: element type as HLO prints it, dimensions, memory space (0 is HBM)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes without the padding of the layout's tiles."""
        return math.ceil(self.size * element_bits(self.dtype) / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shapes: the arrays of the result; a tuple's are flattened.
      opcode: e.g. "fusion", "all-gather-start".
      operands: names of instructions of the same computation.
      inside: text between the parentheses: a parameter's number, a constant's value.
      rest: text after them: attributes, metadata, backend configuration.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str
    rest: str

    def attribute(self, name: str) -> str | None:
        """The word after `name=`: a computation, a kind, a number."""
        match = re.search(rf"(?<!\w){name}=%?([\w.\-<>]+)", self.rest)
        return match.group(1) if match else None

    @property
    def called(self) -> str | None:
        """The computation that a fusion, call or async start runs."""
        return self.attribute("calls") or self.attribute("to_apply")

    @property
    def op_name(self) -> str:
        """Where it comes from: JAX's name stack, "" if the compiler made it."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match.group(1) if match else ""

    @property
    def estimated_cycles(self) -> int:
        """XLA's own estimate of one execution, 0 where it gives none."""
        match = re.search(r'"?estimated_cycles"?:"(\d+)"', self.rest)
        return int(match.group(1)) if match else 0

    @property
    def hbm_bytes(self) -> int:
        """Bytes of those arrays of the result that lie in HBM."""
        return sum(shape.nbytes for shape in self.shapes if shape.space == HBM)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the result."""
        return sum(shape.nbytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name in schedule order; `root` is the name of the result's."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def get(self, name: str) -> Instruction | None:
        """The instruction of that name, None if it is not of this computation."""
        return self.instructions.get(name)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that make its operands."""
        return [self.instructions[n] for n in instruction.operands if n in self.instructions]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        return {int(i.inside): i for i in self if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Program:
    """A module. `header` is its first line: aliases of inputs and outputs, layouts."""

    header: str
    computations: dict[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction that the program runs `times` times; `path` are the loops around it, outermost
    first, as "name x trips". A conditional's branches count equal parts of an execution."""

    instruction: Instruction
    computation: Computation
    times: float
    path: tuple[str, ...]


def element_bits(dtype: str) -> int:
    """Bits of one element of an HLO type.

    Raises:
      HloError: not an HLO element type.
    """
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    match = re.match(r"(?:bf|[sufc])(\d+)", dtype)
    if not match:
        raise HloError(f"element type {dtype!r} is not one of HLO's")
    return int(match.group(1))


def parse(text: str) -> Program:
    """Reads a whole module.

    Raises:
      HloError: no entry computation, or the module is not scheduled.
    """
    header = text.split("\n", 1)[0]
    if not header.startswith("HloModule"):
        raise HloError(f"HLO text must begin with 'HloModule', not {header[:40]!r}")
    if "is_scheduled=true" not in header:
        raise HloError("the HLO is not scheduled: give compiled.as_text(), not the lowered text")
    computations: dict[str, Computation] = {}
    entry, name, root, lines = None, None, None, {}
    for line in text.split("\n")[1:]:
        if line.startswith("}") and name:
            computations[name] = Computation(name, lines, root or next(reversed(lines)))
            name = None
        elif name:
            if match := _INSTRUCTION.match(line):
                lines[match.group(2)] = _instruction(match.group(2), match.group(3))
                root = match.group(2) if match.group(1) else root
        elif match := _COMPUTATION.match(line):
            name, root, lines = match.group(2), None, {}
            entry = name if match.group(1) else entry
    if entry not in computations:
        raise HloError("the HLO text has no ENTRY computation, or ends before its closing brace")
    return Program(header, computations, entry)


def shapes_in(text: str) -> tuple[Shape, ...]:
    """Every array type in a piece of HLO text, in order."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = _SPACE.search(layout)
        size = tuple(int(d) for d in dims.split(",") if d)
        found.append(Shape(dtype, size, int(space.group(1)) if space else HBM))
    return tuple(found)


def _instruction(name: str, text: str) -> Instruction:
    if text.startswith("("):
        end = _closing(text, 0) + 1
    else:
        match = re.match(r"\w+\[[^\]]*\](\{[^}]*\})?", text)
        if not match:
            raise HloError(f"instruction {name}: no type in {text[:60]!r}")
        end = match.end()
    call = re.match(r"\s*([\w\-]+)\(", text[end:])
    if not call:
        raise HloError(f"instruction {name}: no opcode in {text[end : end + 60]!r}")
    start = end + call.end()
    close = _closing(text, start - 1)
    inside = text[start:close]
    return Instruction(
        name=name,
        shapes=shapes_in(text[:end]),
        opcode=call.group(1),
        operands=tuple(_NAME.findall(inside)),
        inside=inside,
        rest=text[close + 1 :],
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise HloError(f"parentheses do not close in {text[:60]!r}")


def executions(program: Program) -> Iterator[Execution]:
    """Every instruction that runs, loops' bodies, calls and branches entered, fusions not."""
    yield from _executions(program, program.entry, 1.0, ())


def _executions(program, name, times, path) -> Iterator[Execution]:
    computation = program.computations[name]
    for i in computation:
        if i.opcode == "while":
            trips = trip_count(program, computation, i)
            inner = (*path, f"{i.name} x {trips or '?'}")
            yield from _executions(program, i.attribute("body"), times * (trips or 1), inner)
        elif i.opcode == "call":
            yield from _executions(program, i.attribute("to_apply"), times, path)
        elif i.opcode == "conditional":
            inside = branches(i)
            for branch in inside:
                yield from _executions(program, branch, times / len(inside), path)
        else:
            yield Execution(i, computation, times, path)


def branches(conditional: Instruction) -> list[str]:
    """Names of a conditional's computations."""
    match = re.search(r"branch_computations=\{([^}]*)\}", conditional.rest)
    if match:
        return _NAME.findall(match.group(1))
    both = (conditional.attribute("true_computation"), conditional.attribute("false_computation"))
    return [name for name in both if name]


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs: what XLA wrote, or what its condition compares; None if neither
    says (a loop that ends on data)."""
    match = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if match:
        return int(match.group(1))
    condition = program.computations[loop.attribute("condition")]
    root = condition.instructions[condition.root]
    limits = [_constant(condition, name) for name in root.operands]
    compare = root
    if root.opcode == "fusion":
        inner = program.computations[root.called]
        compare = inner.instructions[inner.root]
        limits += [_constant(inner, name) for name in compare.operands]
    limit = next((value for value in limits if value is not None), None)
    counter = next(
        (i for i in condition.operands(root) if i.opcode == "get-tuple-element"),
        None,
    )
    if limit is None or compare.opcode != "compare" or counter is None:
        return None
    start = _initial(computation, loop, int(counter.attribute("index")))
    if start is None:
        return None
    direction = compare.attribute("direction")
    steps = {"LT": limit - start, "LE": limit - start + 1}
    steps |= {"GT": start - limit, "GE": start - limit + 1}
    return max(0, steps[direction]) if direction in steps else None


def _initial(computation: Computation, loop: Instruction, index: int) -> int | None:
    start = computation.get(loop.operands[0])
    if start is None or start.opcode != "tuple":
        return None
    return _constant(computation, start.operands[index])


def _constant(computation: Computation, name: str) -> int | None:
    while (i := computation.get(name)) is not None:
        if i.opcode == "constant":
            return int(i.inside) if re.fullmatch(r"-?\d+", i.inside) else None
        if i.opcode not in ("copy", "bitcast") or not i.operands:
            return None
        name = i.operands[0]
    return None
