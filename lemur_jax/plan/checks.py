"""Habits of a compiled step that cost HBM or time and can be avoided: findings, not errors."""

import dataclasses
from collections.abc import Iterator, Mapping

from lemur_jax.config import ModelConfig
from lemur_jax.plan.collectives import transfer
from lemur_jax.plan.hlo import Execution, Instruction, Program, executions, trip_count
from lemur_jax.plan.memory import weight_shapes
from lemur_jax.plan.origin import Origins
from lemur_jax.plan.work import Work

SMALL = 2**20  # bytes: below it nothing is worth a line


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to look at.

    Attributes:
      kind: "float32 gather", "float32 reduction", "all-reduce of a part", "held gather".
      name: of the instruction. op_name: where it comes from in the model.
      nbytes: of one execution (HBM held, for a held gather).
      times: executions in one run of the program.
      text: one line for a person.
    """

    kind: str
    name: str
    op_name: str
    nbytes: int
    times: float
    text: str


def findings(
    program: Program, model: ModelConfig, mesh: Mapping[str, int], work: Work | None = None
) -> list[Finding]:
    """Everything found in a program, most bytes moved first.

    Args:
      program: one partition's program.
      model: whose weights it gathers.
      mesh: sizes by axis name, outermost first.
    """
    work = work or Work(program)
    found = [*wide_collectives(program, model, mesh), *partial_reductions(program, mesh, work)]
    found += held_gathers(program, model, mesh)
    return sorted(found, key=lambda f: -f.nbytes * f.times)


def wide_collectives(
    program: Program, model: ModelConfig, mesh: Mapping[str, int]
) -> Iterator[Finding]:
    """Float32 collectives although the model computes in 16 bits: a gathered weight was cast after
    the gather; a reduction may be float32 on purpose, then it is agreed on and stays."""
    if model.dtype == "float32":
        return
    for run, i in _collectives(program, ("all-gather", "all-reduce", "reduce-scatter")):
        moved = transfer(i, mesh, asynchronous=False)
        if moved.dtype != "f32" or moved.payload_bytes < SMALL:
            continue
        gather = moved.opcode == "all-gather"
        why = "cast to bf16 before the gather" if gather else "float32: is it agreed on?"
        yield Finding(
            "float32 gather" if gather else "float32 reduction",
            i.name,
            i.op_name,
            moved.payload_bytes,
            run.times,
            f"{moved.opcode} of {_mib(moved.payload_bytes)} in f32 over {moved.axes}, "
            f"{run.times:g} times: {why}",
        )


def partial_reductions(program: Program, mesh: Mapping[str, int], work: Work) -> Iterator[Finding]:
    """All-reduces of which each device then reads no more than its own part: a reduce-scatter
    would move half."""
    for run, i in _collectives(program, ("all-reduce",)):
        if i.nbytes < SMALL:
            continue
        moved = transfer(i, mesh, asynchronous=False)
        read = _read(work, run, i)
        if moved.devices == 1 or read is None or read > 2 * i.nbytes / moved.devices:
            continue
        yield Finding(
            "all-reduce of a part",
            i.name,
            i.op_name,
            i.nbytes,
            run.times,
            f"all-reduce of {_mib(i.nbytes)} over {moved.axes} ({moved.devices} devices), "
            f"{run.times:g} times, of which a device keeps {_mib(read)}: a reduce-scatter would do",
        )


def held_gathers(
    program: Program, model: ModelConfig, mesh: Mapping[str, int]
) -> Iterator[Finding]:
    """Gathered weights that a loop only passes on: they take HBM through all of its iterations,
    although each layer or micro-batch needs them once."""
    origins, weights = Origins(program), weight_shapes(model, mesh)
    for run in executions_of_loops(program):
        loop = run.instruction
        body = program.computations[loop.attribute("body")]
        root = body.instructions[body.root]
        for place, shape in enumerate(loop.shapes):
            if shape.nbytes < SMALL or len(loop.shapes) != len(root.operands):
                continue
            if not origins.passed_on(body, place):
                continue
            chain = origins.chain(loop.operands[0], (place,))
            gather = next((i for i in chain if "all-gather" in i.opcode), None)
            dims = tuple(sorted(d for d in shape.dims if d != 1))
            if gather is None or dims not in weights:
                continue
            trips = trip_count(program, run.computation, loop)
            yield Finding(
                "held gather",
                gather.name,
                gather.op_name,
                shape.nbytes,
                run.times,
                f"gathered weight {shape} ({_mib(shape.nbytes)}) is held through all {trips} "
                f"iterations of {loop.name}",
            )


def executions_of_loops(program: Program) -> Iterator[Execution]:
    """Every `while` that runs, with how often."""
    reached = {program.entry: 1.0}
    for run in executions(program):
        reached.setdefault(run.computation.name, run.times)
    for name, times in reached.items():
        computation = program.computations[name]
        for i in computation:
            if i.opcode == "while":
                yield Execution(i, computation, times, ())


def _collectives(program: Program, opcodes) -> Iterator[tuple[Execution, Instruction]]:
    """Collectives that stand alone or begin an asynchronous fusion; one of each channel."""
    work, seen = Work(program), set()
    names = (*opcodes, *(f"{name}-start" for name in opcodes))
    for run in executions(program):
        i = run.instruction
        inner = i if i.opcode in names else None
        if inner is None and i.opcode == "fusion" and "-done" not in i.name:
            inner = work.contains(i.called, names)
        if inner is None:
            continue
        key = inner.attribute("channel_id") or inner.name
        if (key, run.path) not in seen:
            seen.add((key, run.path))
            yield run, inner


def _read(work: Work, run: Execution, i: Instruction) -> int | None:
    """Bytes of a result that its users read; None if all of it, or nobody says."""
    if run.computation.get(i.name) is None:
        return None
    if len(i.shapes) == 1:
        return work.read_bytes(run.computation, i.name)
    parts = [work.read_bytes(run.computation, u.name) for u in run.computation.users[i.name]]
    return None if None in parts else sum(parts)


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
