"""The global order: position -> (source, row, epoch), a pure function. No state, O(1) seek.

Every source is shuffled anew in each epoch and repeats for ever; sources are interleaved in exact
proportion to their rates. Rows have a fixed number of tokens, so shares of rows are shares of
tokens. Built on grain's MapDataset (index arithmetic, no buffers).
"""

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

from lemur_jax.config import ConfigError

_PROBES = (*range(32), *(10**6 + n for n in range(32)), 10**10)


class Place(NamedTuple):
    """Where a row is: the source's name, the row's number in it, and the source's epoch."""

    source: str
    row: int
    epoch: int


class Order:
    """order[position] -> Place, for positions 0 to 2**62.

    Args:
      seed: any integer; other seeds give other orders.
      rows: number of rows of each source.
      rates: share of each source, not normalised; same names as `rows`.
    """

    def __init__(self, seed: int, rows: Mapping[str, int], rates: Mapping[str, float]):
        import grain  # 2.5 s: it imports jax and orbax, which a training process has anyway

        problems = [f"rows[{name!r}]={n} must be positive" for name, n in rows.items() if n < 1]
        problems += [
            f"rates[{name!r}]={rate} must be a positive number"
            for name, rate in rates.items()
            if not (rate > 0 and math.isfinite(rate))
        ]
        if set(rows) != set(rates):
            problems.append(f"rows={sorted(rows)} and rates={sorted(rates)} must name one set")
        if problems:
            raise ConfigError(problems)
        # Sorted: the order must not depend on how a dict was written.
        sources = [_source(grain, seed, name, rows[name]) for name in sorted(rows)]
        weights = [rates[name] for name in sorted(rates)]
        self._mixture = grain.MapDataset.mix(sources, weights=weights)

    def __getitem__(self, position: int) -> Place:
        return self._mixture[position]

    def digest(self) -> str:
        """SHA-256 of the order at fixed positions: seed, rows, rates and grain's own algorithm."""
        places = ";".join(f"{p}:{self[p].source}/{self[p].row}" for p in _PROBES)
        return hashlib.sha256(places.encode()).hexdigest()


def _source(grain, seed: int, name: str, rows: int):
    # A seed for each source by hash: grain adds the epoch to it, so neighbouring seeds would
    # give one source the other's order one epoch later.
    own_seed = int(hashlib.sha256(f"{seed} {name}".encode()).hexdigest()[:8], 16)
    shuffled = grain.MapDataset.range(rows).shuffle(seed=own_seed).repeat(None)
    return shuffled.map_with_index(lambda index, row: Place(name, int(row), index // rows))
