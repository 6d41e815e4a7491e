"""Whole conversations into rows of T+1 tokens, in two ways by name.

    segmented     each conversation is a document: positions restart, attention stays inside. Best
                  fit, longest first, within a window of conversations: a row is closed only when
                  the window is.
    lemur_compat  train.py's `--data_packing`: next fit in the given order, groups of 1000, an
                  end-of-conversation token that is not learnt after each, one segment for the row:
                  attention crosses conversations and positions run on.

train.py asks whether `row + conversation <= max_seq_length` and then appends the end token as well,
so a row can exceed max_seq_length by one. Here max_seq_length is T and rows hold T+1 tokens, so
such a row is kept whole: its extra token, never learnt, stands in the last column, where it is a
target only. Nothing has to be cut.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lemur_jax.data.chat.formats import Rendered

PACKINGS = ("segmented", "lemur_compat")
COMPAT_GROUP = 1000  # datasets' map(batched=True): rows do not reach from one group to the next


class Slice(NamedTuple):
    """Tokens [start, stop) of a conversation; `closed`: an end-of-conversation token follows."""

    conversation: int
    start: int
    stop: int
    closed: bool


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `capacity`: longest first, into the fullest row.

    O(n log n): the rows with s free places are in a list of their own, and the bits of one integer
    say which lists are not empty.
    """
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if not 0 < length <= capacity:
            raise ValueError(f"length {length} of item {item} is not in [1, {capacity}]")
        enough = spaces >> length << length
        if enough:
            space = (enough & -enough).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        left = space - length
        with_space[left].append(row)
        spaces |= 1 << left
    return rows


def next_fit(lengths: Sequence[int], most: int, group: int = COMPAT_GROUP) -> list[list[Slice]]:
    """train.py's packing: what each row holds, in order. A row can hold `most` + 1 tokens.

    The check counts the conversation and not the end token behind it. A conversation longer than
    `most` (train.py's own encoders cut it before) is cut into rows of its own, without end tokens;
    the next conversation may join the last of them.
    """
    rows: list[list[Slice]] = []
    filled = 0
    for index, length in enumerate(lengths):
        open_row = index % group != 0
        if open_row and filled + length <= most:
            rows[-1].append(Slice(index, 0, length, closed=True))
            filled += length + 1
        elif length > most:
            for start in range(0, length, most):
                stop = min(start + most, length)
                rows.append([Slice(index, start, stop, closed=False)])
                filled = stop - start
        else:
            rows.append([Slice(index, 0, length, closed=True)])
            filled = length + 1
    return rows


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """One row of a store.

    Attributes:
      conversations: indices of the conversations in it, in order.
      tokens, segments: [T+1]; see data/store.py.
      loss: [T+1] uint8, 1 where the token is learnt as a target.
    """

    conversations: tuple[int, ...]
    tokens: np.ndarray
    segments: np.ndarray
    loss: np.ndarray


def segmented(rendered: Sequence[Rendered], columns: int) -> Iterator[PackedRow]:
    """Rows of `columns` = T+1 tokens, documents isolated."""
    for items in best_fit([len(r.ids) for r in rendered], columns):
        row = _empty(columns)
        at = 0
        for segment, item in enumerate(items, 1):
            one = rendered[item]
            end = at + len(one.ids)
            row.tokens[at:end], row.loss[at:end] = one.ids, one.learnt
            row.segments[at:end] = segment
            row.loss[at] = 0  # its first token is never a target
            at = end
        yield dataclasses.replace(row, conversations=tuple(items))


def lemur_compat(rendered: Sequence[Rendered], columns: int, end_id: int) -> Iterator[PackedRow]:
    """Rows of `columns` = max_seq_length + 1 tokens, as train.py packs them."""
    for slices in next_fit([len(r.ids) for r in rendered], columns - 1):
        row = _empty(columns)
        at = 0
        for piece in slices:
            one = rendered[piece.conversation]
            end = at + piece.stop - piece.start
            row.tokens[at:end] = one.ids[piece.start : piece.stop]
            row.loss[at:end] = one.learnt[piece.start : piece.stop]
            if piece.closed:
                row.tokens[end] = end_id
                end += 1
            at = end
        row.segments[:at] = 1
        row.loss[0] = 0
        yield dataclasses.replace(row, conversations=tuple(piece.conversation for piece in slices))


def _empty(columns: int) -> PackedRow:
    return PackedRow(
        (), np.zeros(columns, np.uint32), np.zeros(columns, np.uint16), np.zeros(columns, np.uint8)
    )
