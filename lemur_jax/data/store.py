"""The row store: fixed-length token rows that are read at random.

T is the sequence length; a row holds T+1 tokens, of which the first T are inputs and the last T
are targets. A store is one part, or a directory of parts `part-00000`, `part-00001`... that read
as one sequence of rows. A part is a directory (local or in object storage) of zarr3 arrays:

    tokens         [rows, T+1]  uint16 (uint32 when the vocabulary needs it)
    segments       [rows, T+1]  uint16: 1, 2, 3... restarting in each row; 0 = padding
    loss           [rows, T+1]  uint8: 1 = learnt as a target; only in stores for fine-tuning
    row_documents  [rows, 3]    int64: first and last document of each row, and at which token of
                                the first document the row begins
    path_bytes     [bytes]      uint8: the documents' paths, UTF-8, one after another
    path_ends      [documents]  int64: where each path ends in path_bytes
    part.json                   sizes and digests; written last: a part without it is unfinished

Rows are inner chunks of one row, uncompressed, each with a CRC-32C: a random read fetches the row
and nothing else, and a damaged row is an error and not a batch. docs/data_build.md has figures.
"""

import bisect
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from lemur_jax.config import ConfigError
from lemur_jax.data import location
from lemur_jax.data.rows_writer import (
    ARRAYS,
    PART,
    RowsWriter,
    digest_of,
    hash_blocks,
    token_dtype,
)

__all__ = ["Piece", "RowStore", "Rows", "RowsWriter", "part_name", "token_dtype"]

_DOCUMENTS_PER_READ = 1 << 16


class Rows(NamedTuple):
    """Rows as stored, all [n, T+1]; `loss` is None in a store without one."""

    tokens: np.ndarray
    segments: np.ndarray
    loss: np.ndarray | None


class Piece(NamedTuple):
    """The part of one document that a row holds.

    Attributes:
      document: its number in the store.
      path: what it was built from.
      start_in_document: its token at which the piece begins, BOS being token 0.
      start_in_row: column of the row at which the piece begins.
      length: tokens.
    """

    document: int
    path: str
    start_in_document: int
    start_in_row: int
    length: int


def part_name(number: int) -> str:
    """'part-00007'."""
    return f"part-{number:05d}"


class _Part:
    """One part, its arrays opened when they are first asked for."""

    def __init__(self, directory: str, about: Mapping | None):
        self.directory, self._arrays = directory, {}
        if about is None:  # format 1 has no part.json
            self.rows, self.columns = self.array("tokens").shape
            self.documents = self.array("path_ends").shape[0]
            self.has_loss = False
        else:
            self.rows, self.columns = about["rows"], about["columns"]
            self.documents, self.has_loss = about["documents"], about["loss"]

    def array(self, name: str) -> Any:
        if name not in self._arrays:
            self._arrays[name] = self._open(name)
        return self._arrays[name]

    def _open(self, name: str) -> Any:
        kvstore = location.kvstore(location.join(self.directory, name))
        spec = {"driver": "zarr3", "kvstore": kvstore}
        spec |= {"recheck_cached_metadata": "open", "recheck_cached_data": "open"}
        try:
            return ts.open(spec, read=True, open=True, context=location.CONTEXT).result()
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                [
                    f"row store {self.directory!r}: array {name!r} cannot be opened ({reason}): "
                    "`lemur data verify` says what else is damaged; build the data set again"
                ]
            ) from error

    def get(self, name: str, where: Any) -> np.ndarray:
        return self.wait(name, self.array(name)[where].read())

    def wait(self, name: str, future: Any) -> np.ndarray:
        try:
            return np.asarray(future.result())
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise location.StorageError(
                f"row store {self.directory!r}: array {name!r} cannot be read ({reason}): a file "
                "is missing or damaged; run `lemur data verify`, restore it or build again"
            ) from error


class RowStore:
    """A store opened for reading; nothing but sizes is read before a row is asked for.

    Args:
      directory: of one part, or of parts.
      parts: what the manifest says about the parts (their part.json and "name"); without it the
        directory is listed and every part.json read.

    Raises ConfigError naming each part that is missing, unfinished, or has files of another size.

    Attributes:
      rows, columns (T+1), documents: sizes over all parts.
      has_loss: whether rows have a loss mask.
    """

    def __init__(self, directory: str | Path, parts: Sequence[Mapping] | None = None):
        self._directory = str(directory)
        if parts is None:
            parts = _listed(self._directory)
        check_files(self._directory, parts)
        self._parts = [
            _Part(location.join(self._directory, about["name"]), about) for about in parts
        ] or [_Part(self._directory, None)]
        if len({(part.columns, part.has_loss) for part in self._parts}) != 1:
            shapes = {Path(p.directory).name: (p.columns, p.has_loss) for p in self._parts}
            raise ConfigError(
                [
                    f"row store {self._directory!r} has parts of different (columns, loss): "
                    f"{shapes}; build the data set again"
                ]
            )
        self.columns: int = self._parts[0].columns
        self.has_loss: bool = self._parts[0].has_loss
        self._first_rows = [0, *itertools.accumulate(part.rows for part in self._parts)]
        counts = (part.documents for part in self._parts)
        self._first_documents = [0, *itertools.accumulate(counts)]
        self.rows: int = self._first_rows[-1]
        self.documents: int = self._first_documents[-1]

    def read(self, rows: Any) -> Rows:
        """The rows numbered `rows`, in their order. Raises StorageError for a damaged row."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.rows):
            raise IndexError(f"rows {rows.min()}..{rows.max()} are outside of [0, {self.rows})")
        if len(self._parts) == 1:
            return Rows(*self._start(self._parts[0], rows)())
        part_of = np.searchsorted(self._first_rows, rows, side="right") - 1
        places = {int(n): np.flatnonzero(part_of == n) for n in np.unique(part_of)}
        # Reads of every part are started before any is waited for.
        started = {
            n: self._start(self._parts[n], rows[where] - self._first_rows[n])
            for n, where in places.items()
        }
        shape = len(rows), self.columns
        tokens = np.empty(shape, self._parts[0].array("tokens").dtype.numpy_dtype)
        segments = np.empty(shape, np.uint16)
        loss = np.empty(shape, np.uint8) if self.has_loss else None
        for n, finish in started.items():
            part = Rows(*finish())
            tokens[places[n]], segments[places[n]] = part.tokens, part.segments
            if loss is not None:
                loss[places[n]] = part.loss
        return Rows(tokens, segments, loss)

    def _start(self, part: _Part, rows: np.ndarray) -> Any:
        names = ("tokens", "segments", "loss") if self.has_loss else ("tokens", "segments")
        reads = [(name, part.array(name).oindex[rows].read()) for name in names]

        def finish() -> list[np.ndarray | None]:
            arrays = [part.wait(name, future) for name, future in reads]
            return arrays if self.has_loss else [*arrays, None]

        return finish

    def _part_of(self, number: int, firsts: list[int], what: str) -> tuple[_Part, int, int]:
        """The part that row or document `number` is in, its number there, the part's number."""
        if not 0 <= number < firsts[-1]:
            raise IndexError(f"{what} {number} is outside of [0, {firsts[-1]})")
        n = bisect.bisect_right(firsts, number) - 1
        return self._parts[n], number - firsts[n], n

    def documents_of(self, row: int) -> range:
        """Numbers of the documents of which row `row` holds a part."""
        part, inside, n = self._part_of(int(row), self._first_rows, "row")
        first, last = part.get("row_documents", inside)[:2] + self._first_documents[n]
        return range(int(first), int(last) + 1)

    def path(self, document: int) -> str:
        """The path that document number `document` was built from."""
        part, inside, _ = self._part_of(int(document), self._first_documents, "document")
        ends = part.get("path_ends", slice(max(inside - 1, 0), inside + 1))
        start, end = (int(ends[0]) if inside else 0), int(ends[-1])
        return bytes(part.get("path_bytes", slice(start, end))).decode("utf-8")

    def paths(self) -> Iterator[tuple[int, str]]:
        """(number, path) of every document, in order; read in blocks."""
        for part, first in zip(self._parts, self._first_documents):
            start = 0
            for low in range(0, part.documents, _DOCUMENTS_PER_READ):
                window = slice(low, min(low + _DOCUMENTS_PER_READ, part.documents))
                ends = part.get("path_ends", window).tolist()
                data = bytes(part.get("path_bytes", slice(start, ends[-1])))
                begins = [start, *ends[:-1]]
                for number, (begin, end) in enumerate(zip(begins, ends), first + low):
                    yield number, data[begin - start : end - start].decode("utf-8")
                start = ends[-1]

    def pieces(self, row: int) -> list[Piece]:
        """What row `row` holds, in its order: which tokens of which document are where.

        A piece that continues a document repeats, as input only, the last token of the row before.
        Where a row's segments do not tell its documents apart, each is given the whole row.
        """
        part, inside, n = self._part_of(int(row), self._first_rows, "row")
        first, last, *offset = part.get("row_documents", inside).tolist()
        segments = part.get("segments", inside)
        numbers = range(first + self._first_documents[n], last + self._first_documents[n] + 1)
        begins = np.searchsorted(segments[segments != 0], np.arange(1, len(numbers) + 2))
        if int(segments.max()) != len(numbers):
            return [Piece(d, self.path(d), 0, 0, int((segments != 0).sum())) for d in numbers]
        starts = [offset[0] if offset else self._walked_back(int(row)), *[0] * len(numbers)]
        return [
            Piece(d, self.path(d), start, int(begin), int(end - begin))
            for d, start, begin, end in zip(numbers, starts, begins, begins[1:])
        ]

    def _walked_back(self, row: int) -> int:
        """Format 1 does not say where a row begins in its first document: count the rows before."""
        document, at = self.documents_of(row)[0], 0
        while row > 0 and self.documents_of(row - 1)[-1] == document:
            row -= 1
            segments = self._parts[0].get("segments", row)
            at += int((segments == segments.max()).sum()) - 1  # the last token comes again
        return at

    def digest(self) -> str:
        """SHA-256 of all that the parts hold, read again: what part.json and manifest say."""
        return digest_of([part_digests(part.directory) for part in self._parts])


def _listed(directory: str) -> list[dict]:
    """part.json of every part in `directory`, with its name; [] for a store of format 1."""
    if (data := location.read(directory, PART)) is not None:
        return [json.loads(data) | {"name": ""}]
    found = []
    for name in location.children(directory):
        if name.startswith("part-"):
            data = location.read(location.join(directory, name), PART)
            found.append((json.loads(data) if data else {"missing": PART}) | {"name": name})
    tokenizers = {part["name"]: part.get("tokenizer", "unknown")[:12] for part in found}
    if len(set(tokenizers.values())) > 1 and not any("missing" in part for part in found):
        raise ConfigError(
            [
                f"row store {directory!r} has parts of several tokenizers: {tokenizers}; remove "
                "those that are not yours and build again"
            ]
        )
    return found


def check_files(directory: str, parts: Sequence[Mapping]) -> None:
    """Raises ConfigError naming every part that lacks a file or has one of another size.

    Digests are not computed: that is `lemur data verify`.
    """
    present = location.sizes(directory) if parts else {}
    problems = []
    for part in parts:
        where = location.join(directory, part["name"]) if part["name"] else directory
        if "missing" in part:
            wrong = f"has no {PART}: it is unfinished"
        else:
            prefix = f"{part['name']}/" if part["name"] else ""
            expected = {PART: None, **part["files"]}
            missing = [name for name in expected if prefix + name not in present]
            sizes = {name: (size, present.get(prefix + name)) for name, size in expected.items()}
            changed = [n for n, pair in sizes.items() if None not in pair and pair[0] != pair[1]]
            if len(missing) == len(expected):
                wrong = "is missing"
            elif missing:
                wrong = f"is damaged: {missing[0]} is missing"
            elif changed:
                was, now = sizes[changed[0]]
                wrong = f"is damaged: {changed[0]} has {now} bytes, not {was}"
            elif other := _other_build(where, part):
                wrong = f"is of another build (tokenizer {other})"
            else:
                continue
        problems.append(
            f"row store: part {where!r} {wrong}; restore it, or remove it and run "
            "`lemur data build` again, which builds that part alone"
        )
    if problems:
        raise ConfigError(problems)


def _other_build(directory: str, part: Mapping) -> str | None:
    """Tokenizer of a part that is not the one that the manifest means; None when it is that one.

    Local parts only: in object storage, reading thousands of part.json takes minutes.
    """
    if not location.is_local(directory):
        return None
    stored = json.loads(location.read(directory, PART))
    return None if stored["digest"] == part["digest"] else stored.get("tokenizer", "unknown")[:12]


def part_digests(directory: str) -> dict[str, str]:
    """SHA-256 of each array of a part, from what is stored now. Raises StorageError if damaged."""
    part = _Part(directory, json.loads(location.read(directory, PART) or b"null"))
    return {
        name: hash_blocks(part.array(name), functools.partial(part.wait, name))
        for name in ARRAYS
        if name != "loss" or part.has_loss
    }
