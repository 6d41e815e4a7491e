"""How a new directory comes into being: whole or not at all."""

import os
from pathlib import Path

from etils import epath

from lemur_jax import checkpoint
from lemur_jax.convert.errors import ConversionError


def real(directory: str | Path) -> str | Path:
    """Where `directory` leads if it is a link: the result, and what lies beside it until it is
    whole, belong on the disk that the link points to."""
    local = "://" not in str(directory)
    return os.path.realpath(directory) if local and os.path.islink(directory) else directory


def check_new(directory: str | Path) -> None:
    """Raises ConversionError if `directory` (local, or gs://) is a file or holds anything."""
    if "://" in str(directory):
        names = [str(step) for step in checkpoint.complete_steps(directory)]
    elif not str(directory):
        raise ConversionError(["the destination is an empty name: give a directory"])
    elif os.path.ismount(directory):
        raise ConversionError(
            [f"{directory} is where a disk is mounted, which no rename replaces: give one below it"]
        )
    elif Path(directory).is_dir():
        names = sorted(path.name for path in Path(directory).iterdir())
    elif Path(directory).exists():
        raise ConversionError([f"{directory} is a file: give a directory that does not exist"])
    else:
        names = []
    if names:
        raise ConversionError(
            [
                f"{directory} is not empty (it holds {', '.join(names[:6])}): give a directory "
                "that does not exist, or empty it"
            ]
        )


def partial_of(destination: Path) -> epath.Path:
    """Where a local destination grows: beside it, so that a rename puts it in place."""
    path = destination.absolute()
    return epath.Path(path.parent / f".{path.name}.partial")


def journal_of(destination: Path) -> epath.Path:
    """Where its journal is kept: beside it, so that the destination never holds any of it."""
    path = destination.absolute()
    return epath.Path(path.parent / f".{path.name}.journal")


def put_in_place(partial: Path, destination: Path) -> None:
    """Gives a complete destination its name; an empty directory of that name goes."""
    destination = destination.absolute()
    if destination.is_dir():
        destination.rmdir()
    partial.rename(destination)
    descriptor = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
