"""Seconds and FLOPs of our own TPU kernels inside a compiled program, compiler-predicted.

XLA knows nothing about the inside of a custom call. What the kernels take was read from their own
compiled schedules when they were certified; here it is looked up and scaled to the shapes at hand.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from lemur_jax.plan.hlo import Computation, Instruction

if TYPE_CHECKING:
    from lemur_jax.plan.chips import Chip

HBM_SHARE = 0.85  # of the published bandwidth that a streaming kernel reaches

# cross_entropy_project: share of the matrix unit's peak, from kernels/.../cross_entropy/README.md.
# v7x was not costed there.
_PROJECT_SHARE = {"v4": 0.91, "v5e": 0.93, "v5p": 0.93, "v6e": 0.84, "v7x": 0.84}


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """One call on one device. `flops`: of its matrix products that the mathematics needs; of
    `recomputed`, those that it does again. `source` says where the seconds come from."""

    seconds: float
    flops: float
    recomputed: float
    source: str


KernelCosts = Callable[[Instruction, Computation], KernelCost | None]


def kernel_name(call: Instruction) -> str:
    """The `name` that a Pallas kernel was given, or the instruction's own."""
    match = re.search(r"(\w+)/pallas_call", call.op_name)
    return match.group(1) if match else call.name.split(".")[0]


def kernel_costs(chip: "Chip", sequence_length: int) -> KernelCosts:
    """What a custom call costs on a chip; None for a kernel or a shape that nothing is known of.

    Args:
      chip: peaks of one device.
      sequence_length: tokens of a row; the kernels' arrays hold whole rows one after the other.
    """
    known = {
        "lemur_attention_forward": _attention("forward", chip, sequence_length),
        "lemur_attention_backward": _attention("backward", chip, sequence_length),
        # Runs over the blocks whose scores were out of range: none in ordinary training.
        "lemur_attention_online": lambda call, _: KernelCost(0.0, 0.0, 0.0, "no block to repeat"),
        "lemur_cross_entropy_project": _project(chip),
        "lemur_cross_entropy_gradient": _streamed(chip),
    }

    def cost(call: Instruction, computation: Computation) -> KernelCost | None:
        rule = known.get(kernel_name(call))
        return rule(call, computation) if rule else None

    return cost


def _attention(direction: str, chip: "Chip", length: int) -> KernelCosts:
    from lemur_kernels.attention import shapes

    def cost(call: Instruction, computation: Computation) -> KernelCost | None:
        arrays = [o.shapes[0] for o in computation.operands(call) if len(o.shapes) == 1]
        arrays = [s for s in arrays if s.dtype in ("bf16", "f32") and len(s.dims) == 3]
        if len(arrays) < 2:
            return None
        (heads, tokens, head_dim), (kv_heads, keys) = arrays[0].dims, arrays[1].dims[:2]
        dtype = {"bf16": "bfloat16", "f32": "float32"}[arrays[0].dtype]
        wanted = shapes.Shape(chip.name, direction, dtype, head_dim, heads, kv_heads, length)
        try:
            certificate = shapes.certificate_for(wanted)
        except ValueError:
            return None  # the caller lists it as unknown
        had = certificate.shape
        rows, ways = keys / length, keys / tokens  # ways: devices that share a row's queries
        work = rows * heads / had.heads * (length / had.seq) ** 2
        if direction == "backward":  # in spans of the keys, one call each: what dk holds of them
            work *= call.shapes[1].dims[1] / keys
        # The last of the devices has (2 ways - 1) / ways^2 of the triangle: the rest waits for it.
        scale = work * (2 * ways - 1) / ways**2
        # one causal product: 2 FLOPs of half of T x T
        product = work * had.heads * head_dim * had.seq**2 / ways
        return KernelCost(
            seconds=1e3 * certificate.kcycles["causal"] * scale / chip.clock_hz,
            flops=(2 if direction == "forward" else 4) * product,
            recomputed=0.0 if direction == "forward" else product,  # the scores, again
            source=f"certified for {had.heads}/{had.kv_heads} heads, {had.seq} tokens",
        )

    return cost


def _project(chip: "Chip") -> KernelCosts:
    def cost(call: Instruction, computation: Computation) -> KernelCost | None:
        arrays = [s for o in computation.operands(call) for s in o.shapes if len(s.dims) == 2]
        matrices = [s for s in arrays if s.dtype in ("bf16", "f32") and min(s.dims) > 1]
        if len(matrices) != 2 or matrices[0].dims[1] != matrices[1].dims[0]:
            return None
        flops = 2.0 * math.prod(matrices[0].dims) * matrices[1].dims[1]
        share = _PROJECT_SHARE[chip.name]
        stream = _bytes(call, computation) / chip.hbm_bytes_per_s / HBM_SHARE
        seconds = max(flops / chip.flops_per_s / share, stream)
        return KernelCost(seconds, flops, 0.0, f"its products at {share:.0%} of peak")

    return cost


def _streamed(chip: "Chip") -> KernelCosts:
    def cost(call: Instruction, computation: Computation) -> KernelCost:
        seconds = _bytes(call, computation) / chip.hbm_bytes_per_s / HBM_SHARE
        return KernelCost(seconds, 0.0, 0.0, f"its bytes at {HBM_SHARE:.0%} of the bandwidth")

    return cost


def _bytes(call: Instruction, computation: Computation) -> int:
    return call.hbm_bytes + sum(o.hbm_bytes for o in computation.operands(call))
