"""`lemur data clean`: sources through steps, in order, to a directory of cleaned files.

    PATH/<source>/part-00000-of-00012.jsonl.zst   {"text", "path", "split", the record's own fields}
    PATH/report.json                              what every step removed and changed
    PATH/contaminated.jsonl                       documents that share n-grams with evaluation sets

What is held in memory: in each worker one document, the evaluation sets and the compressor; in the
main process `memory_mb` while duplicates are found, and one byte for each document. On disk, beside
PATH: two copies of the corpus, compressed, and what the corpus steps state for each document.
An interrupted run goes on where it was: PATH.work holds the shards that are done.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lemur_jax.config import ConfigError
from lemur_jax.data.cleaning import decontaminate, report, stages
from lemur_jax.data.cleaning.duplicates import CorpusStep, ExactDuplicates, NearDuplicates
from lemur_jax.data.cleaning.redact import RedactAddresses, RedactSecrets
from lemur_jax.data.cleaning.stages import ShardTask
from lemur_jax.data.cleaning.steps import (
    AlphanumericFilter,
    DocumentStep,
    LanguageFilter,
    LengthFilter,
    LicenceFilter,
    LineFilter,
)
from lemur_jax.data.reading.records import ReadReport
from lemur_jax.data.sources import Shard, SourceConfig, shards

CORPUS_STEPS = (ExactDuplicates, NearDuplicates)
STEPS = (
    *CORPUS_STEPS,
    *(LicenceFilter, LanguageFilter, LengthFilter, LineFilter, AlphanumericFilter),
    *(RedactSecrets, RedactAddresses, decontaminate.Decontaminate),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """One run of `lemur data clean`.

    Attributes:
      path: a new directory for the result.
      sources: what is cleaned. Duplicates are found across all of them; the first one is kept, in
        this order.
      steps: of STEPS, in the order in which they run.
      workers: processes; 0 takes one for each core, 1 runs in this process.
      memory_mb: MiB that the main process may hold while it finds duplicates, besides the
        interpreter.
      seed: of the sources' `validation_fraction`.
    """

    path: str
    sources: tuple[SourceConfig, ...]
    steps: tuple[Any, ...]
    workers: int = 0
    memory_mb: int = 1024
    seed: int = 0

    def __post_init__(self):
        problems = []
        for field in ("sources", "steps"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
            if not getattr(self, field):
                problems.append(f"CleanConfig.{field}=() is empty: give at least one")
        if not self.path:
            problems.append("CleanConfig.path='' is empty: give a directory")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            problems.append(f"CleanConfig.sources={names} repeat a name: every name must differ")
        for step in self.steps:
            if not isinstance(step, STEPS):
                known = ", ".join(one.__name__ for one in STEPS)
                problems.append(f"CleanConfig.steps: {step!r} is not one of {known}")
        for field, least in (("workers", 0), ("memory_mb", 1)):
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                problems.append(f"CleanConfig.{field}={value!r} must be an integer >= {least}")
        if problems:
            raise ConfigError(problems)


def clean(config: CleanConfig, console: Console | None = None) -> dict[str, Any]:
    """Cleans the sources and returns the report, which is also written to PATH/report.json.

    Raises ConfigError on bad input; `config.path` is then not there, and what was done is kept in
    PATH.work, where the same run takes it up again.
    """
    console = console or Console(stderr=True)
    started = time.monotonic()
    path = Path(config.path).absolute()
    if path.exists():
        raise ConfigError([f"CleanConfig.path={config.path!r} exists: give a new directory"])
    inputs = [(source, shard) for source in config.sources for shard in shards(source)]
    for step in config.steps:
        if isinstance(step, decontaminate.Decontaminate):
            decontaminate.too_short(step)  # reads the evaluation sets: problems come early
    work = _work_directory(config, inputs, console)
    parts = list(_stages(config.steps))
    counts: list[list[dict]] = []
    with _pool(config.workers, len(inputs)) as pool:
        for stage, (steps, corpus_step) in enumerate(parts):
            firsts = _firsts(counts[-1]) if counts else [0] * len(inputs)
            tasks = [
                ShardTask(
                    stage=stage,
                    number=number,
                    source=source,
                    shard=shard,
                    seed=config.seed,
                    first=firsts[number],
                    steps=steps,
                    sign=corpus_step,
                    last=stage + 1 == len(parts),
                    work=str(work),
                )
                for number, (source, shard) in enumerate(inputs)
            ]
            counts.append(_collect(pool, tasks, console, f"stage {stage + 1} of {len(parts)}"))
            if stage == 0:
                _check_reading(config.sources, inputs, counts[0])
            else:
                _remove(work, stage - 1)
            if corpus_step is not None:
                _find_redundant(work, stage, corpus_step, counts[-1], config.memory_mb, console)
    told = report.compose(parts, inputs, counts, work)
    _publish(work, path, inputs, counts, told)
    report.show(told, console)
    console.print(f"cleaned {path} in {time.monotonic() - started:.1f} s", soft_wrap=True)
    for name in told["sources"]:
        console.print(
            f"read it with SourceConfig.train_files = ('{config.path}/{name}/*.jsonl.zst',) and "
            "split_key = 'split'",
            soft_wrap=True,
        )
    return told


def _stages(
    steps: Sequence[Any],
) -> Iterator[tuple[tuple[DocumentStep, ...], CorpusStep | None]]:
    """Document steps up to each corpus step, and those after the last one."""
    held: list[DocumentStep] = []
    for step in steps:
        if isinstance(step, CORPUS_STEPS):
            yield tuple(held), step
            held = []
        else:
            held.append(step)
    yield tuple(held), None


def _work_directory(
    config: CleanConfig, inputs: Sequence[tuple[SourceConfig, Shard]], console: Console
) -> Path:
    """PATH.work, with what the same run left there; another run's is removed."""
    work = Path(f"{Path(config.path).absolute()}.work")
    steps = [f"{type(step).__name__} {step}" for step in config.steps]
    spelled = repr((config.sources, steps, config.seed, [shard for _, shard in inputs]))
    identity = hashlib.sha256(spelled.encode("utf-8")).hexdigest()
    marker = work / "identity"
    if work.exists():
        if not marker.is_file():
            raise ConfigError([f"CleanConfig.path: {str(work)!r} is not ours: remove or move it"])
        if marker.read_text() == identity:
            console.print(f"going on with {work}", soft_wrap=True)
            return work
        console.print(f"{work} was of another run: starting again", soft_wrap=True)
        shutil.rmtree(work)
    work.mkdir(parents=True)
    marker.write_text(identity)
    return work


class _InThisProcess:
    """An executor for one worker: the same calls, without processes."""

    def map(self, function: Any, tasks: Iterable[Any]) -> Iterator[Any]:
        return map(function, tasks)

    def __enter__(self) -> "_InThisProcess":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _pool(workers: int, tasks: int) -> Any:
    workers = min(workers or os.cpu_count() or 1, tasks)
    if workers == 1:
        return _InThisProcess()
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)


def _collect(
    pool: Any, tasks: Sequence[ShardTask], console: Console, what: str
) -> list[dict[str, Any]]:
    counts, problems = [], []
    with console.status(what) as status:
        for number, result in enumerate(pool.map(stages.run, tasks), 1):
            problems += result.get("problems", [])
            counts.append(result)
            status.update(f"{what}: {number} of {len(tasks)} shards")
    if problems:
        raise ConfigError(problems)
    return counts


def _check_reading(
    sources: Sequence[SourceConfig],
    inputs: Sequence[tuple[SourceConfig, Shard]],
    counts: Sequence[dict],
) -> None:
    """Prints each source's bad and filtered records; raises when they are too many."""
    for source in sources:
        whole = ReadReport()
        for (owner, _), result in zip(inputs, counts):
            if owner is source:
                whole.add(ReadReport(**result["read"]))
        whole.show(source.name)
        whole.check(source.max_bad_records)


def _firsts(counts: Sequence[dict]) -> list[int]:
    """Number of each shard's first document among all of a stage."""
    return [0, *np.cumsum([result["documents"] for result in counts]).tolist()][:-1]


def _find_redundant(
    work: Path, stage: int, step: CorpusStep, counts: list[dict], memory_mb: int, console: Console
) -> None:
    """Writes which documents a corpus step removes: one byte each, and a sample of pairs."""
    done = work / f"stage{stage}-redundant.npy"
    if done.is_file():
        return
    total = sum(result["documents"] for result in counts)
    joined = work / f"stage{stage}.signatures"
    with console.status(f"{type(step).__name__}: {total:,} documents"), open(joined, "wb") as out:
        for number in range(len(counts)):
            with open(work / f"stage{stage}-{number:05}.signatures", "rb") as part:
                shutil.copyfileobj(part, out, 1 << 20)
        out.flush()
        redundant = np.zeros(total, bool)
        pairs: list[tuple[int, int]] = []
        if total:
            shape = (total, step.width)
            signatures = np.memmap(joined, step.dtype, "r", shape=shape)
            spill = work / f"stage{stage}-spill"
            for removed, kept in step.redundant(signatures, spill, memory_mb << 20):
                redundant[removed] = True
                pairs = sorted([*pairs, *zip(removed.tolist(), kept.tolist())])[: stages.SAMPLE]
            shutil.rmtree(spill, ignore_errors=True)
    joined.unlink()
    (work / f"stage{stage}-pairs.json").write_text(json.dumps(_named(work, stage, counts, pairs)))
    temporary = work / f"stage{stage}-redundant.new.npy"
    np.save(temporary, redundant)
    temporary.replace(done)


def _named(
    work: Path, stage: int, counts: list[dict], pairs: Sequence[tuple[int, int]]
) -> list[dict[str, str]]:
    """Pairs of documents by name, for the report."""
    wanted, names = {number for pair in pairs for number in pair}, {}
    for shard, first in enumerate(_firsts(counts)):
        inside = {n - first for n in wanted if 0 <= n - first < counts[shard]["documents"]}
        if inside:
            file = work / f"stage{stage}-{shard:05}.jsonl.zst"
            for offset, document in enumerate(stages.read_stage(file)):
                if offset in inside:
                    names[first + offset] = document.path
                if offset == max(inside):
                    break
    return [{"document": names[a], "kept": names[b]} for a, b in pairs]


def _remove(work: Path, stage: int) -> None:
    """Removes the large files of a stage that is no longer needed; its counts stay."""
    for suffix in ("jsonl.zst", "signatures"):
        for file in work.glob(f"stage{stage}-*.{suffix}"):
            file.unlink()


def _publish(
    work: Path,
    path: Path,
    inputs: Sequence[tuple[SourceConfig, Shard]],
    counts: Sequence[Sequence[dict]],
    told: dict[str, Any],
) -> None:
    """Moves the last stage's files, but for empty ones, and the report to PATH at once."""
    out = work / "out"
    last = len(counts) - 1
    for source in dict.fromkeys(source for source, _ in inputs):
        numbers = [
            n for n, (s, _) in enumerate(inputs) if s is source and counts[last][n]["documents"]
        ]
        (out / source.name).mkdir(parents=True, exist_ok=True)
        for part, number in enumerate(numbers):
            file = work / f"stage{last}-{number:05}.jsonl.zst"
            target = out / source.name / f"part-{part:05}-of-{len(numbers):05}.jsonl.zst"
            if file.is_file():  # not when a run that was cut off here has moved it
                file.rename(target)
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in told["contaminated"]]
    (out / "contaminated.jsonl").write_text("".join(lines), encoding="utf-8")
    rest = {name: value for name, value in told.items() if name != "contaminated"}
    (out / "report.json").write_text(json.dumps(rest, indent=1, ensure_ascii=False) + "\n")
    out.rename(path)
    shutil.rmtree(work)
