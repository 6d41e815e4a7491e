"""Which directories are checkpoints, and what a checkpoint says of itself: manifest, small files.

Needs neither JAX nor Orbax.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from lemur_jax.errors import LemurError

# gs:// and s3:// through gcsfs and s3fs. With TensorFlow installed (SeqIO brings it) epath would
# import it, which takes seconds and knows no s3://.
os.environ.setdefault("EPATH_USE_TF", "false")
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"  # the directory of checkpoints inside a run directory


class CheckpointError(LemurError):
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


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root if it is local: Orbax and TensorStore know no working directory.

    Raises:
      CheckpointError: an object store that we do not know, or whose package is not installed.
    """
    if "://" not in str(path):
        return epath.Path(os.path.abspath(path))
    scheme = str(path).split("://")[0]
    if scheme not in _PACKAGES:
        legal = ", ".join(f"{name}://" for name in _PACKAGES)
        raise CheckpointError(f"{path}: {scheme}:// is not known; legal: {legal} and local paths")
    if importlib.util.find_spec(_PACKAGES[scheme]) is None:
        raise CheckpointError(
            f"{path}: {scheme}:// needs the package {_PACKAGES[scheme]}: "
            f"pip install {_PACKAGES[scheme]}"
        )
    return epath.Path(path)


def step_of(path: epath.Path) -> int | None:
    """The step that a directory name stands for; None if it is not a plain step number."""
    return int(path.name) if re.fullmatch(r"0|[1-9]\d*", path.name) else None


def list_directory(directory: epath.Path) -> list[epath.Path]:
    """Its entries in the order of their names; [] if it does not exist."""
    return sorted(directory.iterdir()) if directory.is_dir() else []


def complete_steps(directory: epath.PathLike) -> list[int]:
    """Steps of the complete checkpoints in `directory`, ascending; [] if it does not exist."""
    found = [
        step_of(path)
        for path in list_directory(absolute(directory))
        if step_of(path) is not None and (path / MANIFEST).exists()
    ]
    return sorted(step for step in found if step is not None)


def latest(directory: epath.PathLike) -> epath.Path | None:
    """The newest complete checkpoint in `directory` (not verified), or None."""
    steps = complete_steps(directory)
    return absolute(directory) / str(steps[-1]) if steps else None


def resolve(path: epath.PathLike) -> epath.Path:
    """The checkpoint directory meant by `path`: a run, its checkpoints directory or one step.

    Of a run or a checkpoints directory it is the newest complete step.

    Raises:
      CheckpointError: there is none; says what was looked for and what is there instead.
    """
    path = absolute(path)
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
    children = list_directory(directory)
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


def manifest_bytes(manifest: Manifest) -> bytes:
    """The contents of manifest.json, with their own digest."""
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
    step_dir = absolute(step_dir)
    path = step_dir / MANIFEST
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
    step_dir = absolute(step_dir)
    files = describe(step_dir).files
    path = step_dir / name
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


def write_atomically(path: epath.Path, data: bytes) -> None:
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
