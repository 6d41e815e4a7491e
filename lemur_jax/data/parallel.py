"""All groups of a build, on worker processes, with progress; finished ones are kept."""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lemur_jax.config import ConfigError
from lemur_jax.data import location
from lemur_jax.data.manifest import JOURNAL
from lemur_jax.data.sources import SPLITS
from lemur_jax.data.store import check_files
from lemur_jax.data.worker import Work, build_group, finished, run, start
from lemur_jax.errors import LemurError

if TYPE_CHECKING:
    from lemur_jax.data.build import BuildConfig

PROBLEMS = 20  # bad inputs that are collected before a build gives up


def build_groups(
    config: "BuildConfig", planned: Mapping[str, list], fingerprint: str, console: Console
) -> dict[str, list[dict]]:
    """Journal entries of every group of every source, in order; builds those that are missing."""
    cores = config.workers or os.cpu_count() or 1
    work = {
        source.name: [Work(config, source, group, fingerprint) for group in planned[source.name]]
        for source in config.sources
    }
    entries = {item.journal: _whole_entry(item) for items in work.values() for item in items}
    todo = [item for items in work.values() for item in items if entries[item.journal] is None]
    if len(todo) < len(entries):
        console.print(f"{len(entries) - len(todo)} of {len(entries)} parts are finished already")
    _remove_others(config, planned)
    # Few parts: each is tokenised on several threads. More than cores help nobody.
    todo = [dataclasses.replace(item, threads=max(1, cores // len(todo))) for item in todo]
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[parts]}"),
        console=console,
        transient=True,
    ) as progress:
        total = sum(shard.bytes for item in todo for shard in item.group.shards)
        task = progress.add_task("tokenising", total=total or None, parts=f"0/{len(todo)} parts")
        count = 0

        def done(item: Work, entry: dict) -> None:
            nonlocal count
            count += 1
            entries[item.journal] = entry
            progress.update(task, parts=f"{count}/{len(todo)} parts")

        alone = min(cores, len(todo)) == 1
        here = [item for item in todo if alone or _must_be_here(item)]
        away = [item for item in todo if not (alone or _must_be_here(item))]
        problems = _Problems()
        if away:
            _run_processes(away, min(cores, len(away)), done, problems, progress, task)
        for item in here:
            with problems.collected():
                done(item, build_group(item, lambda read: progress.advance(task, read)))
    problems.raise_if_any()
    return {name: [entries[item.journal] for item in items] for name, items in work.items()}


class _Problems:
    """ConfigErrors of parts: the others are built before they are raised, all at once."""

    def __init__(self):
        self.found: list[str] = []

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Collects a ConfigError of the block; too many are not worth waiting for."""
        try:
            yield
        except ConfigError as error:
            self.found += error.problems
            if len(self.found) >= PROBLEMS:
                raise ConfigError(self.found) from error

    def raise_if_any(self) -> None:
        """Raises one ConfigError with everything that was collected."""
        if self.found:
            raise ConfigError(self.found)


def _whole_entry(item: Work) -> dict | None:
    """The journal entry of a finished group whose files are all there."""
    entry = finished(item)
    for split, part in (entry or {"splits": {}})["splits"].items():
        try:
            check_files(location.join(item.config.path, item.source.name, split), [part])
        except ConfigError:
            return None
    return entry


def _must_be_here(item: Work) -> bool:
    # A Task that this process has registered is unknown to a new one, unless its module is named.
    return item.source.task is not None and ":" not in item.source.task


def _remove_others(config: "BuildConfig", planned: Mapping[str, list]) -> None:
    """Parts beyond the plan, of an earlier attempt with more inputs."""
    for source, groups in planned.items():
        folders = [location.join(config.path, source, split) for split in SPLITS]
        for folder in [*folders, location.join(config.path, JOURNAL, source)]:
            for name in location.children(folder):
                number = name.removeprefix("part-").removesuffix(".json")
                if number.isdigit() and int(number) >= len(groups):
                    location.remove(location.join(folder, name))


def _run_processes(
    todo: list[Work],
    workers: int,
    done: Callable[[Work, dict], None],
    problems: _Problems,
    progress: Progress,
    task: Any,
) -> None:
    # Spawned and not forked: TensorStore, TensorFlow and JAX have threads, which a fork loses.
    context = multiprocessing.get_context("spawn")
    read = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, start, (read, todo[0].threads))
    try:
        waiting = {pool.submit(run, item): item for item in todo}
        while waiting:
            over, _ = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
            progress.update(task, completed=read.value)
            for future in over:
                item = waiting.pop(future)
                with problems.collected():
                    done(item, future.result())
    except BrokenProcessPool as error:
        raise LemurError(
            f"a worker process died, perhaps for lack of memory: run the same command again, "
            f"which keeps the finished parts; BuildConfig.workers={workers} may be too many"
        ) from error
    finally:
        # What is running ends its part, unless an error has stopped the build.
        for process in list((pool._processes or {}).values()):
            if waiting:
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
