"""Local files and object storage behind four functions; fsspec is imported for URLs only."""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from lemur_jax.config import ConfigError

_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "abfs": "adlfs", "hf": "huggingface_hub"}


def is_remote(path: str) -> bool:
    """Whether `path` is a URL, e.g. gs://bucket/name."""
    return "://" in path


def open_binary(path: str, field: str = "path") -> BinaryIO:
    """A file to read bytes from, in order; OSError when it cannot be opened."""
    if not is_remote(path):
        return open(path, "rb")
    system, name = _system(path, field)
    return system.open(name, "rb")


def size(path: str, field: str = "path") -> int:
    """Bytes of a file as it is stored."""
    if not is_remote(path):
        return os.path.getsize(path)
    system, name = _system(path, field)
    return int(system.size(name) or 0)


def matches(pattern: str, field: str = "path") -> list[str]:
    """Files and directories that a path or glob names, sorted; [] when there are none."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    system, name = _system(pattern, field)
    found = system.glob(name) if glob.has_magic(name) else [name] * system.exists(name)
    return sorted(system.unstrip_protocol(path) for path in found)


def is_directory(path: str, field: str = "path") -> bool:
    """Whether `path` is a directory (in object storage: a prefix of names)."""
    if not is_remote(path):
        return os.path.isdir(path)
    system, name = _system(path, field)
    return bool(system.isdir(name))


def files_below(path: str, field: str = "path") -> list[str]:
    """All files of a directory tree, sorted; names that begin with a dot are left out."""
    if is_remote(path):
        system, name = _system(path, field)
        found = [(system.unstrip_protocol(file), file[len(name) :]) for file in system.find(name)]
    else:
        walked = [os.path.join(base, file) for base, _, files in os.walk(path) for file in files]
        found = [(file, file[len(path) :]) for file in walked]
    return sorted(file for file, below in found if "/." not in f"/{below}")


def exists(path: str, field: str = "path") -> bool:
    """Whether a file or directory is there."""
    if not is_remote(path):
        return os.path.exists(path)
    system, name = _system(path, field)
    return bool(system.exists(name))


@contextlib.contextmanager
def local_copy(path: str, field: str = "path") -> Iterator[str]:
    """A local path of a file, for libraries that know local files only; a copy is removed again."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lemur_copy_") as directory:
        copy = os.path.join(directory, os.path.basename(path))
        with open_binary(path, field) as source, open(copy, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        yield copy


def _system(url: str, field: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the name in it."""
    protocol = url.split("://", 1)[0]
    package = _PACKAGES.get(protocol, "the fsspec package of that storage")
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        missing = "fsspec" if "fsspec" in str(error) and error.name == "fsspec" else package
        raise ConfigError(
            [f"{field}={url!r} needs {missing} ({error}): pip install fsspec {package}"]
        ) from error
    except ValueError as error:
        raise ConfigError(
            [f"{field}={url!r} has an unknown protocol ({error}): gs://, s3://, or a local path"]
        ) from error
