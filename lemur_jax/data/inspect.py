"""`lemur data inspect`: packed rows in the terminal, as the model sees them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from lemur_jax.config import ConfigError
from lemur_jax.data.pipeline import make_batch, read_manifest
from lemur_jax.data.store import RowStore
from lemur_jax.data.tokenizer import Tokenizer

COLOURS = ("cyan", "yellow", "green", "magenta")  # one document after another


def inspect(
    path: str,
    split: str = "train",
    rows: Sequence[int] = (0,),
    sources: Sequence[str] | None = None,
    console: Console | None = None,
) -> None:
    """Prints rows of a data set: documents in alternating colours, unweighted targets reversed.

    Raises ConfigError for a split, source or row that the data set does not have.
    """
    console = console or Console()
    manifest = read_manifest(path)
    tokenizer = Tokenizer.load(Path(path) / "tokenizer")
    for source in sources or manifest["sources"]:
        about = manifest["sources"].get(source)
        if about is None:
            legal = ", ".join(manifest["sources"])
            raise ConfigError([f"source={source!r} is not in {path!r}; legal: {legal}"])
        if split not in about["splits"]:
            raise ConfigError(
                [f"split={split!r} of {source!r} is absent; legal: {', '.join(about['splits'])}"]
            )
        store = RowStore(Path(path) / source / split)
        for row in rows:
            if not 0 <= row < store.rows:
                raise ConfigError(
                    [f"rows={row} of {source}/{split} is absent; legal: 0 to {store.rows - 1}"]
                )
            _print_row(console, tokenizer, store, f"{source}/{split} row {row}", row)


def _print_row(
    console: Console, tokenizer: Tokenizer, store: RowStore, title: str, row: int
) -> None:
    tokens, segments, _ = store.read([row])
    batch = make_batch(tokens, segments)
    real = int((segments != 0).sum())
    console.rule(f"[bold]{title}[/]: {real} tokens, {int(batch.weights.sum())} weighted targets")
    for segment, document in enumerate(store.documents_of(row), 1):
        count = int((segments == segment).sum())
        line = Text(f"  {segment}. {store.path(document)} ({count} tokens)")
        line.stylize(COLOURS[segment % len(COLOURS)])
        console.print(line, soft_wrap=True)
    # A token is weighted when it is a target that counts; the row's first token never is one.
    weighted = np.concatenate([[False], batch.weights[0] > 0])
    text = Text()
    for index, segment, counts in zip(tokens[0], segments[0], weighted):
        if segment == 0:
            continue
        style = COLOURS[int(segment) % len(COLOURS)] + ("" if counts else " reverse")
        piece = tokenizer.piece(int(index)).replace("▁", " ")
        text.append("⏎\n" if piece == "<0x0A>" else piece, style)
    console.print(text, soft_wrap=True)
