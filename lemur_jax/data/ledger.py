"""The ledger of a run's data: RUN/data_ledger.jsonl, one line for each thing that happened.

Lines are only ever added. Events, with what each holds beside `time` and `chain`:

    begun, resumed  step, the position (see Pipeline.position), path of the data set, processes and
                    the `ranges` of rows of a micro-batch that they read, micro_batches
    saved           before the checkpoint is: step, `since` (the step of the start or checkpoint
                    before), `reads`: the sum of the hashes of all rows that were fed since then
                    (see reads.py)
    exclude         documents {source: [numbers]}, their paths, `asked`: the words of the command;
                    in force from the step of the next line that says begun or resumed, or from
                    `step` when it has one and that is later

`chain` is a hash of the line and of the chain before it, so that a line that was changed, taken
out or put in is found. Process 0 of a run writes; `lemur data exclude` does too.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lemur_jax.config import ConfigError
from lemur_jax.data import location
from lemur_jax.data.events import Exclusion

LEDGER = "data_ledger.jsonl"
EXCLUSIONS = "exclusions.jsonl"  # the same lines in a data set: for every run that starts later
STARTS = ("begun", "resumed")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line: its number in the file, from 1, its event, and what it holds."""

    line: int
    event: str
    facts: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.facts.get(name, default)


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What a ledger holds.

    Attributes:
      path: the file.
      entries: in their order.
      problems: lines that were changed, removed or inserted.
      torn: lines that a kill cut off while they were written; harmless, nothing follows from them.
    """

    path: Path
    entries: tuple[Entry, ...]
    problems: tuple[str, ...]
    torn: tuple[str, ...]

    @property
    def reached(self) -> int:
        """The step that the run would go on from: of its last checkpoint or start."""
        steps = [e["step"] for e in self.entries if e.event in (*STARTS, "saved")]
        return steps[-1] if steps else 0

    @property
    def starts(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.event in STARTS]


def read(path: Path) -> Ledger:
    """The ledger in file `path`; an absent file is an empty ledger."""
    return _parse(path, path.read_bytes() if path.exists() else b"")


def read_exclusions(data: str) -> Ledger:
    """What is excluded in the data set at `data` (local or in object storage)."""
    return _parse(Path(data) / EXCLUSIONS, location.read(data, EXCLUSIONS) or b"")


def _parse(path: Path, text: bytes) -> Ledger:
    entries, problems, torn, chain = [], [], [], ""
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            facts = json.loads(line)
            stated, event = facts.pop("chain"), facts.pop("event")
        except (ValueError, KeyError, AttributeError, TypeError):
            # If it was more than torn, the next whole line does not follow the one before.
            torn.append(f"line {number} is not whole: {line[:40]!r}")
            continue
        if stated != _chained(chain, event, facts):
            problems.append(
                f"line {number} ({event}) does not follow the one before: it, or a line before "
                "it, was changed, removed or inserted"
            )
        chain = stated
        entries.append(Entry(number, event, facts))
    return Ledger(path, tuple(entries), tuple(problems), tuple(torn))


def read_run(run_dir: str | Path) -> Ledger:
    """The ledger of a run. Raises ConfigError when the run has none."""
    path = Path(run_dir) / LEDGER
    if path.exists():
        return read(path)
    if not Path(run_dir).is_dir():
        raise ConfigError([f"RUN={str(run_dir)!r} is not a directory: give that of a run"])
    is_run = (Path(run_dir) / "checkpoints").is_dir() or (Path(run_dir) / "config.gin").is_file()
    raise ConfigError(
        [
            f"RUN={str(run_dir)!r} has no {LEDGER}: "
            + (
                "it was trained by an older version, which kept none, so what it read cannot be "
                "proved; resume it with this version and the ledger begins at that step"
                if is_run
                else "it is not the directory of a run (TrainConfig.run_dir)"
            )
        ]
    )


def append(path: Path, event: str, /, **facts: Any) -> None:
    """Adds one line and waits until it is on the disk."""
    facts |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    facts = json.loads(json.dumps(facts))
    with open(path, "ab+") as file, _locked(file):
        file.seek(0)
        lines = file.read().split(b"\n")
        torn = b"\n" if lines[-1] else b""  # a line that a kill cut off stays by itself
        line = {"event": event, **facts, "chain": _chained(_last_chain(lines), event, facts)}
        file.write(torn + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _last_chain(lines: Sequence[bytes]) -> str:
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return json.loads(line)["chain"]
    return ""


def _chained(chain: str, event: str, facts: Mapping[str, Any]) -> str:
    text = json.dumps([chain, event, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _locked(file):
    import fcntl

    # Some network file systems have no locks; then it is up to the user not to write twice at once.
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    yield


def exclusions(entries: Sequence[Entry], next_step: int) -> tuple[Exclusion, ...]:
    """What is excluded and from which step on; what no start has seen yet begins at `next_step`."""
    found = []
    for index, entry in enumerate(entries):
        if entry.event != "exclude":
            continue
        start = next((e["step"] for e in entries[index:] if e.event in STARTS), next_step)
        documents = {source: tuple(numbers) for source, numbers in entry["documents"].items()}
        # A step that was asked for and that the run had passed already cannot be kept.
        found.append(Exclusion(max(start, entry.get("step", 0)), documents))
    return tuple(found)


def adopted(own: Sequence[Entry], of_data_set: Sequence[Entry]) -> list[Entry]:
    """Exclusions of the data set that this run has not taken over yet."""
    known = {entry.get("from_data_set") for entry in own}
    return [entry for entry in of_data_set if entry_id(entry) not in known]


def entry_id(entry: Entry) -> str:
    """Names an exclusion of a data set in the ledgers of its runs."""
    return hashlib.sha256(json.dumps(entry.facts, sort_keys=True).encode()).hexdigest()[:16]
