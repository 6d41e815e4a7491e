"""`lemur convert`: any source to any target, block by block, inside a memory budget.

    open_source -> Plan -> [read -> turn -> cast -> digest -> write] -> journal -> digests compared
                                                                        -> small files -> rename

Blocks go through a few threads; a block starts when the budget has room for it. What the journal
says is written is not written again. Every process of several takes its own blocks, and process 0
makes the result whole when all blocks are there; no weights go from one process to another.
"""

import contextlib
import ctypes
import dataclasses
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lemur_jax.checkpoint import CheckpointError, StreamingDigest
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.journal import Journal
from lemur_jax.convert.model import Source
from lemur_jax.convert.plan import WORKERS, Block, Plan
from lemur_jax.convert.progress import progress
from lemur_jax.convert.stored import contiguous
from lemur_jax.convert.targets import Leaf, Target
from lemur_jax.convert.turn import (
    CastError,
    cast_block,
    vocabulary_axis,
    without_padding,
)

_SYNC_SECONDS = 1.0  # how much work a kill may cost


@dataclass
class Tally:
    """What has been seen of one leaf.

    Attributes:
      written: digest of the leaf as it is written.
      read: digest of the leaf as it was read, to compare with what the source states.
      error: of the cast.
    """

    written: StreamingDigest = field(default_factory=StreamingDigest)
    read: StreamingDigest = field(default_factory=StreamingDigest)
    error: CastError = field(default_factory=CastError)

    def add(self, line: dict) -> None:
        """Takes in a line of the journal."""
        self.written.add_sums(line["written"])
        self.read.add_sums(line["read"])
        self.error.add(CastError(*line["error"]))


def run(
    source: Source,
    leaves: Iterable[Leaf],
    target: Target,
    plan: Plan,
    journal: Journal,
    done: dict[int, dict],
    process: int,
    processes: int,
    what: str,
) -> None:
    """Does this process's blocks that are not done yet.

    Raises:
      ConversionError: a value that does not fit, a damaged source.
      OSError: the disk; what is journaled is kept.
    """
    dtypes = {leaf.name: leaf.dtype for leaf in leaves}
    mine = [b for b in plan.blocks if b.number % processes == process]

    def work(block: Block) -> dict:
        return {"block": block.number} | _one(source, target, block, dtypes[block.name])

    with progress(what, sum(block.bytes_in for block in mine)) as advance:
        for block in mine:
            if block.number in done:
                advance(block.name, block.bytes_in)
        waiting, lines = [b for b in mine if b.number not in done], []
        synced = time.monotonic()
        with contextlib.closing(_each(waiting, plan.budget, work)) as results:
            for block, line in results:
                lines.append(line)
                advance(block.name, block.bytes_in)
                if time.monotonic() - synced > _SYNC_SECONDS:
                    target.sync()
                    journal.append(lines)
                    lines, synced = [], time.monotonic()
        target.sync()
        journal.append(lines)


def still_there(target: Target, plan: Plan, lines: Mapping[int, dict]) -> dict[int, dict]:
    """Those of `lines` whose blocks lie in the target as they were written: read, and compared.

    Raises:
      OSError: the disk.
    """

    def work(block: Block) -> bool:
        found = target.read(block.name, block.region)
        if found is None:
            return False
        digest = StreamingDigest()
        digest.add(found, tuple(part.start for part in block.region))
        return list(digest.sums) == list(lines[block.number]["written"])

    blocks = [block for block in plan.blocks if block.number in lines]
    # Half of the budget: what malloc keeps of it stays when the conversion goes on.
    budget = max([plan.budget // 2, *(block.memory for block in blocks)])
    with contextlib.closing(_each(blocks, budget, work)) as results:
        same = {block.number: lines[block.number] for block, equal in results if equal}
    _give_back_freed_memory()
    return same


def _give_back_freed_memory() -> None:
    """glibc keeps what each thread has freed: beside what comes next it could pass the budget."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _each(
    blocks: Sequence[Block], budget: int, work: Callable[[Block], Any]
) -> Iterator[tuple[Block, Any]]:
    """Does `work` in a few threads, as many blocks at a time as the budget has room for. Yields
    what is finished; what is not started yet when the caller stops or a block fails is dropped."""
    room = _Room(budget)
    finished: queue.Queue[tuple[Block, Future]] = queue.Queue()

    def start(pool: ThreadPoolExecutor, block: Block) -> None:
        room.take(block.memory)
        future = pool.submit(work, block)
        future.add_done_callback(lambda f: (room.give(block.memory), finished.put((block, f))))

    waiting, running = list(reversed(blocks)), 0
    with ThreadPoolExecutor(_threads()) as pool:
        try:
            while waiting or running:
                while waiting and (running == 0 or room.has(waiting[-1].memory)):
                    if running >= WORKERS + 2:
                        break
                    start(pool, waiting.pop())
                    running += 1
                block, future = finished.get()
                running -= 1
                yield block, future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _Room:
    """The budget: bytes that blocks at work may take together."""

    def __init__(self, budget: int):
        self._free = budget
        self._changed = threading.Condition()

    def has(self, count: int) -> bool:
        with self._changed:
            return self._free >= count

    def take(self, count: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count

    def give(self, count: int) -> None:
        with self._changed:
            self._free += count
            self._changed.notify_all()


def _one(source: Source, target: Target, block: Block, dtype: np.dtype) -> dict:
    """One block from the source to its place; what the journal says of it."""
    offset = tuple(part.start for part in block.region)
    read = contiguous(source.read(block.name, block.region))
    as_read, as_written = StreamingDigest(), StreamingDigest()
    as_read.add(read, offset)
    axis = vocabulary_axis(block.name)
    first = 0 if axis is None else offset[axis]
    clean = without_padding(read, axis, first, source.config.vocab_size)

    def name(index: tuple[int, ...]) -> str:
        return source.where(block.name, tuple(a + b for a, b in zip(offset, index)))

    turned, error = cast_block(clean, dtype, name)
    if turned is read:
        as_written.add_sums(as_read.sums)
    else:
        as_written.add(turned, offset)
    del read, clean
    try:
        target.write(block.name, block.region, turned)
    except OSError as error:
        why = f"{error.strerror or error} (writing {block.name})"
        raise OSError(error.errno, why, error.filename) from error
    return {
        "written": as_written.sums,
        "read": as_read.sums,
        "error": dataclasses.astuple(error),
    }


def tally(plan: Plan, lines: dict[int, dict]) -> dict[str, Tally]:
    """The digests and errors of whole leaves, once every block has its line."""
    found: dict[str, Tally] = {}
    for block in plan.blocks:
        found.setdefault(block.name, Tally()).add(lines[block.number])
    return found


def check_digests(source: Source, found: dict[str, Tally]) -> None:
    """What was read is what the source says it holds.

    Raises:
      ConversionError: of other formats; CheckpointError of ours: names the leaves.
    """
    stated = source.digests()
    wrong = [
        name for name in found if stated.get(name, "") not in ("", found[name].read.hexdigest())
    ]
    if not wrong:
        return
    if source.format == "lemur":
        raise CheckpointError(
            f"damaged checkpoint: the digest of {', '.join(wrong)} in {source.path} is not that of "
            "its manifest, so its bytes have changed since the save. Use another checkpoint, or "
            "copy this one again from where it came"
        )
    raise ConversionError(
        [
            f"{source.path} is damaged: the digest of {name!r} (e.g. "
            f"{source.where(name, (0,) * len(source.shape(name)))}) is not that of its "
            "conversion.json: copy it again; if its weights were changed on purpose, remove "
            "conversion.json"
            for name in wrong
        ]
    )


def peak_resident_bytes() -> int:
    """The most that this process has had in memory, as the kernel counts it.

    getrusage counts more: a process starts with what its parent had when it was spawned.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def guess_rate(source: Source, plan: Plan) -> float:
    """Bytes a second, from one block that is read, turned and digested but not written."""
    block = max(plan.blocks, key=lambda b: b.bytes_in)
    for _ in range(2):  # the first compiles
        start = time.monotonic()
        array = contiguous(source.read(block.name, block.region))
        StreamingDigest().add(array, (0,) * array.ndim)
        seconds = time.monotonic() - start
    return _threads() / 2 * array.nbytes / max(seconds, 1e-6)


def _threads() -> int:
    return min(WORKERS, os.cpu_count() or 1)
