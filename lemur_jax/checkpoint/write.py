"""Writing: one save at a time, in the background, by every process its own shards."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lemur_jax.checkpoint import digest
from lemur_jax.checkpoint.agreement import Agreement, serial_numbers
from lemur_jax.checkpoint.items import handler, save_args
from lemur_jax.checkpoint.keep import Keeper
from lemur_jax.checkpoint.manifest import (
    MANIFEST,
    ArrayEntry,
    CheckpointError,
    Manifest,
    absolute,
    complete_steps,
    manifest_bytes,
    write_atomically,
)

_log = logging.getLogger(__name__)


def _check_arrays(arrays_by_item: Mapping[str, Mapping[str, jax.Array]]) -> None:
    problems = []
    seen: dict[str, str] = {}
    for item, arrays in arrays_by_item.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", item):
            problems.append(f"item {item!r}: use lower-case letters, digits and _")
        if not arrays:
            problems.append(f"item {item!r} has no arrays: leave it out")
        for name, array in arrays.items():
            if name in seen:
                problems.append(f"{name} is in items {seen[name]!r} and {item!r}: keep one")
            seen[name] = item
            if not isinstance(array, jax.Array):
                problems.append(f"{name} is a {type(array).__name__}: give a jax.Array")
            elif array.size == 0 or array.dtype.itemsize > 4:
                problems.append(
                    f"{name} has shape {array.shape} and dtype {array.dtype}: an array must "
                    "have elements, of at most 4 bytes"
                )
            elif jax.process_count() > 1 and array.is_fully_addressable:
                problems.append(
                    f"{name} lies on this process alone: put it on the global mesh (replicated)"
                )
    if not arrays_by_item:
        problems.append("no items: give at least {'params': {...}}")
    if problems:
        raise CheckpointError("cannot save: " + "; ".join(problems))


def _check_files(files: Mapping[str, bytes], items: Sequence[str]) -> None:
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or parts[0] in (*items, MANIFEST):
            raise CheckpointError(
                f"cannot save: file name {name!r} must be a relative path that stays inside the "
                f"checkpoint and out of {', '.join((*items, MANIFEST))}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Save:
    """One save under way: all that the background thread needs."""

    step: int
    orbax: ocp.AsyncCheckpointer
    agreement: Agreement
    digests: list
    entries: Mapping[str, ArrayEntry]  # digests still empty
    about: Mapping[str, Any]
    files: Mapping[str, bytes]


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time, in the background.

    Under jax.distributed every process creates one and makes the same calls; each writes only
    its own shards, and process 0 the rest. Only one writer may use a directory at a time.
    Also a context manager: leaving it waits for the last save. A program that ends without `wait`,
    `close` or that loses the save under way: Python then refuses Orbax the threads it needs.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep_latest: int,
        keep_every_steps: int | None = None,
        timeout_seconds: float = 1200,
        report: Callable[[str], None] = _log.warning,
    ):
        """Creates `directory` if need be.

        Args:
          directory: RUN/checkpoints; with several processes a place that all of them share.
          keep_latest: how many of the newest complete checkpoints survive.
          keep_every_steps: checkpoints at multiples of this survive forever; None: no such.
          timeout_seconds: for any one wait of a save on the disk or on other processes.
          report: takes a line as soon as a save has failed in the background (the error is also
            raised later), and about what is odd but stops nothing (a file that resists deletion).

        Raises:
          CheckpointError: a setting is wrong, or the processes do not share the directory.
        """
        if keep_latest < 1 or (keep_every_steps is not None and keep_every_steps < 1):
            raise CheckpointError(
                f"keep_latest={keep_latest}, keep_every_steps={keep_every_steps} must be "
                "positive (keep_every_steps may be None)"
            )
        self.directory = absolute(directory)
        self._keeper = Keeper(self.directory, keep_latest, keep_every_steps, report)
        self._timeout_seconds = timeout_seconds
        self._report = report
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._last_agreement: Agreement | None = None
        self._check_shared()

    def _check_shared(self) -> None:
        """Without this, shards written to a private disk would only be missed at the restore."""
        agreement = Agreement(self._timeout_seconds)
        problem = None
        token = self.directory / f".shared-{os.getpid()}-{time.time_ns()}"
        try:
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                if jax.process_count() > 1:
                    token.write_text("")
        except OSError as error:
            problem = f"cannot write to {self.directory}: {error}"
        name = agreement.reach(problem, value=token.name)
        if not jax.process_count() > 1:
            return
        if not (self.directory / name).exists():
            problem = f"does not see process 0's file in {self.directory}: use a shared directory"
        try:
            agreement.reach(problem)
        finally:
            if jax.process_index() == 0:
                token.unlink(missing_ok=True)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CheckpointError as second:  # must not hide the error under way, nor be lost
            error.add_note(f"and the last checkpoint failed: {second}")

    def save(
        self,
        step: int,
        arrays_by_item: Mapping[str, Mapping[str, jax.Array]],
        about: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Starts a save; returns once the arrays may be donated, deleted or changed.

        Waits for the save before, if that still runs. A complete checkpoint of the same step is
        set aside and removed when the new one is complete.

        Args:
          step: optimizer steps done; names the directory.
          arrays_by_item: {"params": {name: array}, "opt": {...}}; names are unique over items.
          about: any JSON; comes back in the manifest.
          files: contents of small files, by their name relative to the checkpoint.

        Raises:
          CheckpointError: the save before failed (then this one was not started: calling again
            starts it), the arguments are wrong, or this save cannot start.
        """
        self.wait()
        files = dict(files or {})
        _check_arrays(arrays_by_item)
        _check_files(files, tuple(arrays_by_item))
        try:
            about = json.loads(json.dumps(about))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"cannot save: `about` must be plain JSON: {error}") from error
        entries = {
            name: ArrayEntry(shape=array.shape, dtype=array.dtype.name, digest="", item=item)
            for item, arrays in arrays_by_item.items()
            for name, array in arrays.items()
        }
        agreement = Agreement(self._timeout_seconds)
        # One AsyncCheckpointer for each save: no state of a failed one can leak into the next.
        orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(**{item: handler() for item in arrays_by_item}),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=math.ceil(self._timeout_seconds),
                barrier_sync_fn=lambda *, key, timeout_ms: agreement.reach(),
                create_directories_asynchronously=False,
            ),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                # Naming the processes selects barriers of the coordination service, which have
                # deadlines and name who is missing, over collectives on devices, which do not.
                active_processes=set(range(jax.process_count())),
                barrier_sync_key_prefix=f"lemur_checkpoint_{next(serial_numbers)}",
            ),
        )
        trees = {
            item: ocp.args.PyTreeSave(
                dict(arrays), save_args={name: save_args(a) for name, a in arrays.items()}
            )
            for item, arrays in arrays_by_item.items()
        }
        try:
            # The loop may forbid implicit transfers; these are meant.
            with jax.transfer_guard("allow"):
                digests = digest.dispatch(
                    {name: a for arrays in arrays_by_item.values() for name, a in arrays.items()}
                )
                if jax.process_index() == 0:
                    self._keeper.make_room(step)
                orbax.save(self.directory / str(step), args=ocp.args.Composite(**trees))
        except Exception as error:
            self._abandon(step, orbax, agreement, error)
            raise self._failure(step, error) from error
        job = _Save(
            step=step,
            orbax=orbax,
            agreement=agreement,
            digests=digests,
            entries=entries,
            about=about,
            files=files,
        )
        self._thread = threading.Thread(target=self._finish, args=(job,), name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Blocks until no save is under way.

        Raises:
          CheckpointError: it failed; names step, path, cause and the checkpoint that is intact.
            Raised once; the writer is then ready for another save.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for the last save; raises as `wait` does. The writer can be used again."""
        self.wait()

    def _finish(self, job: _Save) -> None:
        """The background thread: from Orbax's commit to the manifest, then the keep policy."""
        try:
            job.orbax.wait_until_finished()
            with jax.transfer_guard("allow"):
                found = digest.collect(job.digests)
            job.agreement.reach()  # only what is well everywhere gets a manifest
            if self._last_agreement is not None:
                self._last_agreement.forget()
            self._last_agreement = job.agreement
            if jax.process_index() == 0:
                entries = {
                    name: dataclasses.replace(entry, digest=found[name])
                    for name, entry in job.entries.items()
                }
                self._write_manifest(job, entries)
            job.agreement.reach()  # so that in no process `wait` returns before it is there
            job.orbax.close()
        except BaseException as error:
            self._abandon(job.step, job.orbax, job.agreement, error)
            self._error = self._failure(job.step, error)
            self._error.__cause__ = error
            self._report(str(self._error))  # now, and for programs that end without `wait`
            return
        if jax.process_index() == 0:
            try:
                self._keeper.prune(job.step)
            except Exception as error:  # the new checkpoint is whole: not a failed save
                self._report(f"keep policy after step {job.step}: {type(error).__name__}: {error}")

    def _write_manifest(self, job: _Save, entries: Mapping[str, ArrayEntry]) -> None:
        step_dir = self.directory / str(job.step)
        for name, data in job.files.items():
            (step_dir / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(step_dir / name, data)
        manifest = Manifest(
            step=job.step,
            jax_version=jax.__version__,
            arrays=entries,
            about=job.about,
            files={name: hashlib.sha256(data).hexdigest() for name, data in job.files.items()},
        )
        write_atomically(step_dir / MANIFEST, manifest_bytes(manifest))

    def _abandon(self, step: int, orbax, agreement: Agreement, error: BaseException) -> None:
        """After a failure: all processes stop, half-written goes, what was set aside returns."""
        agreement.fail(error)
        try:
            orbax.close()
        except Exception as second:
            self._report(f"closing the failed save of step {step}: {second}")
        if jax.process_index() == 0:
            self._keeper.undo(step)

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        steps = complete_steps(self.directory)
        intact = (
            f"previous checkpoint {steps[-1]} is intact" if steps else "there is none before it"
        )
        fix = "Free some space there" if _is_disk_full(error) else "Remove the cause"
        return CheckpointError(
            f"saving step {step} to {self.directory / str(step)} failed; {intact}. "
            f"Cause: {type(error).__name__}: {error}. {fix} and save again"
        )


def _is_disk_full(error: BaseException | None) -> bool:
    text = str(error)
    return "No space left" in text or "RESOURCE_EXHAUSTED" in text or "ENOSPC" in text
