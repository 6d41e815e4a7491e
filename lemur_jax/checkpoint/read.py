"""Reading: whole items onto devices or the host, or one array or layer at a time."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from lemur_jax.checkpoint import digest
from lemur_jax.checkpoint.agreement import Agreement
from lemur_jax.checkpoint.items import open_array, read_item, some, unreadable
from lemur_jax.checkpoint.manifest import (
    ArrayEntry,
    CheckpointError,
    Manifest,
    TargetMismatchError,
    absolute,
    complete_steps,
    describe,
    read_file,
    resolve,
)


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
    step_dir = absolute(step_dir)
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
                read = read_item(step_dir / item, wanted, targets)
                arrays |= jax.block_until_ready(read)
            except CheckpointError as error:
                problem = str(error)
            except Exception as error:
                named = [name for name in wanted if f'"{name}/' in str(error)]
                problem = unreadable(step_dir / item, named or list(wanted), error)
        if targets is None and problem is not None:
            raise CheckpointError(problem)
        if targets is not None:
            Agreement(timeout_seconds).reach(problem)  # before the digests, which need everyone
        if verify:
            _verify(step_dir, entries, arrays)
    return {name: arrays[name] for name in entries}


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
    directory = absolute(directory)
    steps = json.loads(
        Agreement(timeout_seconds).reach(value=json.dumps(complete_steps(directory)))
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
            Agreement(timeout_seconds).reach(problem)
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
            f"it has {some(entries)}"
        )
    return {name: entries[name] for name in names}


def _check_targets(
    step_dir: epath.Path,
    entries: Mapping[str, ArrayEntry],
    targets: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    problems = []
    if missing := [name for name in targets if name not in entries]:
        problems.append(f"the checkpoint lacks {some(missing)}")
    if extra := [name for name in entries if name not in targets]:
        problems.append(f"the checkpoint has more than the targets: {some(extra)}")
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


# ---------------------------------------------------------------------------------------------
# One array at a time, on the host
# ---------------------------------------------------------------------------------------------


def read_tensor(step_dir: epath.PathLike, name: str, *, verify: bool = True) -> np.ndarray:
    """One whole array on the host; reads the bytes of no other.

    Raises:
      TargetMismatchError: there is no such array.
      CheckpointError: damaged or unreadable data.
    """
    step_dir = absolute(step_dir)
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
    step_dir = absolute(step_dir)
    entry = _select_one(step_dir, name)
    total = digest.StreamingDigest()
    try:
        store = open_array(step_dir / entry.item, name).result()
        for index in range(entry.shape[0]):
            block = np.asarray(store[index].read().result())
            total.add(block[None], (index,) + (0,) * block.ndim)
            yield block
    except ValueError as error:
        raise CheckpointError(unreadable(step_dir / entry.item, [name], error)) from error
    if total.hexdigest() != entry.digest:
        raise _damaged(step_dir, {name: entry.item})


class OpenArray:
    """One array of a checkpoint, to be read in parts on the host. Nothing is verified: a digest
    is of a whole array."""

    def __init__(self, step_dir: epath.PathLike, name: str, entry: ArrayEntry, context: Any = None):
        """Reads the array's metadata.

        Args:
          step_dir: the checkpoint.
          name: of the array.
          entry: what the manifest says of it.
          context: from `slice_context`; bounds what is in flight.

        Raises:
          CheckpointError: damaged, or not what the manifest says.
        """
        self._item_dir, self._name = absolute(step_dir) / entry.item, name
        try:
            self._store = open_array(self._item_dir, name, context).result()
        except ValueError as error:
            raise CheckpointError(unreadable(self._item_dir, [name], error)) from error
        found = (self._store.dtype.name, self._store.shape)
        if found != (entry.dtype, entry.shape):
            said = (entry.dtype, entry.shape)
            wrong = ValueError(f"{name} is stored as {found}, the manifest says {said}")
            raise CheckpointError(unreadable(self._item_dir, [name], wrong))

    @property
    def chunks(self) -> tuple[int, ...]:
        """The shape of what is read as one."""
        return tuple(self._store.chunk_layout.read_chunk.shape)

    @property
    def plain_directory(self) -> str | None:
        """Where each chunk is a local file of bare bytes, named by its numbers (0.1.0); else None:
        Orbax's database, compression, or an object store."""
        where = self._store.kvstore.spec().to_json()
        bare = self._store.spec().to_json()["metadata"]["compressor"] is None
        if where.get("driver") != "file" or not bare:
            return None
        return str(self._item_dir / self._name)

    def read(self, region: Sequence[slice]) -> np.ndarray:
        """A part, one slice for each axis.

        Raises:
          CheckpointError: damaged or unreadable data.
        """
        try:
            return np.asarray(self._store[tuple(region)].read().result())
        except ValueError as error:
            raise CheckpointError(unreadable(self._item_dir, [self._name], error)) from error


def _select_one(step_dir: epath.Path, name: str) -> ArrayEntry:
    arrays = describe(step_dir).arrays
    if name not in arrays:
        raise TargetMismatchError(f"{step_dir} has no array {name}; it has {some(arrays)}")
    return arrays[name]
