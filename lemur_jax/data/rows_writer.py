"""Writing one part of a row store (see store.py for the layout)."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from lemur_jax.data import location

PART = "part.json"
FORMAT_VERSION = 2
ARRAYS = ("tokens", "segments", "loss", "row_documents", "path_bytes", "path_ends")
BYTES_PER_SHARD = 16 * 2**20  # of tokens; one file
ROWS_PER_SHARD = 4096  # at most: the index of a file has 16 bytes a row and is read before a row


def token_dtype(vocab_size: int) -> type:
    """uint16 while every id fits, else uint32."""
    return np.uint16 if vocab_size <= 65536 else np.uint32


class _Array:
    """One growing zarr3 array of a part, and the SHA-256 of what went in."""

    def __init__(self, directory: str, name: str, dtype: Any, columns: int | None, shape: tuple):
        self._where = location.join(directory, name)
        self._hash = hashlib.sha256()
        shard, inner = shape
        tail = [] if columns is None else [columns]
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        checked = [little, {"name": "crc32c"}]
        inside = {"chunk_shape": [inner, *tail], "codecs": checked, "index_codecs": checked}
        grid = {"name": "regular", "configuration": {"chunk_shape": [shard, *tail]}}
        metadata = {
            "shape": [0, *tail],
            "data_type": np.dtype(dtype).name,
            "chunk_grid": grid,
            "codecs": [{"name": "sharding_indexed", "configuration": inside}],
            # A row that is absent is stored as 0 and never as a hole that nobody notices.
            "fill_value": 0,
        }
        spec = {"driver": "zarr3", "kvstore": location.kvstore(self._where), "metadata": metadata}
        spec["store_data_equal_to_fill_value"] = True
        self._array = self._do(lambda: ts.open(spec, create=True, context=location.UNSYNCED))

    def _do(self, call: Callable[[], Any]) -> Any:
        try:
            return call().result()
        except (ValueError, OSError) as error:
            raise location.storage_error("written", self._where, error) from error

    def append(self, block: np.ndarray) -> None:
        start = self._array.shape[0]
        end = [start + len(block), *self._array.shape[1:]]
        self._array = self._do(lambda: self._array.resize(exclusive_max=end, expand_only=True))
        self._do(lambda: self._array[start : end[0]].write(block))
        self._hash.update(np.ascontiguousarray(block).tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class RowsWriter:
    """Writes rows that somebody has packed, and the paths of their documents; see `pack.py`.

    Args:
      directory: of the part; must not hold one.
      sequence_length: T; rows have T+1 tokens.
      vocab_size: ids are below it.
      loss: whether rows have a loss mask.
    """

    def __init__(
        self,
        directory: str | Path,
        sequence_length: int,
        vocab_size: int,
        loss: bool = False,
    ):
        self._directory, self.columns, self._loss = str(directory), sequence_length + 1, loss
        if location.is_local(self._directory):
            location.local(self._directory).mkdir(parents=True)
        dtype = token_dtype(vocab_size)
        row_bytes = self.columns * np.dtype(dtype).itemsize
        shard = max(1, min(ROWS_PER_SHARD, BYTES_PER_SHARD // row_bytes))
        # Name -> type, columns, (rows of a file, rows of a read). 64 rows of provenance are 1.5 kB.
        kinds = {
            "tokens": (dtype, self.columns, (shard, 1)),
            "segments": (np.uint16, self.columns, (shard, 1)),
            "row_documents": (np.int64, 3, (ROWS_PER_SHARD, 64)),
        }
        if loss:
            kinds["loss"] = (np.uint8, self.columns, (shard, 1))
        self._arrays = {name: _Array(self._directory, name, *kind) for name, kind in kinds.items()}
        # Rows wait here until they fill a file: a file is written once.
        self._waiting = {
            name: np.empty((shard, columns), kind) for name, (kind, columns, _) in kinds.items()
        }
        self._held, self._shard = 0, shard
        self._paths: list[bytes] = []
        self.rows = self.filled = 0

    @property
    def documents(self) -> int:
        """How many documents have been added."""
        return len(self._paths)

    def add_document(self, path: str) -> int:
        """Notes where a document came from. Returns its number in this part: 0, 1, 2..."""
        self._paths.append(path.encode("utf-8"))
        return len(self._paths) - 1

    def append_rows(
        self,
        tokens: np.ndarray,
        segments: np.ndarray,
        documents: np.ndarray,
        loss: np.ndarray | None = None,
        starts: np.ndarray | None = None,
    ) -> None:
        """Adds n rows.

        Args:
          tokens: [n, T+1] ids.
          segments: [n, T+1]: 1, 2, 3... in each row for documents `first`, `first` + 1...; 0 is
            padding, at the end.
          documents: [n, 2] int64: numbers of the first and the last document of each row.
          loss: [n, T+1] 0 or 1; if and only if the store has a loss mask.
          starts: [n]: token of the first document at which the row begins; None: 0.
        """
        if (loss is not None) != self._loss:
            raise ValueError(f"loss={loss!r} of a store opened with loss={self._loss}")
        documents = np.asarray(documents, np.int64)
        starts = np.zeros(len(documents), np.int64) if starts is None else np.asarray(starts)
        given = {
            "tokens": tokens,
            "segments": segments,
            "row_documents": np.column_stack([documents, starts]),
        }
        if loss is not None:
            given["loss"] = loss
        for name, block in given.items():
            expected = len(tokens), self._waiting[name].shape[1]
            if np.shape(block) != expected:
                raise ValueError(f"{name} has shape {np.shape(block)}, must be {expected}")
        at = 0
        while at < len(tokens):
            take = min(self._shard - self._held, len(tokens) - at)
            for name, block in given.items():
                self._waiting[name][self._held : self._held + take] = block[at : at + take]
            self._held, at = self._held + take, at + take
            if self._held == self._shard:
                self._flush()
        self.filled += int(np.count_nonzero(segments))

    def _flush(self) -> None:
        if self._held:
            for name, array in self._arrays.items():
                array.append(self._waiting[name][: self._held])
        self.rows, self._held = self.rows + self._held, 0

    def close(self, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Writes what waits and, last of all, part.json: sizes, digests and `extra`; returns it."""
        self._flush()
        data = np.frombuffer(b"".join(self._paths), np.uint8)
        ends = np.cumsum([len(path) for path in self._paths], dtype=np.int64)
        for name, values, inner in (("path_bytes", data, 4096), ("path_ends", ends, 512)):
            array = _Array(self._directory, name, values.dtype, None, (1 << 20, inner))
            array.append(values)
            self._arrays[name] = array
        digests = {name: self._arrays[name].hexdigest() for name in ARRAYS if name in self._arrays}
        about = {
            "format_version": FORMAT_VERSION,
            "rows": self.rows,
            "columns": self.columns,
            "documents": self.documents,
            "loss": self._loss,
            "filled": self.filled,
            "digests": digests,
            "digest": digest_of([digests]),
            "files": location.sizes(self._directory),
            **(extra or {}),
        }
        location.sync(self._directory)
        location.write(self._directory, PART, (json.dumps(about, indent=1) + "\n").encode())
        return about


def digest_of(parts: Sequence[Mapping[str, str]]) -> str:
    """One digest for parts, from the digests of their arrays."""
    text = "\n".join(json.dumps(part, sort_keys=True) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_blocks(array: Any, wait: Callable[[Any], np.ndarray]) -> str:
    """SHA-256 of a stored array, file by file: what `_Array.hexdigest` said when it was written."""
    found = hashlib.sha256()
    for window in _windows(array):
        found.update(wait(array[window].read()).tobytes())
    return found.hexdigest()


def _windows(array: Any) -> Iterator[slice]:
    step = array.chunk_layout.write_chunk.shape[0]
    for start in range(0, array.shape[0], step):
        yield slice(start, min(start + step, array.shape[0]))
