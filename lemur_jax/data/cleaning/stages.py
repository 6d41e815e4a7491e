"""One stage of a cleaning run over one shard: what a worker process does.

A stage is some document steps, and then the signatures for one corpus step. Its input is a shard of
a source or the file of the stage before, without the documents that the corpus step between them
found redundant; its output is a file of records {"text", "path", "split", "meta"}, and the last
stage's one of records as SourceConfig.train_files takes them. What it counted is written last, so a
shard of which that file exists is done.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lemur_jax.config import ConfigError
from lemur_jax.data.cleaning.duplicates import CorpusStep
from lemur_jax.data.cleaning.steps import Apply, DocumentStep, Removal
from lemur_jax.data.files import Document
from lemur_jax.data.reading.lines import read_jsonl
from lemur_jax.data.reading.records import ReadReport
from lemur_jax.data.reading.rows import Row
from lemur_jax.data.sources import Shard, SourceConfig, read_shard

SAMPLE = 10  # removed documents that the report names, of each step


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One stage over one shard.

    Attributes:
      stage: its number, from 0.
      number: of the shard, in the run's order.
      source, shard, seed: what the first stage reads.
      first: number of the shard's first document among all that the stage before has written.
      steps: of single documents, in order.
      sign: the corpus step that follows, whose signatures are wanted.
      last: whether this is the last stage.
      work: directory of the run's intermediate files.
    """

    stage: int
    number: int
    source: SourceConfig
    shard: Shard
    seed: int
    first: int
    steps: tuple[DocumentStep, ...]
    sign: CorpusStep | None
    last: bool
    work: str

    def file(self, suffix: str, stage: int | None = None) -> Path:
        """Path of one of the stage's files of this shard."""
        stage = self.stage if stage is None else stage
        return Path(self.work) / f"stage{stage}-{self.number:05}.{suffix}"


@dataclasses.dataclass
class StepCounts:
    """What one step did to one shard; bytes are of UTF-8 text."""

    documents_in: int = 0
    bytes_in: int = 0
    documents_removed: int = 0
    bytes_removed: int = 0
    documents_changed: int = 0
    bytes_changed: int = 0
    reasons: Counter = dataclasses.field(default_factory=Counter)
    sample: list[dict] = dataclasses.field(default_factory=list)
    evidence: list[dict] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {**vars(self), "reasons": dict(self.reasons)}

    def add(self, other: dict[str, Any]) -> None:
        """Adds another shard's counts, as JSON has them."""
        for name in ("documents_in", "bytes_in", "documents_removed", "bytes_removed"):
            setattr(self, name, getattr(self, name) + other[name])
        self.documents_changed += other["documents_changed"]
        self.bytes_changed += other["bytes_changed"]
        self.reasons.update(other["reasons"])
        self.sample = (self.sample + other["sample"])[:SAMPLE]
        self.evidence += other["evidence"]

    def remove(self, name: str, size: int, removal: Removal) -> None:
        """Counts a removed document."""
        self.documents_removed += 1
        self.bytes_removed += size
        self.reasons[removal.reason] += 1
        told = {"document": name, "reason": removal.reason, **removal.evidence}
        if len(self.sample) < SAMPLE:
            self.sample.append(told)
        if removal.evidence:
            self.evidence.append(told)


def run(task: ShardTask) -> dict[str, Any]:
    """Runs one stage over one shard and returns its counts, or {"problems": [...]}."""
    counts_file = task.file("json")
    if counts_file.is_file():
        return json.loads(counts_file.read_text(encoding="utf-8"))
    try:
        counts = _run(task)
    except ConfigError as error:  # its own kind does not survive the way between processes
        return {"problems": error.problems}
    temporary = task.file("json.new")
    temporary.write_text(json.dumps(counts), encoding="utf-8")
    temporary.replace(counts_file)
    return counts


def _run(task: ShardTask) -> dict[str, Any]:
    import zstandard

    report, before = ReadReport(), StepCounts()
    steps = [StepCounts() for _ in task.steps]
    applies = [_started(step) for step in task.steps]
    sign = _signer(task.sign) if task.sign else None
    documents, total = 0, 0
    with (
        zstandard.open(task.file("jsonl.zst"), "wb", cctx=zstandard.ZstdCompressor(3)) as out,
        open(task.file("signatures"), "wb") as signatures,
    ):
        for document in _input(task, report, before):
            name = f"{task.source.name}/{document.path}"
            kept = _apply(document, name, applies, steps)
            if kept is None:
                continue
            out.write(_record(kept, task.last))
            documents += 1
            total += len(kept.text.encode("utf-8"))
            if sign is not None:
                sign(kept.text).tofile(signatures)
    return {
        "documents": documents,
        "bytes": total,
        "before": before.as_json(),
        "steps": [step.as_json() for step in steps],
        "read": dataclasses.asdict(report),
    }


def _apply(
    document: Document, name: str, applies: list[Apply], steps: list[StepCounts]
) -> Document | None:
    size = len(document.text.encode("utf-8"))
    for apply, counts in zip(applies, steps):
        counts.documents_in += 1
        counts.bytes_in += size
        result = apply(document, counts.reasons)
        if isinstance(result, Removal):
            counts.remove(name, size, result)
            return None
        if result is not document:
            counts.documents_changed += 1
            after = len(result.text.encode("utf-8"))
            counts.bytes_changed += after - size
            document, size = result, after
    return document


def _input(task: ShardTask, report: ReadReport, before: StepCounts) -> Iterator[Document]:
    """The shard's documents; those that the corpus step before removed are counted in `before`."""
    if task.stage == 0:
        yield from read_shard(task.source, task.shard, task.seed, report)
        return
    redundant = np.load(Path(task.work) / f"stage{task.stage - 1}-redundant.npy", mmap_mode="r")
    previous = task.file("jsonl.zst", task.stage - 1)
    for offset, document in enumerate(read_stage(previous)):
        size = len(document.text.encode("utf-8"))
        before.documents_in += 1
        before.bytes_in += size
        if redundant[task.first + offset]:
            before.remove(f"{task.source.name}/{document.path}", size, Removal("duplicate"))
        else:
            yield document


def read_stage(file: Path) -> Iterator[Document]:
    """Documents of a stage's file."""
    for row in read_jsonl(str(file), "CleanConfig.path"):
        if not isinstance(row, Row):
            raise ConfigError([f"CleanConfig.path: intermediate file {str(file)!r} {row.what}"])
        yield Document(**row.fields)


def _record(document: Document, last: bool) -> bytes:
    own = {"text": document.text, "path": document.path, "split": document.split}
    record = {**document.meta, **own} if last else {**own, "meta": dict(document.meta)}
    return json.dumps(record, ensure_ascii=False, default=_plain).encode("utf-8") + b"\n"


def _plain(value: Any) -> Any:
    """What JSON has no word for: bytes as text, dates and decimals as they are spelled."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@functools.lru_cache(maxsize=64)
def _started(step: DocumentStep) -> Apply:
    return step.start()


@functools.lru_cache(maxsize=4)
def _signer(step: CorpusStep) -> Any:
    return step.signer()
