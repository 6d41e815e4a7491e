"""`lemur data inspect --html=FILE`: packed rows as one page that needs nothing but a browser."""

import html
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lemur_jax.data.inspect import RowView, open_tokenizer, views
from lemur_jax.data.tokenizer import Tokenizer

COLOURS = 8  # of documents, as the style sheet has them

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --dim: #888; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2.5rem 0 .5rem; }
p { margin: .3rem 0; } .dim { color: var(--dim); }
ol { margin: .3rem 0; padding-left: 2rem; } li span { padding: 0 .4em; border-radius: .2em; }
.bar { display: flex; height: .8rem; border-radius: .2rem; overflow: hidden; margin: .5rem 0; }
.row { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: .3rem; padding: .6rem; }
.row b { border-radius: .2em; padding: 0 .3em; font-size: .8em; }
.row i { font-style: normal; background: var(--c); border-radius: 2px; }
.row i:hover { outline: 2px solid currentColor; }
.off { opacity: .55; text-decoration: underline dotted; }
.d0 { --c: #0a84; } .d1 { --c: #e804; } .d2 { --c: #29f4; } .d3 { --c: #d3a4; }
.d4 { --c: #9b04; } .d5 { --c: #84f4; } .d6 { --c: #f544; } .d7 { --c: #0bb4; }
.d0, .d1, .d2, .d3, .d4, .d5, .d6, .d7 { background: var(--c); }
.pad { background: repeating-linear-gradient(45deg, #8884 0 4px, #8881 4px 8px);
  color: var(--dim); border-radius: 2px; padding: 0 .4em; }
"""
_LEGEND = (
    "Each colour is a document; hover over a token for its id, column and weight. "
    '<span class="off">Dotted and pale</span>: not a target that counts (the first token of a row '
    "or document, or masked). "
    '<span class="pad">hatched</span>: padding. ⏎ is a line feed, · a space.'
)


def write(
    file: str | Path,
    path: str,
    split: str = "train",
    rows: Sequence[int] = (0,),
    sources: Sequence[str] | None = None,
) -> None:
    """Writes the page: about 150 bytes a token.

    Args:
      file: the page.
      path: of the data set.
      split, rows, sources: what to show; None shows every source.

    Raises ConfigError as `inspect.views` does; then nothing is written.
    """
    found = list(views(path, split, rows, sources))
    tokenizer = open_tokenizer(path)
    title = html.escape(f"Packed rows of {path}")
    sections = "\n".join(_section(view, tokenizer) for view in found)
    Path(file).write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n<p>{_LEGEND}</p>\n{sections}\n</body></html>\n",
        encoding="utf-8",
    )


def _section(view: RowView, tokenizer: Tokenizer) -> str:
    documents = "".join(
        f'<li><span class="d{number % COLOURS}">{html.escape(piece.path)}</span> '
        f"tokens {piece.start_in_document} to {piece.start_in_document + piece.length - 1}</li>"
        for number, piece in enumerate(view.pieces, 1)
    )
    return (
        f"<section><h2>{html.escape(view.title)}</h2>\n{_bar(view)}<ol>{documents}</ol>\n"
        f'<div class="row">{_tokens(view, tokenizer)}</div></section>'
    )


def _bar(view: RowView) -> str:
    """The row at a glance: each document's share of it, and the padding's."""
    edges = [0, *(np.flatnonzero(np.diff(view.segments.astype(int))) + 1), len(view.segments)]
    parts = (
        (int(view.segments[start]), (stop - start) / len(view.segments))
        for start, stop in itertools.pairwise(edges)
    )
    shown = "".join(
        f'<span class="{_kind(segment)}" style="width:{share:.3%}"></span>'
        for segment, share in parts
    )
    return f'<div class="bar">{shown}</div>\n'


def _kind(segment: int) -> str:
    return f"d{segment % COLOURS}" if segment else "pad"


def _tokens(view: RowView, tokenizer: Tokenizer) -> str:
    parts, before, column = [], 0, 0
    while column < len(view.tokens):
        segment = int(view.segments[column])
        if segment == 0:
            stop = column
            while stop < len(view.segments) and view.segments[stop] == 0:
                stop += 1
            parts.append(
                f'<span class="pad" title="columns {column} to {stop - 1}">'
                f"{stop - column} padding</span>"
            )
            before, column = 0, stop
            continue
        if segment != before:
            parts.append(f'<b class="d{segment % COLOURS}">{segment}</b>')
        parts.append(_token(view, tokenizer, column, segment))
        before, column = segment, column + 1
    return "".join(parts)


def _token(view: RowView, tokenizer: Tokenizer, column: int, segment: int) -> str:
    index, weighted = int(view.tokens[column]), view.weighted[column]
    piece = tokenizer.piece(index)
    shown = "⏎\n" if piece in ("<0x0A>", "\n") else html.escape(piece.replace("▁", "·"))
    about = f"id {index}, column {column}, segment {segment}, weight {int(weighted)}"
    off = "" if weighted else " off"
    return f'<i class="d{segment % COLOURS}{off}" title="{about}">{shown}</i>'
