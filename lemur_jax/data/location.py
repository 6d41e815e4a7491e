"""Paths that may be local or in object storage: the one file that knows the difference.

A location is a string: a local path, or `gs://bucket/path`, `s3://bucket/path`, `file:///path`,
`memory://path` (one process only, for tests). Everything goes through TensorStore's key-value
stores, which write a file whole or not at all, so no second library has to know the clouds.
"""

import atexit
import concurrent.futures
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tensorstore as ts

from lemur_jax.config import ConfigError
from lemur_jax.errors import LemurError

_BUCKETS = {"gs": "gcs", "s3": "s3"}
# One context for all: `memory://` lives in it. Rows read at random never repeat within an epoch,
# so nothing is worth caching but the index of each shard.
CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 64 * 2**20}})
# For many files of which none counts until `sync` has put them all on the disk.
UNSYNCED = ts.Context({"file_io_sync": False}, parent=CONTEXT)
_SYNC_THREADS = 16  # syncs that wait together cost the disk little more than one


class StorageError(LemurError, OSError):
    """A file or object that cannot be written or read: disk full, permissions, network."""


def is_local(location: str | Path) -> bool:
    """Whether `location` is on a disk of this machine."""
    return "://" not in str(location) or str(location).startswith("file://")


def local(location: str | Path) -> Path:
    """The absolute local path of a local location."""
    return Path(str(location).removeprefix("file://")).absolute()


def join(location: str | Path, *names: str) -> str:
    """`location/name/name`: pathlib would turn gs:// into gs:/."""
    return "/".join([str(location).rstrip("/"), *filter(None, names)])


def kvstore(location: str | Path) -> dict[str, Any]:
    """TensorStore's spec of the directory `location`. Raises ConfigError for an unknown scheme."""
    if is_local(location):
        return {"driver": "file", "path": f"{local(location)}/"}
    scheme, _, rest = str(location).partition("://")
    if scheme == "memory":
        return {"driver": "memory", "path": rest.rstrip("/") + "/"}
    bucket, _, path = rest.partition("/")
    if scheme not in _BUCKETS or not bucket:
        raise ConfigError(
            [f"path={str(location)!r}: use a local path, gs://BUCKET/PATH or s3://BUCKET/PATH"]
        )
    path = path.rstrip("/")
    return {"driver": _BUCKETS[scheme], "bucket": bucket, "path": f"{path}/" if path else ""}


def _open(directory: str | Path) -> ts.KvStore:
    return ts.KvStore.open(kvstore(directory), context=CONTEXT).result()


def read(directory: str | Path, name: str) -> bytes | None:
    """Content of the file `name` in `directory`; None when there is none."""
    if is_local(directory):
        path = local(directory) / name
        return path.read_bytes() if path.is_file() else None
    try:
        found = _open(directory).read(name).result()
    except (ValueError, OSError) as error:
        raise storage_error("read", join(directory, name), error) from error
    return found.value if found.state == "value" else None


def write(directory: str | Path, name: str, data: bytes) -> None:
    """Writes a file whole or not at all. Raises StorageError, e.g. when the disk is full."""
    try:
        _open(directory).write(name, data).result()
    except (ValueError, OSError) as error:
        raise storage_error("written", join(directory, name), error) from error


def sizes(directory: str | Path) -> dict[str, int | None]:
    """Relative names of all files below `directory` -> bytes (None where a listing has no size)."""
    if not is_local(directory):
        return {key.decode(): None for key in sorted(_open(directory).list().result())}
    root, found = local(directory), {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            found[path.relative_to(root).as_posix()] = path.stat().st_size
    return dict(sorted(found.items()))


def children(directory: str | Path) -> list[str]:
    """Names of the files and folders directly in `directory`, sorted; [] when it is not there."""
    if is_local(directory):
        return sorted(os.listdir(local(directory))) if local(directory).is_dir() else []
    return sorted({name.split("/")[0] for name in sizes(directory)})


def remove(where: str | Path) -> None:
    """Removes a file or a directory with everything in it; nothing happens when there is none."""
    if not is_local(where):
        parent, _, name = str(where).rpartition("/")
        _open(parent).write(name, None).result()
        _open(where).delete_range(ts.KvStore.KeyRange()).result()
    elif local(where).is_dir():
        shutil.rmtree(local(where))
    else:
        local(where).unlink(missing_ok=True)


def sync(directory: str | Path) -> None:
    """Waits until every file of a local directory is on the disk; StorageError when it is full."""
    if not is_local(directory):
        return
    root = local(directory)
    paths = [root / name for name in sizes(directory)]
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    with concurrent.futures.ThreadPoolExecutor(_SYNC_THREADS) as pool:
        try:
            list(pool.map(_sync_one, [*paths, *folders]))
        except OSError as error:
            raise storage_error("written", str(error.filename or root), error) from error


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def _copied(directory: str) -> Path:
    copy = Path(tempfile.mkdtemp(prefix="lemur_copy_"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for name in sizes(directory):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(read(directory, name))
    return copy


def fetch(directory: str | Path) -> Path:
    """A local directory with the content of a small one; a copy lives as long as the process."""
    return local(directory) if is_local(directory) else _copied(str(directory))


def storage_error(what: str, where: str, error: Exception) -> StorageError:
    """TensorStore's error in one line: what could not be done with which file, and a fix."""
    text = str(error)
    full = "No space left" in text or "File too large" in text or "quota" in text.lower()
    fix = "free some space" if full else "see to the disk, the rights or the network"
    reason = "no space left: the disk is full" if full else text.splitlines()[0]
    return StorageError(f"{where!r} cannot be {what} ({reason}): {fix} and run the same command")
