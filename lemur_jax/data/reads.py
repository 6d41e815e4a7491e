"""What was really read: hashes of rows that any number of hosts can add up.

Each row of a global batch has a hash of everything that it feeds and of where it stands (step and
row). The sum of the hashes, modulo 2**64, does not depend on who read which row, nor when: hosts
add up their own rows, and the sums of hosts are added. It finds rows that were lost, doubled,
swapped or of other content; it is no protection against one who seeks a collision on purpose.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from lemur_jax.data.batch import Batch

_MODULUS = 2**64


def hash_rows(step: int, first_row: int, batch: Batch, wanted: Sequence[int] | None = None) -> int:
    """Sum of the hashes of rows of the global batch of a step.

    Args:
      step: of the batch, the first being 0.
      first_row: of the global batch, with which the part `batch` begins.
      batch: a part of the global batch.
      wanted: which of its rows count; None: all.
    """
    total = 0
    for index in range(len(batch.inputs)) if wanted is None else wanted:
        digest = hashlib.blake2b(f"{step} {first_row + index}".encode(), digest_size=8)
        for field in batch:
            digest.update(np.ascontiguousarray(field[index]))
        total += int.from_bytes(digest.digest(), "little")
    return total % _MODULUS


def add(sums: Iterable[int]) -> int:
    """The sum for all rows from the sums of parts."""
    return sum(sums) % _MODULUS


class Reads:
    """The running sum of one host."""

    def __init__(self):
        self._sum = 0

    def add(self, step: int, first_row: int, batch: Batch, wanted: Sequence[int]) -> None:
        """Counts rows that are about to be fed; arguments as of `hash_rows`."""
        self._sum = add([self._sum, hash_rows(step, first_row, batch, wanted)])

    def take(self) -> int:
        """The sum since the last call, and begins again from 0."""
        taken, self._sum = self._sum, 0
        return taken


def cover(ranges: Iterable[Sequence[int]], rows: int) -> bool:
    """Whether `ranges`, which may overlap, cover [0, rows) and nothing beyond."""
    reached = 0
    for start, stop in sorted(tuple(part) for part in ranges):
        if start > reached or start < 0:
            return False
        reached = max(reached, stop)
    return reached == rows
