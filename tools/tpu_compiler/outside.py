"""What runs outside the Pallas kernels: bytes over bandwidth, matrix products as compiled.

Every other operation of the scheduled program reads each of its operands and writes its result
once, at the chip's HBM bandwidth, one after the other. So a reduction of partial sums, a transpose,
a cast or a delta costs bytes / bandwidth x clock cycles. An operation that holds a matrix product
costs at least the compiler's own estimated_cycles, which for products is its final schedule
(design/tpu.md, section 1). Other arithmetic is not charged, nor are asynchronous copies and slices
(the compiler's prefetch of a kernel's operands into VMEM or CMEM, which the kernel would read
anyway); an operation on such a prefetched buffer is charged like any other. A loop is charged its
body times its known trip count, a conditional its dearest branch.
"""

import math
import re
from typing import NamedTuple

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
    "slice-start",
    "slice-done",
    "after-all",
    "partition-id",
)
_FREE_CALLS = ("tpu_custom_call", "ConcatBitcast", "AllocateBuffer")  # kernels; no operation
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$", re.M)
_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", re.S)
_SHAPE = re.compile(r"\b(pred|bf16|f8\w+|[fsu]\d+)\[([\d,]*)\]")


class Cost(NamedTuple):
    """Of one operation: HBM bytes, and the cycles of a TensorCore for its matrix products."""

    bytes: int
    product_cycles: int = 0

    def cycles(self, chip: Chip) -> float:
        """The slower of the two."""
        return max(self.bytes / chip.hbm_bytes_per_s * chip.clock_hz, self.product_cycles)


def outside(hlo: str, chip: Chip, trips: int | None = None) -> dict[str, float]:
    """{operation: cycles of one TensorCore} of the scheduled program, Pallas calls left out.

    Args:
      trips: of a loop whose trip count the compiler does not state.

    Raises:
      ValueError: there is such a loop, and trips is None.
    """
    bodies, entry = {}, None
    for match in _HEAD.finditer(hlo):
        bodies[match[2]] = hlo[match.end() : hlo.index("\n}\n", match.end())]
        entry = match[2] if match[1] else entry
    return _computation(bodies, entry, chip, trips)


def _computation(
    bodies: dict[str, str], name: str, chip: Chip, trips: int | None
) -> dict[str, float]:
    shapes: dict[str, str] = {}
    found: dict[str, float] = {}
    for line in re.split(r"\n(?=  )", bodies[name]):
        match = _LINE.match(line)
        if not match:
            continue
        name, shape, op, rest = match.groups()
        shapes[name] = shape
        target = re.search(r'custom_call_target="(\w+)"', line)
        if op in _FREE or (target and target[1] in _FREE_CALLS):
            continue
        inner = [sum(_computation(bodies, c, chip, trips).values()) for c in _called(op, rest)]
        if op == "while":
            stated = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            if not stated and trips is None:
                raise ValueError(f"%{name} outside the kernels loops an unknown number of times")
            found[name] = (int(stated[1]) if stated else trips) * sum(inner)
        elif inner:
            found[name] = max(inner)
        else:
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ", 1)[0])
            moved = _bytes(shape) + sum(_bytes(shapes.get(x, "")) for x in operands)
            found[name] = Cost(moved, _product_cycles(bodies, op, line)).cycles(chip)
    return found


def _product_cycles(bodies: dict[str, str], op: str, line: str) -> int:
    fused = re.search(r"calls=%([\w.\-]+)", line)
    text = bodies.get(fused[1], "") if fused else f" {op}("
    if not re.search(r" (convolution|dot)\(", text):
        return 0
    estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
    return int(estimate[1]) if estimate else 0


def _called(op: str, rest: str) -> list[str]:
    """Computations that the operation runs as operations of their own (a fusion is one)."""
    if op == "while":
        return re.findall(r"body=%([\w.\-]+)", rest)
    if op in ("call", "async-start"):
        return re.findall(r"(?:to_apply|calls)=%([\w.\-]+)", rest)
    if op == "conditional":
        names = re.search(r"branch_computations=\{([^}]*)\}", rest)
        both = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", rest)
        return re.findall(r"%([\w.\-]+)", names[1]) if names else both
    return []


def _bytes(shapes: str) -> int:
    total = 0
    for dtype, dims in _SHAPE.findall(shapes):
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
        total += math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
    return total
