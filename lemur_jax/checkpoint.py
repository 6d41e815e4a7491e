"""Checkpoints: flat {name: jax.Array} dictionaries to disk and back; the only door for Orbax.

On disk, RUN/checkpoints/<step>/ holds

    params/ opt/ ...    one Orbax item (OCDBT + zarr arrays) for each group of arrays, so that
                        reading one group never opens a file of another
    config.gin ...      small files of the caller, copied in
    manifest.json       step, name -> shape, dtype, digest, item; the caller's `about`; SHA-256 of
                        each small file and of the manifest itself

The manifest is written last, in one atomic act, after Orbax has committed: a directory without it
is not a checkpoint, whatever else it holds. Every tensor's digest (`lemur_jax.digest`) is taken on
the devices before the bytes leave them and compared after a restore, so "latest" can mean latest
verified. Nothing here depends on the mesh that saved: shardings are not stored, and a restore takes
them from its targets.

Measured on 8 CPU devices sharing 4 busy cores. 176 MB of float32 in 25 arrays: save returns after
0.1-0.2 s (the first after 1.7 s: it compiles the digests), is complete after 0.4-0.6 s, 22 files;
restore onto another mesh 0.3 s, with verification; digests about 1 GB/s on devices and on the host.
Compression is off: on weights zstd saved 11% of the bytes and took half as long again to commit.
zarr2, not zarr3: same speed and file count, and Orbax validates only zarr2 after merging processes.

Importing this module costs what `import orbax.checkpoint` costs (about 2.8 s, 2.5 s of it JAX).
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from lemur_jax import digest

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"  # the directory of checkpoints inside a run directory

# A chunk is the unit of reading. Capped, so that restoring a large array onto many devices does
# not read the same bytes once for each; and never across the leading axis (layers) when a slice
# of it is large enough to stand alone, so that one layer can be read without the others.
_CHUNK_BYTES = 32 << 20
_SLICE_BYTES = 256 << 10

_log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read. The message names what, where and the fix."""


class TargetMismatchError(CheckpointError):
    """The checkpoint is sound, but its names, shapes or dtypes are not those asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayEntry:
    """What the manifest says of one array: global shape, dtype name, digest, Orbax item."""

    shape: tuple[int, ...]
    dtype: str
    digest: str
    item: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of manifest.json.

    Attributes:
      step: optimizer steps done.
      jax_version: of the writer.
      arrays: every array of every item, by its flat name.
      about: the caller's JSON: model config, data position, tokenizer fingerprint.
      files: SHA-256 of each small file, by relative name.
    """

    step: int
    jax_version: str
    arrays: Mapping[str, ArrayEntry]
    about: Mapping[str, Any]
    files: Mapping[str, str]


# ---------------------------------------------------------------------------------------------
# Paths: which directories are checkpoints
# ---------------------------------------------------------------------------------------------


def _step_of(path: epath.Path) -> int | None:
    """The step that a directory name stands for; None if it is not a plain step number."""
    return int(path.name) if re.fullmatch(r"0|[1-9]\d*", path.name) else None


def _children(directory: epath.Path) -> list[epath.Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def complete_steps(directory: epath.PathLike) -> list[int]:
    """Steps of the complete checkpoints in `directory`, ascending; [] if it does not exist."""
    found = [
        _step_of(path)
        for path in _children(epath.Path(directory))
        if _step_of(path) is not None and (path / MANIFEST).exists()
    ]
    return sorted(step for step in found if step is not None)


def latest(directory: epath.PathLike) -> epath.Path | None:
    """The newest complete checkpoint in `directory` (not verified), or None."""
    steps = complete_steps(directory)
    return epath.Path(directory) / str(steps[-1]) if steps else None


def resolve(path: epath.PathLike) -> epath.Path:
    """The checkpoint directory meant by `path`: a run, its checkpoints directory or one step.

    Of a run or a checkpoints directory it is the newest complete step.

    Raises:
      CheckpointError: there is none; says what was looked for and what is there instead.
    """
    path = epath.Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a run, checkpoints or step directory")
    if (path / MANIFEST).exists():
        return path
    directory = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    newest = latest(directory)
    if newest is not None:
        return newest
    if _looks_half_written(path):
        whole = ", ".join(map(str, complete_steps(path.parent))) or "none"
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no {MANIFEST}, so its save was "
            f"interrupted. Complete steps beside it: {whole}"
        )
    children = _children(directory)
    incomplete = [child.name for child in children if _looks_half_written(child)]
    others = [child.name for child in children if not _looks_half_written(child)]
    raise CheckpointError(
        f"no complete checkpoint in {directory}: looked for <step>/{MANIFEST}. "
        f"Incomplete (interrupted saves): {', '.join(incomplete) or 'none'}. "
        f"Other entries: {', '.join(others[:10]) or 'none'}{', ...' if others[10:] else ''}"
    )


def _looks_half_written(path: epath.Path) -> bool:
    """Step directories without a manifest, Orbax's temporary ones, and ones set aside."""
    number = path.name.split(".")[0]
    return number.isdigit() and path.is_dir() and not (path / MANIFEST).exists()


# ---------------------------------------------------------------------------------------------
# The manifest
# ---------------------------------------------------------------------------------------------


def _self_digest(contents: Mapping[str, Any]) -> str:
    text = json.dumps(contents, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest_bytes(manifest: Manifest) -> bytes:
    contents = {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    # Through JSON once, so that the digest is of what a reader will see (tuples become lists).
    contents = json.loads(json.dumps(contents))
    contents["sha256"] = _self_digest(contents)
    return (json.dumps(contents, indent=1) + "\n").encode()


def describe(step_dir: epath.PathLike) -> Manifest:
    """Reads and checks the manifest of one checkpoint; opens no other file.

    Raises:
      CheckpointError: no manifest, damaged, or of a format this version does not know.
    """
    path = epath.Path(step_dir) / MANIFEST
    try:
        contents = json.loads(path.read_bytes())
        stated = contents.pop("sha256")
        version = contents.pop("format_version")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: {step_dir} is not a complete checkpoint. "
            "Give a step directory, or find one with `resolve`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}): use another checkpoint"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version={version!r}, but this version of lemur_jax reads "
            f"{FORMAT_VERSION}: use the version that wrote it (jax {contents.get('jax_version')})"
        )
    if _self_digest({"format_version": version, **contents}) != stated:
        raise CheckpointError(
            f"{path} is damaged: its contents do not match its own sha256={stated}. "
            "Use another checkpoint; if the file was edited by hand, undo the edit"
        )
    arrays = {
        name: ArrayEntry(**{**entry, "shape": tuple(entry["shape"])})
        for name, entry in contents.pop("arrays").items()
    }
    return Manifest(arrays=arrays, **contents)


def read_file(step_dir: epath.PathLike, name: str) -> bytes:
    """One of the small files saved with a checkpoint, checked against the manifest.

    Raises:
      CheckpointError: there is no such file, or it has changed since it was saved.
    """
    files = describe(step_dir).files
    path = epath.Path(step_dir) / name
    if name not in files:
        raise CheckpointError(f"{path} is not part of the checkpoint; files: {', '.join(files)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): use another checkpoint") from error
    if hashlib.sha256(data).hexdigest() != files[name]:
        raise CheckpointError(
            f"{path} has changed since it was saved (sha256 is not {files[name]}): restore it "
            "from a copy or use another checkpoint"
        )
    return data


def _write_atomically(path: epath.Path, data: bytes) -> None:
    """After this `path` holds all of `data`, durably; a crash leaves the old state, not half."""
    if "://" in str(path):
        path.write_bytes(data)  # object stores publish an object only when it is whole
        return
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------
# Agreement between processes
# ---------------------------------------------------------------------------------------------

_agreements = itertools.count()


class _Agreement:
    """Stages that all processes pass together or fail together, with a deadline for each stage.

    A plain barrier leaves the healthy processes waiting for one that failed, until the deadline.
    Here a process votes "ok" or says what went wrong; process 0 collects all votes and publishes
    the verdict, so every process learns at once who failed and why, and after a failure no
    process is still at work. Votes go through jax.distributed's coordination service, never
    through device collectives, so they are safe beside a running step and in any thread.
    With one process every stage passes.

    Every process must create its agreements, and pass their stages, in the same order.
    """

    def __init__(self, timeout_seconds: float):
        self._prefix = f"lemur_checkpoint/{next(_agreements)}"
        self._stages = itertools.count()
        self._timeout_seconds = timeout_seconds
        self._failed = False

    def reach(self, error: str | None = None, *, value: str = "ok") -> str:
        """Votes; returns process 0's `value` if all are well.

        Raises:
          CheckpointError: some process failed or did not answer in time; names all of those.
        """
        if jax.process_count() == 1:
            if error is not None:
                raise CheckpointError(error)
            return value
        # JAX exports no other handle on its coordination service; Orbax takes the same one.
        from jax._src import distributed

        client = distributed.global_state.client
        stage = f"{self._prefix}/{next(self._stages)}"
        me = jax.process_index()
        client.key_value_set(f"{stage}/{me}", "ok" if error is None else f"failed {error}")
        if me == 0:
            verdict = self._collect(client, stage)
            client.key_value_set(f"{stage}/verdict", verdict or f"ok {value}")
        else:
            # Process 0 may itself wait for the whole deadline before it can answer.
            verdict = self._get(client, f"{stage}/verdict", self._timeout_seconds + 30)
            if verdict is None:
                verdict = f"process 0 gave no verdict within {self._timeout_seconds + 30:.0f} s"
            elif verdict.startswith("ok "):
                return verdict.removeprefix("ok ")
        if verdict:
            self._failed = True
            raise CheckpointError(verdict)
        return value

    def fail(self, error: BaseException) -> None:
        """Votes no at the stage where the others are or will be; returns when all have voted."""
        if not self._failed and jax.process_count() > 1:
            with contextlib.suppress(CheckpointError):  # that is the point
                self.reach(f"{type(error).__name__}: {error}")

    def forget(self) -> None:
        """Frees the coordination service's memory, once every process is past the last stage."""
        if jax.process_count() > 1 and jax.process_index() == 0:
            from jax._src import distributed

            distributed.global_state.client.key_value_delete(self._prefix)

    def _collect(self, client, stage: str) -> str:
        """All votes; "" if each is "ok", else one line on every process that failed."""
        deadline = time.monotonic() + self._timeout_seconds
        problems = []
        for process in range(jax.process_count()):
            left = max(deadline - time.monotonic(), 0.001)
            vote = self._get(client, f"{stage}/{process}", left)
            if vote is None:
                problems.append(
                    f"process {process} did not answer within {self._timeout_seconds:.0f} s"
                )
            elif vote != "ok":
                problems.append(f"process {process} {vote}")
        return "; ".join(problems)

    @staticmethod
    def _get(client, key: str, seconds: float) -> str | None:
        try:
            return str(client.blocking_key_value_get(key, int(seconds * 1000)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's reader and writer of one item, told to store and consult no shardings."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=False, use_compression=False, type_handler_registry=registry
    )


def _save_args(array: jax.Array) -> ocp.SaveArgs:
    shard = array.sharding.shard_shape(array.shape)
    bytes_of_a_slice = math.prod(shard[1:]) * array.dtype.itemsize
    alone = array.ndim > 1 and bytes_of_a_slice >= _SLICE_BYTES
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if alone else ())


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
    agreement: _Agreement
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
        self.directory = epath.Path(
            os.path.abspath(directory) if "://" not in str(directory) else directory
        )
        self._keep_latest = keep_latest
        self._keep_every_steps = keep_every_steps
        self._timeout_seconds = timeout_seconds
        self._report = report
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._last_agreement: _Agreement | None = None
        self._check_shared()

    def _check_shared(self) -> None:
        """Without this, shards written to a private disk would only be missed at the restore."""
        agreement = _Agreement(self._timeout_seconds)
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
        agreement = _Agreement(self._timeout_seconds)
        # One AsyncCheckpointer for each save: no state of a failed one can leak into the next.
        orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(**{item: _handler() for item in arrays_by_item}),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=math.ceil(self._timeout_seconds),
                barrier_sync_fn=lambda *, key, timeout_ms: agreement.reach(),
                create_directories_asynchronously=False,
            ),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                # Naming the processes selects barriers of the coordination service, which have
                # deadlines and name who is missing, over collectives on devices, which do not.
                active_processes=set(range(jax.process_count())),
                barrier_sync_key_prefix=f"lemur_checkpoint_{next(_agreements)}",
            ),
        )
        trees = {
            item: ocp.args.PyTreeSave(
                dict(arrays), save_args={name: _save_args(a) for name, a in arrays.items()}
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
                    self._make_room(step)
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
                self._prune(job.step)
            except Exception as error:  # the new checkpoint is whole: not a failed save
                self._report(f"keep policy after step {job.step}: {type(error).__name__}: {error}")

    def _write_manifest(self, job: _Save, entries: Mapping[str, ArrayEntry]) -> None:
        step_dir = self.directory / str(job.step)
        for name, data in job.files.items():
            (step_dir / name).parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(step_dir / name, data)
        manifest = Manifest(
            step=job.step,
            jax_version=jax.__version__,
            arrays=entries,
            about=job.about,
            files={name: hashlib.sha256(data).hexdigest() for name, data in job.files.items()},
        )
        _write_atomically(step_dir / MANIFEST, _manifest_bytes(manifest))

    # Removing and setting aside, in process 0 only. A crash at any point leaves directories that
    # are either whole or not taken for checkpoints.

    def _aside(self, step: int) -> epath.Path:
        return self.directory / f"{step}.superseded"

    def _make_room(self, step: int) -> None:
        """Frees the name of `step`: leftovers of a crash go, a complete checkpoint steps aside."""
        step_dir = self.directory / str(step)
        if (step_dir / MANIFEST).exists():
            if self._aside(step).exists():
                self._remove(self._aside(step))
            step_dir.rename(self._aside(step))
        self._remove_half_written(step)

    def _abandon(self, step: int, orbax, agreement: _Agreement, error: BaseException) -> None:
        """After a failure: all processes stop, half-written goes, what was set aside returns."""
        agreement.fail(error)
        try:
            orbax.close()
        except Exception as second:
            self._report(f"closing the failed save of step {step}: {second}")
        if jax.process_index() != 0:
            return
        self._remove_half_written(step)
        step_dir = self.directory / str(step)
        if self._aside(step).exists() and not step_dir.exists():
            self._aside(step).rename(step_dir)

    def _remove_half_written(self, step: int) -> None:
        """What a failed or killed save left: temporary directories, and `step` if not whole."""
        for path in _children(self.directory):
            temporary = re.fullmatch(r"\d+\.(removed|orbax-checkpoint-tmp.*)", path.name)
            if temporary or (path.name == str(step) and not (path / MANIFEST).exists()):
                self._remove(path)

    def _remove(self, path: epath.Path) -> None:
        """Deletes a directory; a crash leaves nothing that looks whole, nor that nobody deletes."""
        try:
            if _step_of(path) is not None and "://" not in str(path):
                path = path.rename(path.with_name(f"{path.name}.removed"))
            (path / MANIFEST).unlink(missing_ok=True)  # object stores cannot rename: this first
            # After a failed write, others of the same save may still be creating files.
            for seconds in (0.1, 0.4, 1.6, None):
                try:
                    path.rmtree(missing_ok=True)
                    break
                except OSError:
                    if seconds is None:
                        raise
                    time.sleep(seconds)
        except OSError as error:
            self._report(f"cannot remove {path}: {error}. Remove it by hand")

    def _prune(self, step: int) -> None:
        """The keep policy, after `step` is complete.

        Steps after `step` are not counted and not touched: they belong to a future that a resume
        from an older checkpoint has left, and counting them could delete what was just saved.
        """
        past = [s for s in complete_steps(self.directory) if s <= step]
        every = self._keep_every_steps
        for old in past[: -self._keep_latest]:
            if every is None or old % every:
                self._remove(self.directory / str(old))
        if self._aside(step).exists():
            self._remove(self._aside(step))

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


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def _select(
    step_dir: epath.Path, manifest: Manifest, items: Sequence[str], names: Sequence[str] | None
) -> dict[str, ArrayEntry]:
    """Entries of the wanted items, or of the wanted names among them, in the order asked for."""
    there = {entry.item for entry in manifest.arrays.values()}
    if missing := [item for item in items if item not in there]:
        raise TargetMismatchError(
            f"{step_dir} has no item {', '.join(missing)}; it has {', '.join(sorted(there))}"
        )
    entries = {name: entry for name, entry in manifest.arrays.items() if entry.item in items}
    if names is None:
        return entries
    if unknown := [name for name in names if name not in entries]:
        raise TargetMismatchError(
            f"{step_dir} has no array {', '.join(unknown)} in items {', '.join(items)}; "
            f"it has {_some(entries)}"
        )
    return {name: entries[name] for name in names}


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _check_targets(
    step_dir: epath.Path,
    entries: Mapping[str, ArrayEntry],
    targets: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    problems = []
    if missing := [name for name in targets if name not in entries]:
        problems.append(f"the checkpoint lacks {_some(missing)}")
    if extra := [name for name in entries if name not in targets]:
        problems.append(f"the checkpoint has more than the targets: {_some(extra)}")
    for name, entry in entries.items():
        if (target := targets.get(name)) is None:
            continue
        if tuple(target.shape) != entry.shape:
            problems.append(f"{name}: saved shape {entry.shape}, target {tuple(target.shape)}")
        if np.dtype(target.dtype).name != entry.dtype:
            problems.append(
                f"{name}: saved dtype {entry.dtype}, target {np.dtype(target.dtype).name} "
                "(restore as saved, then cast)"
            )
        if getattr(target, "sharding", None) is None:
            problems.append(f"{name}: the target has no sharding (or give targets=None)")
    if problems:
        raise TargetMismatchError(
            f"{step_dir} does not fit the model that asks for it: {'; '.join(problems)}. "
            "Use the configuration that the checkpoint was saved with"
        )


def _open(item_dir: epath.Path, name: str) -> Any:
    """A future of the array's TensorStore: reads the item's index, no data."""
    spec = {
        "driver": "zarr",
        "fill_missing_data_reads": False,  # a lost chunk is an error, not zeros
        "kvstore": {"driver": "ocdbt", "base": _url(item_dir), "path": f"{name}/"},
    }
    return tensorstore.open(spec, open=True, read=True)


def _url(path: epath.Path) -> str:
    return f"{path}/" if "://" in str(path) else f"file://{os.path.abspath(path)}/"


def _check_index(item_dir: epath.Path, entries: Mapping[str, ArrayEntry]) -> None:
    """Opens every array first, so that a damaged index is one error that names all it touches.

    (Found by Orbax, the first of many reads in flight fails, and the others complain to stderr.)
    """
    bad: dict[str, Exception] = {}
    for name, future in {name: _open(item_dir, name) for name in entries}.items():
        try:
            store = future.result()
        except ValueError as error:
            bad[name] = error
            continue
        found, said = (store.dtype.name, store.shape), (entries[name].dtype, entries[name].shape)
        if found != said:
            bad[name] = ValueError(f"{name} is stored as {found}, the manifest says {said}")
    if bad:
        raise CheckpointError(_unreadable(item_dir, list(bad), next(iter(bad.values()))))


def _brief(error: BaseException) -> str:
    """TensorStore's message without the specification it appends, which is longer than a page."""
    return re.sub(r" \[(tensorstore_spec|source locations).*", "", str(error), flags=re.DOTALL)


def _read_item(
    item_dir: epath.Path,
    entries: Mapping[str, ArrayEntry],
    targets: Mapping[str, jax.ShapeDtypeStruct] | None,
) -> dict[str, Any]:
    """Arrays of one item, by Orbax: on the targets' shardings, or numpy when there are none."""
    if targets is None:
        how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in entries}
    else:
        how = {
            name: ocp.ArrayRestoreArgs(
                sharding=targets[name].sharding,
                global_shape=entry.shape,
                dtype=np.dtype(targets[name].dtype),
                strict=True,
            )
            for name, entry in entries.items()
        }
    _check_index(item_dir, entries)
    arguments = ocp.args.PyTreeRestore(
        item=dict.fromkeys(entries, 0), restore_args=how, partial_restore=True
    )
    arrays = _handler().restore(item_dir, args=arguments)
    # Numpy reads scalars as numpy scalars.
    return arrays if targets is not None else {n: np.asarray(a) for n, a in arrays.items()}


def restore(
    step_dir: epath.PathLike,
    items: Sequence[str] = ("params",),
    targets: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    *,
    names: Sequence[str] | None = None,
    verify: bool = True,
    timeout_seconds: float = 1200,
) -> dict[str, Any]:
    """Arrays of a checkpoint, by flat name. Opens no file of items that were not asked for.

    With targets, every process of jax.distributed must make the same call; each reads only what
    its devices need. Without, a process reads everything for itself alone.

    Args:
      step_dir: one checkpoint (see `resolve`).
      items: which items to read.
      targets: for each array its shape, dtype and `sharding`, on any mesh; the arrays come back
        as jax.Array with these shardings. None: as numpy arrays on the host.
      names: read only these arrays of the items.
      verify: compare the digest of every array with the manifest.
      timeout_seconds: how long processes wait for one another.

    Raises:
      TargetMismatchError: names, shapes or dtypes differ; nothing has been read.
      CheckpointError: damaged or unreadable data; names the arrays, the place and the fix.
    """
    step_dir = epath.Path(step_dir)
    manifest = describe(step_dir)
    entries = _select(step_dir, manifest, items, names)
    if targets is not None:
        _check_targets(step_dir, entries, targets)
    arrays: dict[str, Any] = {}
    problem = None
    with jax.transfer_guard("allow"):
        for item in items:
            wanted = {name: entry for name, entry in entries.items() if entry.item == item}
            if not wanted or problem:
                continue
            try:
                read = _read_item(step_dir / item, wanted, targets)
                arrays |= jax.block_until_ready(read)
            except CheckpointError as error:
                problem = str(error)
            except Exception as error:
                named = [name for name in wanted if f'"{name}/' in str(error)]
                problem = _unreadable(step_dir / item, named or list(wanted), error)
        if targets is None and problem is not None:
            raise CheckpointError(problem)
        if targets is not None:
            _Agreement(timeout_seconds).reach(problem)  # before the digests, which need everyone
        if verify:
            _verify(step_dir, entries, arrays)
    return {name: arrays[name] for name in entries}


def _verify(
    step_dir: epath.Path, entries: Mapping[str, ArrayEntry], arrays: Mapping[str, Any]
) -> None:
    if all(isinstance(array, jax.Array) for array in arrays.values()):
        found = digest.digest_arrays(arrays)
    else:
        found = {name: digest.digest_numpy(array) for name, array in arrays.items()}
    wrong = [name for name, entry in entries.items() if found[name] != entry.digest]
    if wrong:
        raise _damaged(step_dir, {name: entries[name].item for name in wrong})


def _damaged(step_dir: epath.Path, items: Mapping[str, str]) -> CheckpointError:
    places = ", ".join(f"{name} (in {step_dir / item})" for name, item in items.items())
    return CheckpointError(
        f"damaged checkpoint: the digest of {places} is not that of the manifest, so its bytes "
        "have changed since the save. Use another checkpoint, or copy this one again from where "
        "it came"
    )


def _unreadable(item_dir: epath.Path, names: Sequence[str], error: Exception) -> str:
    return (
        f"unreadable checkpoint: {_some(names)} in {item_dir}. "
        f"Cause: {type(error).__name__}: {_brief(error)}. "
        "Use another checkpoint, or copy this one again from where it came"
    )


def restore_latest(
    directory: epath.PathLike,
    items: Sequence[str],
    targets: Mapping[str, jax.ShapeDtypeStruct] | None,
    *,
    report: Callable[[str], None],
    timeout_seconds: float = 1200,
) -> tuple[epath.Path, dict[str, Any]]:
    """The newest checkpoint whose every byte asked for is as it was saved: what resume uses.

    Tries complete checkpoints from new to old. Each one that fails is reported, and the next
    older one tried; all processes try, and settle on, the same one.

    Args:
      directory: RUN/checkpoints.
      items, targets: as for `restore`.
      report: takes one line for each checkpoint that was passed over, and why.

    Returns:
      The checkpoint's directory and its arrays.

    Raises:
      TargetMismatchError: the newest sound one does not fit the targets (older ones will not
        either).
      CheckpointError: there is none, or none is sound. Never starts over silently.
    """
    directory = epath.Path(directory)
    steps = json.loads(
        _Agreement(timeout_seconds).reach(value=json.dumps(complete_steps(directory)))
    )
    if not steps:
        resolve(directory)  # says what is there
        raise CheckpointError(f"no complete checkpoint in {directory}")
    problems = []
    for step in reversed(steps):
        step_dir = directory / str(step)
        problem = None
        try:
            for name in describe(step_dir).files:
                read_file(step_dir, name)
            if targets is None:
                arrays = restore(step_dir, items)
        except TargetMismatchError:
            raise
        except CheckpointError as error:
            problem = str(error)
        try:
            _Agreement(timeout_seconds).reach(problem)
            if targets is not None:
                arrays = restore(step_dir, items, targets, timeout_seconds=timeout_seconds)
        except TargetMismatchError:
            raise
        except CheckpointError as error:
            report(f"checkpoint {step} is passed over: {error}")
            problems.append(f"{step}: {error}")
            continue
        return step_dir, arrays
    raise CheckpointError(
        f"no sound checkpoint in {directory}: " + "; ".join(problems) + ". To start over on "
        "purpose, give another run directory"
    )


# ---------------------------------------------------------------------------------------------
# Reading one array at a time, on the host
# ---------------------------------------------------------------------------------------------


def _select_one(step_dir: epath.Path, name: str) -> ArrayEntry:
    arrays = describe(step_dir).arrays
    if name not in arrays:
        raise TargetMismatchError(f"{step_dir} has no array {name}; it has {_some(arrays)}")
    return arrays[name]


def read_tensor(step_dir: epath.PathLike, name: str, *, verify: bool = True) -> np.ndarray:
    """One whole array on the host; reads the bytes of no other.

    Raises:
      TargetMismatchError: there is no such array.
      CheckpointError: damaged or unreadable data.
    """
    step_dir = epath.Path(step_dir)
    item = _select_one(step_dir, name).item
    return restore(step_dir, (item,), names=[name], verify=verify)[name]


def read_slices(step_dir: epath.PathLike, name: str) -> Iterator[np.ndarray]:
    """The slices of one array along its first axis (layers), one at a time, in order.

    Holds one slice at a time when a slice is 256 KiB or more in each shard (smaller ones share
    chunks, which are then read again). The digest is complete after the last slice: a caller
    that has used earlier slices must drop that work when the error comes.

    Raises:
      TargetMismatchError: there is no such array.
      CheckpointError: damaged or unreadable data.
    """
    step_dir = epath.Path(step_dir)
    entry = _select_one(step_dir, name)
    total = digest.StreamingDigest()
    try:
        store = _open(step_dir / entry.item, name).result()
        for index in range(entry.shape[0]):
            block = np.asarray(store[index].read().result())
            total.add(block[None], (index,) + (0,) * block.ndim)
            yield block
    except ValueError as error:
        raise CheckpointError(_unreadable(step_dir / entry.item, [name], error)) from error
    if total.hexdigest() != entry.digest:
        raise _damaged(step_dir, {name: entry.item})
