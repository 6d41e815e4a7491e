"""`lemur data audit RUN`: proves from ledger, checkpoints and data set what a run has read.

Five proofs, each of which names what it finds:

1. The ledger's lines follow one another, and its intervals cover the steps from 0 to the newest
   checkpoint once each (lineage.py).
2. Every start and every checkpoint has the position that this data set, seed and order give.
3. By arithmetic: rows used of each source grow from interval to interval by what was read, so each
   source is read without gap or overlap in its own epochs' order. O(sources) for each interval.
4. Each epoch's order is a permutation: by enumeration up to a number of rows, else by the
   construction of the shuffle (a block cipher on the row numbers); `full` enumerates all.
5. What was fed is what the order gives: rows are read again and their hashes compared with the sum
   in the ledger, for the last interval, or with `full` for all.
"""

import functools
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from lemur_jax.data import lineage, reads, recorded
from lemur_jax.data.ledger import Ledger
from lemur_jax.data.lineage import Interval, Lineage
from lemur_jax.data.pipeline import Pipeline
from lemur_jax.data.position import EVENT_FIELDS, problems_of

ENUMERATED_ROWS = 1_000_000  # of all sources together, without `full`: about 7 s
READ_AGAIN_ROWS = 20_000  # without `full`


class SourceUse(NamedTuple):
    """How a source was used up to the newest checkpoint.

    Attributes:
      rows: of the source.
      used: rows read of it.
      repeated: rows that came twice within an epoch; None when the epochs were not enumerated.
    """

    rows: int
    used: int
    repeated: int | None


class Audit(NamedTuple):
    """What an audit found.

    Attributes:
      step: of the newest checkpoint in the ledger.
      lineage: of the run.
      sources: use of each source.
      events: changes of rates and exclusions up to that step, one line each.
      read_again: steps whose rows were read again and compared.
      notes: what is worth knowing and no fault.
      violations: what is wrong; empty when the run's data is proved.
      seconds: that it took.
    """

    step: int
    lineage: Lineage
    sources: dict[str, SourceUse]
    events: list[str]
    read_again: int
    notes: list[str]
    violations: list[str]
    seconds: float


def audit(
    run_dir: str | Path,
    checkpoints: Mapping[int, Mapping],
    data: str | None = None,
    full: bool = False,
) -> Audit:
    """Audits a run.

    Args:
      run_dir: of the run.
      checkpoints: {step: data position in it} of those that are still there.
      data: where the data set is now; None: where the run had it.
      full: enumerate every epoch and read every row again, whatever it takes.

    Raises ConfigError when the run has no ledger or its data set cannot be opened.
    """
    started = time.monotonic()
    ledger, pipeline = recorded.open_run(run_dir, data)
    traced = lineage.trace(ledger.entries)
    step = traced.intervals[-1].stop if traced.intervals else 0
    violations = [*ledger.problems, *traced.violations]
    violations += _position_violations(ledger, pipeline, checkpoints, traced)
    violations += _arithmetic_violations(pipeline, traced)
    sources, repeated = _uses(pipeline, step, full)
    read_again, differing = _read_again(pipeline, traced.intervals, full)
    notes = [f"{line} (cut off by a kill)" for line in ledger.torn]
    notes += [
        f"steps {a + 1} to {b} were read twice: the run went back to checkpoint {a}, and what "
        "was learnt the first time is gone"
        for a, b in traced.thrown_away
    ]
    if checkpoints and step not in checkpoints:
        notes.append(
            f"checkpoint {step} is not there: unfinished (being written, or killed) or gone"
        )
    violations += repeated + differing
    seconds = time.monotonic() - started
    return Audit(
        step, traced, sources, _events(pipeline, step), read_again, notes, violations, seconds
    )


def _events(pipeline: Pipeline, step: int) -> list[str]:
    changes = [
        (at, f"after step {at}: rate of {source!r} is {rate:g}")
        for at, source, rate in pipeline.config.weight_changes
    ]
    exclusions = [
        (e.step, f"after step {e.step}: {sum(map(len, e.documents.values()))} document(s) excluded")
        for e in pipeline.exclusions
    ]
    return [
        text if at < step else f"{text} (not reached yet)"
        for at, text in sorted(changes + exclusions)
    ]


def _position_violations(
    ledger: Ledger, pipeline: Pipeline, checkpoints: Mapping[int, Mapping], traced: Lineage
) -> list[str]:
    found = []
    for index, start in enumerate(ledger.starts):
        where = f"line {start.line} ({start.event} at step {start['step']})"
        now = pipeline.position(start["step"])
        if any(later["step"] < start["step"] for later in ledger.starts[index + 1 :]):
            # The run went back behind it: other events may have come there since.
            now |= {field: start.get(field) for field in EVENT_FIELDS}
        problems = problems_of(now, start.facts, "the ledger")
        found += [f"{where}: {problem}" for problem in problems]
    saved = {interval.stop for interval in traced.intervals}
    for step, position in sorted(checkpoints.items()):
        where = f"checkpoint {step}"
        if position.get("step") != step:
            found.append(f"{where}: its data position says step {position.get('step')!r}")
            continue
        problems = problems_of(pipeline.position(step), position, "the checkpoint")
        found += [f"{where}: {problem}" for problem in problems]
        if step not in saved and step > (ledger.starts[0]["step"] if ledger.starts else 0):
            found.append(f"{where} is not in the ledger: it is of another run, or lines are gone")
    return found


def _arithmetic_violations(pipeline: Pipeline, traced: Lineage) -> list[str]:
    """Contiguity: each interval begins where the one before ended, in every source."""
    found, size, order = [], pipeline.config.batch_size, pipeline.order
    before = traced.intervals[0].start if traced.intervals else 0  # lineage.py names a late start
    for interval in traced.intervals:
        used, used_after = order.used(interval.start * size), order.used(interval.stop * size)
        grown = sum(used_after.values()) - sum(used.values())
        rows = (interval.stop - interval.start) * size
        if interval.start != before:
            found.append(
                f"line {interval.line}: rows are not contiguous: {order.used(before * size)} "
                f"were used by step {before}, but it goes on from {used}"
            )
        if grown != rows or any(used_after[name] < used[name] for name in used):
            found.append(
                f"line {interval.line}: steps {interval.start} to {interval.stop} use {grown} "
                f"rows by the order, {rows} by the batch size"
            )
        before = interval.stop
    return found


def _uses(pipeline: Pipeline, step: int, full: bool) -> tuple[dict[str, SourceUse], list[str]]:
    order, left = pipeline.order, ENUMERATED_ROWS
    uses, violations = {}, []
    for source, used in order.used(step * pipeline.config.batch_size).items():
        rows, repeated = order.rows[source], None
        if full or used <= left:
            left -= used
            repeated = _repeated(pipeline, source, used)
            if repeated:
                violations.append(
                    f"source {source!r}: {repeated} rows come twice within an epoch: the shuffle "
                    "is no permutation"
                )
        uses[source] = SourceUse(rows, used, repeated)
    return uses, violations


def _repeated(pipeline: Pipeline, source: str, used: int) -> int:
    rows, repeated = pipeline.order.rows[source], 0
    for epoch in range(-(-used // rows)):
        within = min(rows, used - epoch * rows)
        seen = bytearray(rows)
        for index in range(within):
            seen[pipeline.order.shuffled(source, epoch, index)] = 1
        repeated += within - sum(seen)
    return repeated


def _read_again(pipeline: Pipeline, intervals: list[Interval], full: bool) -> tuple[int, list[str]]:
    """How many steps were read again, and which intervals were fed something else."""
    steps, violations, size = 0, [], pipeline.config.batch_size
    for interval in intervals if full else intervals[-1:]:
        if not full and (interval.stop - interval.start) * size > READ_AGAIN_ROWS:
            continue
        sums = (
            reads.hash_rows(step, 0, pipeline.batch(step))
            for step in range(interval.start, interval.stop)
        )
        expected = f"{reads.add(list(sums)):016x}"
        steps += interval.stop - interval.start
        if expected != interval.reads:
            violations.append(
                f"line {interval.line}: steps {interval.start + 1} to {interval.stop} were fed "
                f"other rows than the order gives (sum {interval.reads}, expected {expected}): "
                "the data set, its documents' exclusions or the ledger were changed since"
            )
    return steps, violations


def print_audit(result: Audit, console: Console) -> None:
    """The table of sources, what was proved and how, notes and violations."""
    print_ = functools.partial(console.print, soft_wrap=True, markup=False, highlight=False)
    by_processes = itertools.groupby(result.lineage.intervals, key=lambda i: i.processes)
    for processes, group in by_processes:
        intervals = list(group)
        print_(
            f"steps {intervals[0].start + 1} to {intervals[-1].stop}: {processes} process(es), "
            f"{len(intervals)} checkpoint(s)"
        )
    for event in result.events:
        print_(event)
    table = Table("source", "rows", "rows read", "epochs", "repeated within an epoch")
    for name, use in result.sources.items():
        repeated = "none, by construction" if use.repeated is None else f"{use.repeated}"
        table.add_row(
            name, f"{use.rows:,}", f"{use.used:,}", f"{use.used / use.rows:.4f}", repeated
        )
    console.print(table)
    print_(f"read again and compared with what was fed: {result.read_again} of {result.step} steps")
    for note in result.notes:
        print_(f"note: {note}")
    for violation in result.violations:
        print_(f"VIOLATION: {violation}")
    verdict = (
        f"{len(result.violations)} violation(s): what this run has read is not proved"
        if result.violations
        else f"proved: each of steps 1 to {result.step} was read once, nothing was repeated or "
        "skipped between checkpoints"
    )
    print_(f"{verdict} ({result.seconds:.1f} s)")
