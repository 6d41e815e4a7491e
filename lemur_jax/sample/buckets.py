"""Shapes that are compiled: lengths and batches are rounded up to a few sizes, rows are grouped.

A row's own length buckets depend on its request alone, and only rows of equal length buckets
share a batch. So batch-mates decide nothing about a row's program but the batch bucket.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import TypeVar

Row = TypeVar("Row", bound=Hashable)

SMALLEST_LENGTH = 16
BATCHES = (1, 2, 4, 8, 16, 32)


def length_bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, ... that holds `length` tokens.

    Half steps between powers of two: at most 1/2 of a prompt's work is padding, 1/4 on average.
    """
    power = SMALLEST_LENGTH
    while True:
        for size in (power, power + power // 2):
            if length <= size:
                return size
        power *= 2


@dataclasses.dataclass(frozen=True, order=True)
class Lengths:
    """The length buckets of a row.

    Attributes:
      prompt: tokens that prefill computes.
      cache: slots of the key/value cache: the prompt bucket and the new tokens that are fed back.
    """

    prompt: int
    cache: int


def lengths_of(prompt_tokens: int, max_new_tokens: int, context: int) -> Lengths:
    """Buckets of one row; the prompt bucket never exceeds the context."""
    prompt = min(length_bucket(prompt_tokens), context)
    # The last token is returned, not fed back: it needs no slot.
    return Lengths(prompt, length_bucket(prompt + max_new_tokens - 1))


def batch_bucket(rows: int, batches: Sequence[int]) -> int:
    """The smallest batch that holds `rows`, which must not exceed the largest."""
    return min(size for size in batches if size >= rows)


def groups(
    rows: Sequence[tuple[Lengths, Row]], largest_batch: int
) -> Iterator[tuple[Lengths, list[Row]]]:
    """Batches of rows with equal length buckets, each in the order of arrival, shortest first."""
    ordered = sorted(rows, key=lambda row: row[0])  # stable: keeps the order of arrival
    for lengths, members in itertools.groupby(ordered, key=lambda row: row[0]):
        members = [row for _, row in members]
        for start in range(0, len(members), largest_batch):
            yield lengths, members[start : start + largest_batch]
