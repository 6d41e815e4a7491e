"""What readers yield: rows, and what could not be read, each with its place in the file."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One record: `place` is "line 3" or "record 3"; `number` is 0 for a whole plain file."""

    place: str
    number: int
    fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and the fix. `ends_file`: what follows in the file is lost, too."""

    what: str
    ends_file: bool = False


def unreadable(error: BaseException, after: str = "") -> Problem:
    """The Problem of a damaged file; `after` is the last place that was read well."""
    where = f" after {after}" if after else ""
    return Problem(f"cannot be read{where} ({error}): replace the file or remove it", True)
