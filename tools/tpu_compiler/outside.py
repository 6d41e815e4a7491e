"""What runs outside the Pallas kernels, charged by the bytes it moves: the whole model.

Every other operation of the scheduled program reads each of its operands and writes its result
once, at the chip's HBM bandwidth, one after the other. So a reduction of partial sums, a transpose,
a cast or a delta costs bytes / bandwidth x clock cycles. Arithmetic is not charged, nor are
asynchronous copies (the compiler's prefetch of a kernel's operands into VMEM or CMEM, which the
kernel would read anyway); an operation on such a prefetched buffer is charged like any other.
"""

import math
import re

from tpu_compiler.topology import Chip

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16}
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "copy-start",
    "copy-done",
    "after-all",
    "partition-id",
)
_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|f8\w+|[fsu]\d+)\[([\d,]*)\]")


def outside_bytes(hlo: str) -> dict[str, int]:
    """{operation name: HBM bytes} of the entry computation, Pallas calls left out.

    Raises:
      ValueError: a loop outside the kernels (its body would be counted once).
    """
    entry = hlo[hlo.index("\nENTRY ") :].split("\n}\n", 1)[0]
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
        found[name] = _bytes(shape) + sum(_bytes(shapes.get(name, "")) for name in operands)
    return found


def outside_cycles(hlo: str, chip: Chip) -> float:
    """Cycles of one TensorCore while the operations outside the kernels move their bytes."""
    return sum(outside_bytes(hlo).values()) / chip.hbm_bytes_per_s * chip.clock_hz


def _bytes(shapes: str) -> int:
    total = 0
    for dtype, dims in _SHAPE.findall(shapes):
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
        total += math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
    return total
