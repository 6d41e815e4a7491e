"""Documents into rows of fixed length, for pretraining."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lemur_jax.data.rows_writer import RowsWriter

ROWS_PER_BLOCK = 64


class StreamPacker:
    """Packs documents into full rows.

    Documents follow one another without gaps. A document that does not fit goes on in the next
    row, which then begins with the last token of the row before, as input only: so every token
    of a document but its first is a target exactly once. Only the last row of all can end early.
    """

    def __init__(self, writer: RowsWriter):
        self._writer, self._columns = writer, writer.columns
        self._tokens = np.zeros((ROWS_PER_BLOCK, self._columns), np.uint32)
        self._segments = np.zeros((ROWS_PER_BLOCK, self._columns), np.uint16)
        self._documents = np.full((ROWS_PER_BLOCK, 2), -1, np.int64)
        self._starts = np.zeros(ROWS_PER_BLOCK, np.int64)
        self._row = self._fill = self._segment = 0  # of the block; tokens, segments of its row
        self.tokens = 0

    def append(self, path: str, ids: Sequence[int] | np.ndarray) -> None:
        """Adds one document: its token ids with BOS and EOS, and its path for provenance."""
        ids = np.asarray(ids)
        if not len(ids):
            raise ValueError(f"document {path!r} has no tokens: leave it out and count it")
        document, at = self._writer.add_document(path), 0
        self._segment += 1
        while at < len(ids):
            take = min(self._columns - self._fill, len(ids) - at)
            window = slice(self._fill, self._fill + take)
            self._tokens[self._row, window] = ids[at : at + take]
            self._segments[self._row, window] = self._segment
            if self._fill == 0:
                self._documents[self._row, 0], self._starts[self._row] = document, at
            self._documents[self._row, 1] = document
            at += take
            self._fill += take
            if self._fill == self._columns:
                self._next_row()
                if at < len(ids):
                    at -= 1  # the last token again, as input of the next row's first target
                    self._segment = 1
        self.tokens += len(ids)

    def _next_row(self) -> None:
        self._row, self._fill, self._segment = self._row + 1, 0, 0
        if self._row == ROWS_PER_BLOCK:
            self._flush()

    def _flush(self) -> None:
        rows = slice(0, self._row)
        self._writer.append_rows(
            self._tokens[rows],
            self._segments[rows],
            self._documents[rows],
            None,
            self._starts[rows],
        )
        self._tokens[:], self._segments[:], self._documents[:] = 0, 0, -1
        self._row = 0

    def close(self, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Writes what is held. Returns the part's part.json, with `tokens` of the documents."""
        if self._fill:
            self._next_row()
        self._flush()
        return self._writer.close({"tokens": self.tokens} | (extra or {}))
