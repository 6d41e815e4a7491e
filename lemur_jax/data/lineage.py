"""A run's ledger as a chain of intervals of steps: was every step read exactly once?

A run that is resumed goes on from a checkpoint, and whatever it read after that checkpoint is
thrown away with the state that learnt from it. What counts is the lineage: the intervals between
starts and checkpoints that led to the newest checkpoint. They must follow one another from step 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lemur_jax.data.ledger import STARTS, Entry
from lemur_jax.data.reads import cover


class Interval(NamedTuple):
    """Steps [start, stop) that one process group read without a break, ending in a checkpoint.

    Attributes:
      start, stop: steps done before and after.
      reads: the sum of what was fed, hexadecimal (see reads.py).
      processes: that read it.
      line: of the ledger.
    """

    start: int
    stop: int
    reads: str
    processes: int
    line: int


class Lineage(NamedTuple):
    """What the ledger says.

    Attributes:
      intervals: that led to the newest checkpoint, in order.
      thrown_away: (from step, to step): read, and read again after going back to a checkpoint.
      violations: why they do not follow one another.
    """

    intervals: list[Interval]
    thrown_away: list[tuple[int, int]]
    violations: list[str]


def trace(entries: Sequence[Entry]) -> Lineage:
    """Follows a ledger from its first start to its last checkpoint."""
    kept, thrown, violations = [], [], []
    processes, since, begun = 0, 0, False
    for entry in entries:
        step, where = entry.get("step"), f"line {entry.line}"
        reached = kept[-1].stop if kept else 0
        if entry.event in STARTS:
            if begun and entry.event == "begun":
                violations.append(f"{where}: the run is said to begin a second time")
            elif not begun and step > 0:
                violations.append(
                    f"{where}: the ledger begins at step {step}: steps 1 to {step} were read "
                    "before there was a ledger, or lines were removed"
                )
            elif begun and step > reached:
                violations.append(
                    f"{where}: gap: resumed at step {step}, but the last checkpoint is {reached}: "
                    f"steps {reached + 1} to {step} were skipped"
                )
            elif step not in {0, *(i.stop for i in kept)} and begun:
                violations.append(
                    f"{where}: overlap: resumed at step {step}, of which there was no checkpoint"
                )
            if begun and step < reached:
                thrown.append((step, reached))
                kept = [interval for interval in kept if interval.stop <= step]
            violations += [f"{where}: {problem}" for problem in _split_problems(entry)]
            begun, since, processes = True, step, entry["processes"]
        elif entry.event == "saved":
            if not begun:
                violations.append(f"{where}: checkpoint {step} before the run began")
            if entry["since"] > since:
                violations.append(
                    f"{where}: gap: checkpoint {step} counts from step {entry['since']}, but the "
                    f"line before ends at {since}: steps {since + 1} to {entry['since']} are "
                    "not accounted for"
                )
            elif entry["since"] < since:
                violations.append(
                    f"{where}: overlap: checkpoint {step} counts from step {entry['since']}, but "
                    f"the line before ends at {since}: steps {entry['since'] + 1} to {since} are "
                    "counted twice"
                )
            if step <= entry["since"]:
                violations.append(f"{where}: checkpoint {step} ends before it begins")
            kept.append(Interval(entry["since"], step, entry["reads"], processes, entry.line))
            since = step
    return Lineage(kept, thrown, violations)


def _split_problems(start: Entry) -> list[str]:
    """Whether the processes of a start read every row of a step."""
    rows, micro_batches, size = start["rows"], start["micro_batches"], start["batch_size"]
    problems = []
    if not cover(start["ranges"], rows):
        problems.append(
            f"processes read rows {start['ranges']} of each micro-batch of {rows}: that is not "
            "all of them"
        )
    if rows * micro_batches != size:
        problems.append(f"{micro_batches} micro-batches of {rows} rows are not {size} rows")
    return problems
