"""The global order: position -> (source, row, epoch), a pure function. No state, O(1) seek.

Every source is shuffled anew in each epoch and repeats for ever; sources are interleaved in exact
proportion to their rates. Rows have a fixed number of tokens, so shares of rows are shares of
tokens. Rates may change at declared positions: positions before stay as they are, and each source
goes on in its own epoch where it was.

The interleaving counts: how many rows of a source stand before a position is a closed form (that of
grain's MapDataset.mix, with rates taken exactly instead of rounded to a hundredth of the least), so
"nothing repeated, nothing skipped" can be proved by subtraction. The shuffle is grain's; the
digest pins it.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from lemur_jax.config import ConfigError

_PROBES = (*range(32), *(10**6 + n for n in range(32)), 10**10)
_MAX_ROWS = 2**32 - 1  # of a source: what grain's shuffle takes


class Place(NamedTuple):
    """Where a row is: the source's name, the row's number in it, and the source's epoch."""

    source: str
    row: int
    epoch: int


class _Phase(NamedTuple):
    """Positions from `start` on, until the next phase.

    Attributes:
      start: its first position.
      shares: (source, integer share) of the sources that have one, in the order of their names.
      used: rows of each source that stand before `start`.
    """

    start: int
    shares: tuple[tuple[str, int], ...]
    used: Mapping[str, int]


class Order:
    """order[position] -> Place, for positions 0 to 2**62.

    Args:
      seed: any integer; other seeds give other orders.
      rows: number of rows of each source.
      rates: share of each source, not normalised; same names as `rows`.
      changes: (position, source, rate): from `position` on, `source` has this rate and the others
        keep theirs; positions do not decrease; a rate of 0 leaves the source out.
    """

    def __init__(
        self,
        seed: int,
        rows: Mapping[str, int],
        rates: Mapping[str, float],
        changes: Sequence[tuple[int, str, float]] = (),
    ):
        _check(rows, rates)
        self.rows = {name: rows[name] for name in sorted(rows)}
        # A seed for each source by hash: the epoch is added to it, so neighbouring seeds would
        # give one source the other's order one epoch later.
        self._seeds = {
            name: int(hashlib.sha256(f"{seed} {name}".encode()).hexdigest()[:8], 16)
            for name in self.rows
        }
        # Sorted: the order must not depend on how a dict was written.
        now = {name: rates[name] for name in self.rows}
        self._phases = [_Phase(0, _shares(now), dict.fromkeys(self.rows, 0))]
        self._base = self._phases[0]
        self._digest = None  # not cheap for tiny sources: see `shuffled`
        for position in sorted({change[0] for change in changes}):
            now |= {source: rate for at, source, rate in changes if at == position}
            phase = _Phase(position, _shares(now), self.used(position))
            if position == self._phases[-1].start:  # a change before the first row
                self._phases.pop()
            self._phases.append(phase)

    def __getitem__(self, position: int) -> Place:
        return self._place(self._phase(position), position)

    def _place(self, phase: _Phase, position: int) -> Place:
        source, count = _next(position - phase.start, phase.shares)
        return self.place(source, phase.used[source] + count)

    def place(self, source: str, index: int) -> Place:
        """The row that is read as number `index` of a source, counted over all its epochs."""
        epoch, within = divmod(index, self.rows[source])
        return Place(source, self.shuffled(source, epoch, within), epoch)

    def shuffled(self, source: str, epoch: int, within: int) -> int:
        """The row that stands at `within` in an epoch of a source.

        5 us, but 65,536 / rows times 1 us for sources below some thousands of rows: grain's
        cipher has 16 bits at least and is applied until it falls into the source.
        """
        from grain.experimental import index_shuffle  # 2.5 s, of which jax and orbax are the most

        last = self.rows[source] - 1
        if last == 0:
            return 0
        seed = (self._seeds[source] + epoch) % 2**32
        return index_shuffle(within, max_index=last, seed=seed, rounds=4)

    def used(self, position: int) -> dict[str, int]:
        """How many rows of each source stand before `position`, by arithmetic alone."""
        phase = self._phase(position)
        counts = dict(phase.used)
        left, remaining = position - phase.start, sum(share for _, share in phase.shares)
        for source, share in phase.shares:
            after = left * (remaining - share) // remaining
            counts[source] += left - after
            left, remaining = after, remaining - share
        return counts

    def share(self, position: int) -> dict[str, float]:
        """Share of the rows that each source has at `position`; together 1."""
        shares = dict(self._phase(position).shares)
        return {name: shares.get(name, 0) / sum(shares.values()) for name in self.rows}

    def _phase(self, position: int) -> _Phase:
        return next(p for p in reversed(self._phases) if p.start <= position)

    def digest(self) -> str:
        """SHA-256 of the order at fixed positions: seed, rows, rates and the shuffle's algorithm.

        Without the changes of rates, which are compared by themselves.
        """
        if self._digest is not None:
            return self._digest
        places = [(p, self._place(self._base, p)) for p in _PROBES]
        text = ";".join(f"{p}:{place.source}/{place.row}" for p, place in places)
        self._digest = hashlib.sha256(text.encode()).hexdigest()
        return self._digest


def _next(k: int, shares: Sequence[tuple[str, int]]) -> tuple[str, int]:
    """Source of position k of an interleaving, and how many of its rows stand before k."""
    remaining, this, following = sum(share for _, share in shares), k, k + 1
    for source, share in shares:
        rest, rest_following = (n * (remaining - share) // remaining for n in (this, following))
        if (following - rest_following) > (this - rest):
            return source, this - rest
        remaining, this, following = remaining - share, rest, rest_following
    raise AssertionError(f"position {k} belongs to no source of {shares}")


def _shares(rates: Mapping[str, float]) -> tuple[tuple[str, int], ...]:
    """Rates as the smallest integers in exactly their proportion; those of 0 are left out."""
    exact = {name: Fraction(repr(float(rate))) for name, rate in rates.items() if rate}
    if not exact:
        raise ConfigError([f"rates={dict(rates)} are all 0: at least one source must have rows"])
    scale = math.lcm(*(rate.denominator for rate in exact.values()))
    shares = {name: int(rate * scale) for name, rate in exact.items()}
    common = math.gcd(*shares.values())
    return tuple((name, share // common) for name, share in shares.items())


def _check(rows: Mapping[str, int], rates: Mapping[str, float]) -> None:
    problems = [f"rows[{name!r}]={n} must be positive" for name, n in rows.items() if n < 1]
    problems += [
        f"rows[{name!r}]={n} is too many: at most {_MAX_ROWS} in one source; split it in two"
        for name, n in rows.items()
        if n > _MAX_ROWS
    ]
    problems += [
        f"rates[{name!r}]={rate} must be a positive number"
        for name, rate in rates.items()
        if not (rate > 0 and math.isfinite(rate))
    ]
    if set(rows) != set(rates):
        problems.append(f"rows={sorted(rows)} and rates={sorted(rates)} must name one set")
    if problems:
        raise ConfigError(problems)
