"""What runs outside the Pallas kernels, charged by the bytes it moves: the whole model.

Every other operation of the scheduled program reads each of its operands and writes its result
once, at the chip's HBM bandwidth, one after the other; buffers that the compiler keeps in VMEM
(layout S(1)) are free. So a reduction of partial sums, a transpose, a cast or a delta costs
bytes / bandwidth x clock cycles, and no arithmetic of theirs is charged.
"""

import re

from tpu_compiler.topology import Chip

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16}
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "copy-done",
    "async-done",
    "slice-done",
    "dynamic-slice-done",
    "after-all",
    "partition-id",
    "iota",
)
_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|f8\w+|[fsu]\d+)\[([\d,]*)\](\{[^}]*\})?")


def outside_bytes(hlo: str) -> dict[str, int]:
    """{operation name: HBM bytes} of the entry computation, Pallas calls left out.

    Raises:
      ValueError: a loop outside the kernels (its body would be counted once).
    """
    entry = hlo[hlo.index("\nENTRY ") :].split("\n}", 1)[0]
    shapes: dict[str, str] = {}
    found: dict[str, int] = {}
    for line in entry.splitlines()[1:]:
        match = _LINE.match(line)
        if not match:
            continue
        name, shape, op, rest = match.groups()
        shapes[name] = shape
        if op in _FREE or 'custom_call_target="tpu_custom_call"' in line:
            continue
        if op in ("while", "conditional", "call"):
            raise ValueError(f"%{name} is a {op} outside the kernels: outside.py cannot count it")
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ", 1)[0])
        # copy-start's result names its operand again, and a context
        read = sum(_hbm_bytes(shapes.get(operand, "")) for operand in operands)
        written = _hbm_bytes(_SHAPE.search(shape)[0] if op.endswith("-start") else shape)
        if moved := read + written:
            found[name] = moved
    return found


def outside_cycles(hlo: str, chip: Chip) -> float:
    """Cycles of one TensorCore while the operations outside the kernels move their bytes."""
    return sum(outside_bytes(hlo).values()) / chip.hbm_bytes_per_s * chip.clock_hz


def _hbm_bytes(shapes: str) -> int:
    total = 0
    for dtype, dims, layout in _SHAPE.findall(shapes):
        if re.search(r"S\(\d\)", layout):
            continue
        count = 1
        for dim in dims.split(","):
            count *= int(dim or 1)
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
        total += count * bits // 8
    return total
