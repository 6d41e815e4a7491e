"""A model of the time of a compiled program, from its schedule: never a measurement.

The rules, each an assumption (tpu.md section 2 says what each was checked against):

- a matrix product takes XLA's own estimate, at least the roofline and at most 1.6 times it;
- anything else takes the smaller of XLA's estimate and its HBM bytes at 85 % of the bandwidth;
- a Pallas kernel takes what its certificate says, an unknown one its bytes at that rate;
- a collective takes its bytes around a ring over one, two or three axes of the torus;
- an asynchronous collective is hidden behind the computation, or not at all: the two ends.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lemur_jax.plan import collectives
from lemur_jax.plan.collectives import Traffic, Transfer
from lemur_jax.plan.hlo import Execution, Instruction, Program, executions, trip_count
from lemur_jax.plan.kernels import HBM_SHARE, KernelCost, kernel_name
from lemur_jax.plan.work import Work

if TYPE_CHECKING:
    from lemur_jax.plan.chips import Chip

MOST_OF_ROOFLINE = 1.6  # a product whose estimate is beyond it is believed to overlap
UNSEEN_SLICE = 2.5  # times XLA's estimate: bytes beyond it are of a slice that we do not see
ASSUMPTIONS = (
    "matrix products at XLA's estimated cycles, within 1 to 1.6 times the roofline",
    "other operations at the smaller of XLA's estimate and HBM bytes / 85 % of the bandwidth",
    "Pallas kernels at their certified cycles (every row one document), no DMA waits",
    "collectives around rings at 90 % of the published link bandwidth; 3 axes: groups above 64 "
    "devices over three axes of the torus, above 16 over two; 1 axis: XLA's own rate",
    "hidden: asynchronous collectives overlap perfectly; exposed: not at all",
    "between slices: each device's share of its host's network, one transfer at a time",
    "nothing is charged for dispatch, host transfers, stragglers or input",
)

# Kinds of rows.
PRODUCT = "matmul"
FUSED = "matmul with a collective in it"
SYNC = "collective, synchronous"
ASYNC = "collective, asynchronous"
KERNEL = "Pallas kernel"
MEMORY = "memory-bound"
COPY = "asynchronous copy"

_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "recv",
)  # fmt: skip
_NO_WORK = ("AllocateBuffer", "Sharding", "AssumeGatherIndicesInBound", "AddLhs", "ResizeTo")


@dataclasses.dataclass(frozen=True)
class Row:
    """One instruction, in one step on one device.

    Attributes:
      times: executions. path: the loops around it.
      seconds: of one execution; 0 for a collective, whose `transfer` says how long by axes.
      flops: of one execution, matrix products and kernels. recomputed: those of them that the
        backward pass does again.
      hbm_bytes: of one execution.
      xla_seconds: XLA's own estimate of one execution, 0 where it gives none.
    """

    name: str
    kind: str
    times: float
    path: tuple[str, ...]
    op_name: str
    seconds: float
    flops: float
    recomputed: float
    hbm_bytes: int
    xla_seconds: float
    transfer: Transfer | None = None


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of one step on one device. hardware = model + recomputed + accidental.

    `model`: what the mathematics needs (given). `recomputed`: what the rematerialisation policy
    and the kernels do again. `accidental`: the rest: work that nobody asked for, such as a
    partitioner that computes a product twice; negative where the compiler found a saving.
    """

    hardware: float
    model: float
    recomputed: float

    @property
    def accidental(self) -> float:
        """hardware - model - recomputed."""
        return self.hardware - self.model - self.recomputed


@dataclasses.dataclass(frozen=True)
class Cost:
    """Predicted cost of one run of a program on one device of a chip.

    Attributes:
      unknown: what the model had to guess, one line each; empty if it knew everything.
      collectives: by kind and mesh axes, most bytes first.
    """

    chip: "Chip"
    rows: tuple[Row, ...]
    unknown: tuple[str, ...]
    collectives: tuple[Traffic, ...]

    def seconds_of(self, kind: str, axes: int = 3) -> float:
        """Of all rows of a kind; collectives over at most `axes` of the torus."""
        rows = (row for row in self.rows if row.kind == kind)
        if kind in (SYNC, ASYNC):
            return sum(r.times * r.transfer.seconds(self.chip, axes) for r in rows)
        return sum(r.times * r.seconds for r in rows)

    @property
    def compute_seconds(self) -> float:
        """All but the collectives that stand alone."""
        kinds = {row.kind for row in self.rows} - {SYNC, ASYNC}
        return sum(self.seconds_of(kind) for kind in sorted(kinds))

    def step_seconds(self, axes: int, hidden: bool) -> float:
        """One corner of the interval: collectives over at most `axes` of the torus, the
        asynchronous ones hidden behind the computation or exposed."""
        waiting = self.seconds_of(ASYNC, axes)
        if hidden:  # XLA hides them in the products it fused them with, if it made such fusions
            behind = self.seconds_of(FUSED) or self.compute_seconds
            waiting = max(0.0, waiting - behind)
        return self.compute_seconds + self.seconds_of(SYNC, axes) + waiting

    @property
    def corners(self) -> dict[tuple[int, str], float]:
        """Seconds of a step by (torus axes, "hidden" or "exposed")."""
        return {
            (axes, "hidden" if hidden else "exposed"): self.step_seconds(axes, hidden)
            for axes in (3, 1)
            for hidden in (True, False)
        }

    @property
    def interval(self) -> tuple[float, float]:
        """Seconds of a step: all hidden at 3 axes, none hidden at 1 axis."""
        return self.step_seconds(3, True), self.step_seconds(1, False)

    @property
    def kinds(self) -> dict[str, float]:
        """Seconds by kind of row at 3 axes, longest first."""
        kinds = {row.kind for row in self.rows}
        return dict(sorted(((k, self.seconds_of(k)) for k in kinds), key=lambda kv: -kv[1]))

    def flops(self, model: float) -> Flops:
        """The FLOPs of a step against `model`, those that the mathematics needs on one device
        (lemur_jax.train.metrics.flops_per_token times tokens over devices)."""
        return Flops(
            hardware=sum(r.times * r.flops for r in self.rows),
            model=model,
            recomputed=sum(r.times * r.recomputed for r in self.rows),
        )


def cost(
    program: Program,
    chip: "Chip",
    kernel_seconds: Callable[..., KernelCost | None],
    mesh: Mapping[str, int],
    slices: int = 1,
) -> Cost:
    """Predicts what a compiled program takes.

    Args:
      program: one partition's program (hlo.parse).
      chip: peaks of one device (lemur_jax.plan.chips.Chip).
      kernel_seconds: (custom call, its computation) -> KernelCost; None where nothing is known
        (lemur_jax.plan.kernels.kernel_costs).
      mesh: sizes by axis name, outermost first.
      slices: TPU slices of the mesh, along its outermost axis.
    """
    work, rows, unknown = Work(program), [], dict.fromkeys(_loops_without_count(program))
    for run in executions(program):
        i = run.instruction
        if i.opcode in _FREE and not i.estimated_cycles:
            continue
        moved = _collective(i, work, mesh, slices)
        if i.opcode.endswith(("-done", "-update")) or moved == "done":
            continue
        if i.opcode == "custom-call" and any(f'target="{w}' in i.rest for w in _NO_WORK):
            continue
        row = _row(run, work, chip, moved)
        if 'custom_call_target="tpu_custom_call"' in i.rest:
            row = _kernel_row(row, run, chip, kernel_seconds, unknown)
        rows.append(row)
    transfers = ((r.times, r.transfer) for r in rows if r.transfer and r.kind != FUSED)
    traffic = collectives.by_mesh_axis(transfers, chip)
    return Cost(chip, tuple(rows), tuple(unknown), tuple(traffic))


def _collective(i: Instruction, work: Work, mesh, slices) -> "tuple[str, Transfer] | str | None":
    """The kind of row of a collective and what it moves; "done" for the end of one."""
    base = i.opcode.removesuffix("-start")
    if base == "send":
        moved = collectives.between_slices(i, mesh, slices)
        return (ASYNC, moved) if moved else None
    if base in collectives.OPCODES:
        started = i.opcode.endswith("-start")
        moved = collectives.transfer(i, mesh, asynchronous=started, slices=slices)
        return (ASYNC if started else SYNC), moved
    if not (i.opcode == "fusion" or i.opcode.endswith("-start")) or not i.called:
        return None
    names = (*collectives.OPCODES, *(f"{name}-start" for name in collectives.OPCODES))
    inner = work.contains(i.called, names)
    if inner is None:
        return None
    if i.name.startswith("async-collective-done"):
        return "done"
    started = i.opcode != "fusion" or i.name.startswith("async-collective-start")
    fused = work.contains(i.called, ("dot", "convolution")) is not None
    scatters = "all-reduce-scatter" in i.called
    moved = collectives.transfer(
        inner, mesh, asynchronous=started or fused, scatters=scatters, slices=slices
    )
    return (FUSED if fused else ASYNC if started else SYNC), moved


def _row(run: Execution, work: Work, chip: "Chip", moved) -> Row:
    i = run.instruction
    products = work.products(i, run.computation)
    flops = sum(f for _, f in products)
    traffic = 0 if i.opcode.endswith("-start") else work.hbm_bytes(i, run.computation)
    estimate = i.estimated_cycles / chip.clock_hz
    if moved:
        kind = moved[0]
    elif flops:
        kind = PRODUCT
    else:
        kind = COPY if i.opcode.endswith(("-start", "send")) else MEMORY
    return Row(
        name=i.name,
        kind=kind,
        times=run.times,
        path=run.path,
        op_name=i.op_name,
        seconds=_seconds(kind, estimate, flops, traffic, chip),
        flops=flops,
        recomputed=sum(f for origin, f in products if is_recomputed(origin)),
        hbm_bytes=traffic,
        xla_seconds=estimate,
        transfer=moved[1] if moved else None,
    )


def _seconds(kind: str, estimate: float, flops: float, traffic: int, chip: "Chip") -> float:
    bandwidth = chip.hbm_bytes_per_s
    if kind in (SYNC, ASYNC, COPY):
        return 0.0
    if estimate and traffic / bandwidth > UNSEEN_SLICE * estimate:
        traffic = 0
    if kind == MEMORY:
        stream = traffic / bandwidth / HBM_SHARE
        return min(stream, estimate) if stream and estimate else stream or estimate
    roofline = flops / chip.flops_per_s
    if kind == PRODUCT:  # what a fused collective moves is no traffic of the product
        roofline = max(roofline, traffic / bandwidth)
    return min(max(estimate, roofline), MOST_OF_ROOFLINE * roofline)


def _kernel_row(row: Row, run: Execution, chip: "Chip", kernel_seconds, unknown: dict) -> Row:
    found = kernel_seconds(run.instruction, run.computation)
    if found is None:
        shapes = ", ".join(map(str, run.instruction.shapes))
        unknown[f"kernel {kernel_name(run.instruction)} -> {shapes}: its bytes only"] = None
        seconds = row.hbm_bytes / chip.hbm_bytes_per_s / HBM_SHARE
        return dataclasses.replace(row, kind=KERNEL, seconds=seconds)
    again = found.flops if is_recomputed(row.op_name) else 0.0
    return dataclasses.replace(
        row,
        kind=KERNEL,
        seconds=found.seconds,
        flops=found.flops + found.recomputed,
        recomputed=again + found.recomputed,
    )


def is_recomputed(op_name: str) -> bool:
    """Whether the backward pass does an operation of the forward pass again."""
    return "rematted_computation" in op_name


def _loops_without_count(program: Program) -> list[str]:
    return [
        f"loop {i.name} ends on data: counted once"
        for computation in program.computations.values()
        for i in computation
        if i.opcode == "while" and trip_count(program, computation, i) is None
    ]
