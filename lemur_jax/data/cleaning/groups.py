"""Equal keys among more records than memory holds: spilled to disk by key, grouped part by part."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

# Loading, sorting and gathering a part takes about three times its size, and files in between.
_PART_OF_MEMORY = 4
_RECORD_BYTES = 24


def equal_keys(
    records: Iterable[np.ndarray], count: int, directory: Path, memory_bytes: int
) -> Iterator[np.ndarray]:
    """Groups of documents that have an equal key, each group once.

    Args:
      records: uint64 [n, 3] arrays of (key, key's second half, document); documents ascend.
      count: how many records there are in all.
      directory: an empty one on disk, for 24 bytes of each record.
      memory_bytes: what may be held at a time.

    Yields int64 arrays of at least two different documents, ascending.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts = max(1, -(-count * _RECORD_BYTES * _PART_OF_MEMORY // memory_bytes))
    files = [directory / f"{part}.records" for part in range(parts)]
    for file in files:
        file.write_bytes(b"")
    for block in records:
        belongs = block[:, 0] % np.uint64(parts)
        order = np.argsort(belongs, kind="stable")
        cuts = np.searchsorted(belongs[order], np.arange(parts + 1, dtype=np.uint64))
        for part in np.flatnonzero(np.diff(cuts)):
            with open(files[part], "ab") as file:
                block[order[cuts[part] : cuts[part + 1]]].tofile(file)
    for file in files:
        yield from _groups(np.fromfile(file, np.uint64).reshape(-1, 3))
        file.unlink()


def _groups(records: np.ndarray) -> Iterator[np.ndarray]:
    if not len(records):
        return
    # Documents ascend already, and lexsort is stable.
    records = records[np.lexsort((records[:, 1], records[:, 0]))]
    new = np.any(records[1:, :2] != records[:-1, :2], axis=1)
    starts = np.concatenate([[0], np.flatnonzero(new) + 1, [len(records)]])
    for group in np.flatnonzero(np.diff(starts) > 1):
        documents = np.unique(records[starts[group] : starts[group + 1], 2])
        if len(documents) > 1:
            yield documents.astype(np.int64)


class Clusters:
    """Documents joined into clusters; each is known by its first document.

    Holds 8 bytes for each document, in a file that is mapped into memory.
    """

    def __init__(self, file: Path, count: int):
        self._first = np.memmap(file, np.int64, "w+", shape=(max(count, 1),))
        for start in range(0, count, 1 << 20):
            self._first[start : start + (1 << 20)] = np.arange(start, min(start + (1 << 20), count))

    def first(self, document: int) -> int:
        """The first document of `document`'s cluster."""
        way = []
        while self._first[document] != document:
            way.append(document)
            document = int(self._first[document])
        self._first[way] = document
        return document

    def join(self, one: int, other: int) -> None:
        """Puts two documents, and all those joined to them, into one cluster."""
        a, b = self.first(one), self.first(other)
        self._first[max(a, b)] = min(a, b)

    def followers(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of (documents that are not the first of theirs, their firsts), ascending."""
        for start in range(0, len(self._first), 1 << 20):
            block = np.asarray(self._first[start : start + (1 << 20)])
            own = np.flatnonzero(block != np.arange(start, start + len(block))) + start
            yield own, np.array([self.first(int(document)) for document in own], np.int64)
