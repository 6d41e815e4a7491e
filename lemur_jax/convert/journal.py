"""What has been written of a destination that is not whole yet: a killed conversion goes on.

    .DST.partial/               the destination to be, files at their final size
    .DST.journal/header.json    source, flags and plan: another conversion is refused by name
    .DST.journal/blocks.I.jsonl one line for each block that process I has written and synced
    .DST.journal/before.I.jsonl lines of earlier runs, until what they say of the files is compared
    .DST.journal/lock.I         held while process I is at work
    .DST.journal/failed.I       why process I found that the conversion can never succeed

A line is appended only after the data of its block. A torn last line is a block not written.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from lemur_jax.convert.errors import ConversionError

_POLL_SECONDS = 0.2
_LOCK_TRIES = 3


class UnfinishedError(ConversionError):
    """The partial destination is another's, or not done by all processes: it is left as it is."""


class Journal:
    """The journal of one process. Local directories, or any that epath knows."""

    def __init__(self, folder: epath.Path, process: int, processes: int):
        """Names only: see `begin`.

        Args:
          folder: of the journal.
          process, processes: this one, from 0, and how many.
        """
        self._folder = folder
        self._process, self._processes = process, processes
        self._local = "://" not in str(folder)
        self._lines: list[str] = []
        self._lock: Any = None

    def begin(
        self, header: Mapping[str, Any], prepare: Callable[[], None], timeout_seconds: float
    ) -> dict[int, dict]:
        """Process 0 compares the header with the one that is there, or else writes it; others
        wait for it and compare.

        Args:
          header: what the conversion is of: plain JSON.
          prepare: makes the files, or opens them; called once they are known to be ours.
          timeout_seconds: for which others wait for process 0.

        Returns:
          {block number: its line} of what this process has written before, to be compared with
          what lies in the files, and then appended again.

        Raises:
          ConversionError: the destination is being written by another command, or was begun with
            another source or other flags; says which.
        """
        path = self._folder / "header.json"
        if self._process == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            _wait(path.exists, timeout_seconds, f"process 0 has not written {path}")
        self._take_lock()
        self._failed(self._process).unlink(missing_ok=True)
        before = self._set_aside()
        if path.exists():
            self._compare(_header(path), json.loads(json.dumps(header)))
        prepare()
        if self._process == 0 and not path.exists():
            _write(path, json.dumps(header, indent=1))
        return before

    def _compare(self, found: dict, header: dict) -> None:
        different = [
            f"{key} was {found.get(key)!r} and is {header.get(key)!r}"
            for key in sorted({*found, *header})
            if found.get(key) != header.get(key)
        ]
        if different:
            raise UnfinishedError(
                [
                    f"{self._folder} is of a conversion that was begun otherwise: "
                    f"{'; '.join(different)}. Give the same source and flags to go on, or remove "
                    "it and the .partial beside it"
                ]
            )

    def _set_aside(self) -> dict[int, dict]:
        """Lines of earlier runs, out of the file in which others look for what is done."""
        lines = self._read(self._process)
        if lines:
            _write(self._before(self._process), _joined(lines.values()))
        self._blocks(self._process).unlink(missing_ok=True)
        return lines

    def append(self, lines: list[dict]) -> None:
        """Adds blocks whose data is safe.

        Raises:
          ConversionError: another process has found that the conversion can never succeed.
        """
        if self._local:
            self._stop_if_failed()
        if not lines:
            return
        self._lines += [json.dumps(line) for line in lines]
        path = self._blocks(self._process)
        if not self._local:
            path.write_text("\n".join(self._lines) + "\n")
            return
        with open(path, "a") as file:
            if file.tell() and not _ends_with_newline(path):
                file.write("\n")  # behind a torn line
            file.write(_joined(lines))
            file.flush()
            os.fsync(file.fileno())

    def all_done(self, blocks: int, timeout_seconds: float) -> dict[int, dict]:
        """Process 0 waits here for the others. Every block's line.

        Raises:
          ConversionError: another process has written nothing for `timeout_seconds`, or has failed.
        """
        since, before = time.monotonic(), -1
        while True:
            self._stop_if_failed()
            done: dict[int, dict] = {}
            for process in range(self._processes):
                done |= _lines(self._blocks(process))
            if len(done) == blocks:
                return done
            if len(done) != before:
                since, before = time.monotonic(), len(done)
            if time.monotonic() - since > timeout_seconds:
                raise UnfinishedError(
                    [
                        f"{blocks - len(done)} of {blocks} blocks of the other processes have not "
                        f"come for {timeout_seconds:.0f} s: start those processes again (all with "
                        f"--processes={self._processes})"
                    ]
                )
            time.sleep(_POLL_SECONDS)

    def fail(self, reason: str) -> None:
        """Tells the other processes that the conversion can never succeed."""
        if self._processes > 1 and self._folder.exists():
            _write(self._failed(self._process), reason)

    def wait_until_alone(self, timeout_seconds: float) -> None:
        """Returns when no other process is at work, or has had time enough to see `fail`."""
        deadline = time.monotonic() + timeout_seconds
        while self._local and self._folder.exists() and time.monotonic() < deadline:
            if all(self._is_absent(process) for process in range(1, self._processes)):
                return
            time.sleep(_POLL_SECONDS)

    def _stop_if_failed(self) -> None:
        for process in range(self._processes):
            path = self._failed(process)
            if process == self._process or not path.exists():
                continue
            problem = f"process {process} has failed: {path.read_text()}"
            # What it found is true for all; process 0 clears away what is there.
            raise (UnfinishedError if self._process else ConversionError)([problem])

    def _is_absent(self, process: int) -> bool:
        with open(self._folder / f"lock.{process}", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def of_absent(self) -> dict[int, dict]:
        """Lines of processes that are not at work, so that nobody has compared them: process 0
        must. (Where there are no locks, on object stores, nobody can tell.)"""
        found: dict[int, dict] = {}
        for process in range(1, self._processes if self._local else 1):
            if self._is_absent(process):
                found |= _lines(self._blocks(process))
        return found

    def wait_until_gone(self, timeout_seconds: float) -> None:
        """The others wait here until process 0 has made the result whole.

        Raises:
          ConversionError: it has not in time, or some process has failed.
        """
        header = self._folder / "header.json"

        def gone() -> bool:
            self._stop_if_failed()
            return not header.exists()

        _wait(gone, timeout_seconds, "process 0 has not finished")

    def remove(self) -> None:
        """The result is whole: nothing of the journal stays."""
        (self._folder / "header.json").unlink(missing_ok=True)
        self._folder.rmtree(missing_ok=True)

    def close(self) -> None:
        """Lets another command go on."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        if not self._local:
            return
        self._lock = open(self._folder / f"lock.{self._process}", "w")  # noqa: SIM115
        for left in reversed(range(_LOCK_TRIES)):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:  # for an instant it is process 0 that looks who is there
                if left:
                    time.sleep(_POLL_SECONDS)
        self.close()
        raise UnfinishedError(
            [f"another command is at work ({self._folder}): wait for it, or stop it"]
        )

    def _blocks(self, process: int) -> epath.Path:
        return self._folder / f"blocks.{process}.jsonl"

    def _failed(self, process: int) -> epath.Path:
        return self._folder / f"failed.{process}"

    def _before(self, process: int) -> epath.Path:
        return self._folder / f"before.{process}.jsonl"

    def _read(self, process: int) -> dict[int, dict]:
        return _lines(self._before(process)) | _lines(self._blocks(process))


def _joined(lines: Iterable[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _lines(path: epath.Path) -> dict[int, dict]:
    """{block number: its line}. A line torn by a kill, or damaged, is a block not written."""
    found = {}
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            whole = isinstance(line["block"], int) and len(line["error"]) >= 3
            whole = whole and len(line["written"]) == len(line["read"]) == 2
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if whole:
            found[line["block"]] = line
    return found


def _header(path: epath.Path) -> dict:
    """What the destination was begun as.

    Raises:
      UnfinishedError: damaged.
    """
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        found = error
    if isinstance(found, dict):
        return found
    partial = path.parent.name.removesuffix(".journal") + ".partial"
    raise UnfinishedError(
        [
            f"{path} is damaged ({found}): nobody can say what was begun. Remove {path.parent} and "
            f"the {partial} beside it, and start again"
        ]
    )


def _ends_with_newline(path: os.PathLike) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _write(path: epath.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _wait(condition: Callable[[], bool], timeout_seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise UnfinishedError([f"{otherwise} within {timeout_seconds:.0f} s"])
        time.sleep(_POLL_SECONDS)


def identity(path: str | Path) -> str:
    """A digest of what a local source consists of: names, sizes and times of its files. Of a
    checkpoint of ours these are the manifest's and the small files': it has all digests."""
    if "://" in str(path):
        return str(path)
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    listed = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
