"""How many FLOPs an instruction does, and how many bytes of HBM it moves: exact counts, no time."""

import functools
import math
import re

from lemur_jax.plan.hlo import Computation, HloError, Instruction, Program

_PRODUCTS = ("dot", "convolution")


class Work:
    """Counts for one program; a fused computation is counted once and remembered."""

    def __init__(self, program: Program):
        self.program = program
        self._inside = functools.cache(self._inner_products)

    def products(self, i: Instruction, computation: Computation) -> list[tuple[str, float]]:
        """(origin, FLOPs) of its matrix products, fused ones included; 2 for each multiply-add.
        Elementwise work is not counted. The origin is the product's `op_name`."""
        if i.opcode in _PRODUCTS:
            return [(i.op_name, product_flops(i, computation))]
        if (i.opcode == "fusion" or i.opcode.endswith("-start")) and i.called:
            return [(name or i.op_name, flops) for name, flops in self._inside(i.called)]
        return []

    def hbm_bytes(self, instruction: Instruction, computation: Computation) -> int:
        """Bytes read from and written to HBM. Of an operand that is only sliced, the slice; of a
        buffer that is updated in place, the update."""
        i = instruction
        if i.opcode == "fusion":
            return self._fusion_bytes(i, computation)
        if i.opcode == "dynamic-update-slice":
            update = computation.get(i.operands[1])
            return 2 * update.nbytes if update else 0
        if i.opcode == "dynamic-slice":
            return 2 * i.nbytes
        return i.hbm_bytes + sum(o.hbm_bytes for o in computation.operands(i))

    def contains(self, name: str | None, opcodes: tuple[str, ...]) -> Instruction | None:
        """The first instruction of one of the opcodes in a computation or what it calls."""
        for i in self.program.computations.get(name, ()):
            if i.opcode in opcodes:
                return i
            inner = i.called if i.opcode in ("fusion", "call", "async-start") else None
            if found := self.contains(inner, opcodes):
                return found
        return None

    def _inner_products(self, name: str) -> list[tuple[str, float]]:
        computation = self.program.computations[name]
        found = []
        for i in computation:
            if i.opcode in _PRODUCTS:
                found.append((i.op_name, product_flops(i, computation)))
            elif i.opcode in ("fusion", "call"):
                found += [(inner or i.op_name, flops) for inner, flops in self._inside(i.called)]
        return found

    def _fusion_bytes(self, fusion: Instruction, computation: Computation) -> int:
        inner = self.program.computations[fusion.called]
        total = 0
        for number, parameter in inner.parameters.items():
            source = computation.get(fusion.operands[number])
            whole = source.hbm_bytes if source else 0
            if whole:
                part = self.read_bytes(inner, parameter.name)
                total += whole if part is None else min(whole, part)
        written = fusion.hbm_bytes
        return total + (min(written, self._written_bytes(inner, inner.root)) if written else 0)

    def read_bytes(self, computation: Computation, name: str) -> int | None:
        """Bytes of `name` that its users read; None if one of them reads all of it."""
        if name == computation.root:
            return None
        most = 0
        for user in computation.users[name]:
            if user.opcode == "dynamic-slice" and user.operands[0] == name:
                part = user.nbytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                part = 0
            elif user.opcode == "bitcast":
                part = self.read_bytes(computation, user.name)
            elif user.opcode == "fusion":
                inner = self.program.computations[user.called]
                parameter = inner.parameters[user.operands.index(name)]
                part = self.read_bytes(inner, parameter.name)
            else:
                part = None
            if part is None:
                return None
            most = max(most, part)
        return most

    def _written_bytes(self, computation: Computation, name: str) -> int:
        root = computation.instructions[name]
        if root.opcode == "tuple":
            return sum(self._written_bytes(computation, n) for n in root.operands)
        if root.opcode == "bitcast":
            return self._written_bytes(computation, root.operands[0])
        if root.opcode == "dynamic-update-slice":
            return computation.instructions[root.operands[1]].nbytes
        if root.opcode == "fusion":
            inner = self.program.computations[root.called]
            return self._written_bytes(inner, inner.root)
        return root.nbytes


def product_flops(product: Instruction, computation: Computation) -> float:
    """FLOPs of one dot or convolution (a TPU program writes most dots as convolutions).

    Raises:
      HloError: its operands or dimension labels are not in the text.
    """
    operands = computation.operands(product)
    if len(operands) < 2:
        raise HloError(f"{product.opcode} {product.name}: operands are not in {computation.name}")
    left, right, out = (x.shapes[0].dims for x in (*operands[:2], product))
    if product.opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.rest)
        contracted = [int(d) for d in match.group(1).split(",") if d] if match else []
        return 2.0 * math.prod(out) * math.prod(left[d] for d in contracted)
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.rest)
    if not match:
        raise HloError(f"convolution {product.name} has no dim_labels")
    left_labels, right_labels, out_labels = match.groups()
    flops = 2.0 * right[right_labels.index("i")]
    for label, size in zip(out_labels, out, strict=True):
        if not label.isdigit():
            flops *= size
    window = _window(product)
    for label in sorted(c for c in out_labels if c.isdigit()):
        flops *= _pairs(
            left[left_labels.index(label)],
            out[out_labels.index(label)],
            {key: values[int(label)] for key, values in window.items()},
            right[right_labels.index(label)],
        )
    return flops


def _window(convolution: Instruction) -> dict[str, list[str]]:
    match = re.search(r"(?<!\w)window=\{([^}]*)\}", convolution.rest)
    fields = (field.split("=") for field in match.group(1).split()) if match else ()
    return {key: values.split("x") for key, values in fields}


def _pairs(left: int, out: int, window: dict[str, str], kernel: int) -> int:
    """Pairs of an output position and a kernel position that meet an input: what a convolution
    multiplies along one spatial dimension. Padding and the holes of dilation cost nothing, so a
    batch dimension that XLA writes as a dilated spatial one counts each element once."""
    size = int(window.get("size", kernel))
    stride, dilate = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    step, low = int(window.get("rhs_dilate", 1)), int(window.get("pad", "0_0").split("_")[0])
    last = (left - 1) * dilate  # the last input's position
    common = math.gcd(stride, dilate)
    period = dilate // common
    count = 0
    for k in range(size):
        shift = k * step - low  # output o meets position o * stride + shift
        if shift % common:
            continue
        first = max(0, -(shift // stride))  # ceil(-shift / stride)
        end = min(out - 1, (last - shift) // stride)
        if period > 1:
            residue = (-shift // common) * pow(stride // common, -1, period) % period
            first += (residue - first) % period
        count += max(0, (end - first) // period + 1) if end >= first else 0
    return count
