"""`lemur data inspect`: packed rows as the model sees them, in the terminal."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from lemur_jax.config import ConfigError
from lemur_jax.data import location
from lemur_jax.data.batch import make_batch
from lemur_jax.data.nearest import nearest
from lemur_jax.data.pipeline import read_manifest
from lemur_jax.data.store import Piece, RowStore
from lemur_jax.data.tokenizer import Tokenizer

COLOURS = ("cyan", "yellow", "green", "magenta")  # one document after another


@dataclasses.dataclass(frozen=True)
class RowView:
    """One row of a store, ready to be shown. Arrays are [T+1].

    Attributes:
      source, split, row: where it is.
      tokens: ids.
      segments: 0 is padding.
      weighted: whether the token is a target that counts; never the first token, which is an
        input only, nor the first of a document.
      pieces: the documents in it.
      has_loss: whether the store has a loss mask.
    """

    source: str
    split: str
    row: int
    tokens: np.ndarray
    segments: np.ndarray
    weighted: np.ndarray
    pieces: list[Piece]
    has_loss: bool

    @property
    def title(self) -> str:
        real, targets = int((self.segments != 0).sum()), int(self.weighted.sum())
        mask = " (loss mask)" if self.has_loss else ""
        return (
            f"{self.source}/{self.split} row {self.row}: {real} tokens, "
            f"{len(self.tokens) - real} padding, {targets} weighted targets{mask}"
        )


def views(
    path: str, split: str, rows: Sequence[int], sources: Sequence[str] | None = None
) -> Iterator[RowView]:
    """Rows of a data set, source by source.

    Raises ConfigError for a split, source or row that the data set does not have.
    """
    manifest = read_manifest(path)
    for source in sources or manifest["sources"]:
        about = manifest["sources"].get(source)
        if about is None:
            legal = ", ".join(manifest["sources"])
            hint = nearest(source, manifest["sources"])
            raise ConfigError([f"source={source!r} is not in {path!r}; legal: {legal}{hint}"])
        if split not in about["splits"]:
            raise ConfigError(
                [f"split={split!r} of {source!r} is absent; legal: {', '.join(about['splits'])}"]
            )
        where = location.join(path, source, split)
        store = RowStore(where, about["splits"][split].get("parts"))
        for row in rows:
            if not 0 <= row < store.rows:
                raise ConfigError(
                    [f"rows={row} of {source}/{split} is absent; legal: 0 to {store.rows - 1}"]
                )
            yield _view(store, source, split, row)


def _view(store: RowStore, source: str, split: str, row: int) -> RowView:
    found = store.read([row])
    weights = make_batch(*found).weights[0]
    return RowView(
        source=source,
        split=split,
        row=row,
        tokens=found.tokens[0],
        segments=found.segments[0],
        weighted=np.concatenate([[False], weights > 0]),
        pieces=store.pieces(row),
        has_loss=found.loss is not None,
    )


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of the data set at `path`."""
    return Tokenizer.load(location.fetch(location.join(path, "tokenizer")))


def inspect(
    path: str,
    split: str = "train",
    rows: Sequence[int] = (0,),
    sources: Sequence[str] | None = None,
    console: Console | None = None,
) -> None:
    """Prints rows of a data set: documents in alternating colours, unweighted targets reversed.

    Raises ConfigError as `views` does.
    """
    console = console or Console()
    tokenizer = None
    for view in views(path, split, rows, sources):
        tokenizer = tokenizer or open_tokenizer(path)
        _print_row(console, tokenizer, view)


def _print_row(console: Console, tokenizer: Tokenizer, view: RowView) -> None:
    console.rule(f"[bold]{view.title}[/]")
    for number, piece in enumerate(view.pieces, 1):
        end = piece.start_in_document + piece.length - 1
        line = Text(
            f"  {number}. {piece.path} (tokens {piece.start_in_document} to {end}, "
            f"{piece.length} here)"
        )
        line.stylize(COLOURS[number % len(COLOURS)])
        console.print(line, soft_wrap=True)
    text = Text()
    for index, segment, counts in zip(view.tokens, view.segments, view.weighted):
        if segment == 0:
            continue
        style = COLOURS[int(segment) % len(COLOURS)] + ("" if counts else " reverse")
        piece = tokenizer.piece(int(index)).replace("▁", " ")
        text.append("⏎\n" if piece == "<0x0A>" else piece, style)
    console.print(text, soft_wrap=True)
