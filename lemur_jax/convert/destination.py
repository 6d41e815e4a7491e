"""How a new directory comes into being: whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lemur_jax import checkpoint
from lemur_jax.convert.errors import ConversionError


def check_new(directory: str | Path) -> None:
    """Raises ConversionError if `directory` (local, or gs://) is a file or holds anything."""
    if "://" in str(directory):
        names = [str(step) for step in checkpoint.complete_steps(directory)]
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


@contextlib.contextmanager
def appearing(out_dir: Path, needed_bytes: int) -> Iterator[Path]:
    """A directory beside `out_dir` that gets its name on success and is removed on failure."""
    parent = out_dir.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise ConversionError(
            [f"{parent} has {free} bytes free, {needed_bytes} are needed: free some space there"]
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.partial-", dir=parent))
    try:
        os.chmod(temporary, 0o755)  # mkdtemp makes private directories
        yield temporary
        temporary.rename(out_dir)  # replaces an empty directory, fails on any other
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
