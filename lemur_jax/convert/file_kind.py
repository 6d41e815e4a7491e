"""What lies under a name where a weight file should: a pipe, a device or a pointer is no file."""

import os
import stat
from pathlib import Path

from lemur_jax.convert.errors import ConversionError

_POINTER = b"version https://git-lfs"
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def other_kind(path: Path) -> str | None:
    """What `path` is if it is anything but a regular file; None: a file, or nothing at all.
    Nothing is opened: to open a pipe is to wait for its writer."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, ValueError):  # ValueError: no name at all, with a zero byte
        return "a link that leads nowhere" if _is_link(path) else None
    except OSError as error:
        return f"unreadable ({error.strerror})"
    if stat.S_ISREG(mode):
        return None
    kind = next((name for test, name in _KINDS if test(mode)), "no regular file")
    return f"a link to {kind.removeprefix('a ')}" if _is_link(path) else kind


def is_pointer(path: Path) -> bool:
    """Whether a regular file is what git-lfs leaves where the file itself was not fetched."""
    with open(path, "rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def check_file(path: Path) -> None:
    """Before a file is opened.

    Raises:
      ConversionError: it is no regular file, or a pointer of git-lfs to one.
    """
    kind = other_kind(path)
    if kind is not None:
        raise ConversionError([f"{path} is {kind}, not a regular file: put the file itself there"])
    if path.is_file() and is_pointer(path):
        raise ConversionError(
            [
                f"{path} is a pointer of git-lfs, not the file that it stands for: run `git lfs "
                "pull` in that repository, or download the file again"
            ]
        )


def _is_link(path: Path) -> bool:
    try:
        return os.path.islink(path)
    except ValueError:
        return False
