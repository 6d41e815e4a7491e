"""B's table, head and final norm against A's, by blocks of rows."""

from collections.abc import Iterator

import numpy as np

from lemur_jax.convert.parity import damage
from lemur_jax.convert.parity.damage import EXPLAINED
from lemur_jax.convert.parity.diagnose import (
    STEP_ELEMENTS,
    by_values,
    diagnose_tensor,
    matrix,
    sample_rows,
)
from lemur_jax.convert.parity.finding import Finding, short_name
from lemur_jax.convert.parity.weights import Weights

_EXCHANGED = 64  # rows at most that are looked for among each other
_SHOWN = 8
_SHIFTS = tuple(sign * rows for rows in range(1, 9) for sign in (1, -1))


def diagnose_vocabulary(a: Weights, b: Weights) -> Iterator[Finding]:
    """Findings about what is outside the layers, by blocks of rows."""
    yield from diagnose_tensor(
        "norm", None, matrix(a.tensor("norm")), matrix(b.tensor("norm")), a.config
    )
    for leaf in ("table", "head"):
        if leaf == "table" or not (a.tied and b.tied):
            yield from _vocabulary(a, b, leaf, min(a.config.vocab_size, b.config.vocab_size))


def _vocabulary(a: Weights, b: Weights, leaf: str, rows: int) -> Iterator[Finding]:
    indices = sample_rows(rows)
    sample, right = b.take(leaf, indices), a.take(leaf, indices)
    if damage.constant(sample) and not damage.close(right, sample).all():
        step = max(1, STEP_ELEMENTS // a.config.embed)
        blocks = (b.rows(leaf, i, min(i + step, rows)) for i in range(0, rows, step))
        if all(damage.constant(block) and block[0, 0] == sample[0, 0] for block in blocks):
            yield damage.same_everywhere(leaf, None, float(sample[0, 0]))
            return
    moved = damage.close(right, sample).mean(axis=1) < 0.5  # rows out of place
    shift = _shift(a, leaf, indices[moved], sample[moved], rows) if moved.any() else 0
    if moved.mean() > 0.95 and not shift:
        other = "head" if leaf == "table" else "table"
        if not a.tied and damage.agree(a.take(other, indices), sample).mean() > EXPLAINED:
            what, fix = f"holds the rows of {short_name(other)}", "exchange them, or untie them"
            yield Finding("exchanged", leaf, None, what, fix)
        else:
            yield by_values(leaf, None, right, sample, a.config)
        return
    first = 0
    if shift:
        first = _first_moved(a, b, leaf, rows)
        many = "one row" if abs(shift) == 1 else f"{abs(shift)} rows"
        since = f" from row {first} on" if first else ""
        belongs = f"row i {'-+'[shift < 0]} {abs(shift)}"
        yield Finding(
            "shifted_rows",
            leaf,
            None,
            f"is off by {many}{since}: its row i holds what belongs in {belongs}",
            "added tokens belong at the end: put the rows back in their places",
        )

    def expected(start: int, stop: int) -> np.ndarray:
        """A's rows where B should have them; B's own where the shift has no source."""
        ids = np.arange(start, stop)
        source = np.where(ids >= first, ids - shift, ids)
        new = (ids >= first) & (ids < first + shift)  # rows that were put in
        inside = (source >= 0) & (source < rows) & ~new
        if not inside.any():
            return b.rows(leaf, start, stop)
        low, high = source[inside].min(), source[inside].max() + 1
        result = b.rows(leaf, start, stop).astype(a.dtype(leaf))
        result[inside] = a.rows(leaf, int(low), int(high))[source[inside] - low]
        return result

    step = max(1, STEP_ELEMENTS // a.config.embed)
    harm = damage.assess(rows, expected, lambda start, stop: b.rows(leaf, start, stop), step)
    if not shift and (exchanged := _exchanged(a, b, leaf, sorted(harm.rows))):
        yield exchanged
        return
    yield from damage.findings(harm, leaf, None, (a.dtype(leaf), b.dtype(leaf)))


def _exchanged(a: Weights, b: Weights, leaf: str, rows: list[int]) -> Finding | None:
    """If the rows that are wrong are each other's."""
    if not 2 <= len(rows) <= _EXCHANGED:
        return None
    right, found = a.take(leaf, np.array(rows)), b.take(leaf, np.array(rows))
    alike = np.array([damage.agree(right, row[None]).mean(axis=1) for row in found])
    places = alike.argmax(axis=1)
    if alike.max(axis=1).min() < EXPLAINED or len(set(places)) < len(rows):
        return None
    shown, theirs = rows[:_SHOWN], [rows[place] for place in places[:_SHOWN]]
    more = ", ..." if len(rows) > _SHOWN else ""
    what = (
        f"has rows {', '.join(map(str, shown))}{more} in the order "
        f"{', '.join(map(str, theirs))}{more}"
    )
    fix = "put them back in order: the ids of these tokens were exchanged"
    return Finding("exchanged_rows", leaf, None, what, fix)


def _shift(a: Weights, leaf: str, indices: np.ndarray, sample: np.ndarray, rows: int) -> int:
    """By how many rows the rows `sample` of B are out of place; 0 if by none tried."""
    for shift in _SHIFTS:
        inside = (indices >= shift) & (indices - shift < rows)
        if inside.any():
            right = a.take(leaf, indices[inside] - shift)
            if damage.agree(right, sample[inside]).mean() > EXPLAINED:
                return shift
    return 0


def _first_moved(a: Weights, b: Weights, leaf: str, rows: int) -> int:
    """The row from which on B's rows are shifted, by bisection."""

    def moved(row: int) -> bool:
        found = b.rows(leaf, row, row + 1)
        return damage.close(a.rows(leaf, row, row + 1), found).mean() < 0.5

    low, high = 0, rows - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if moved(middle) else (middle + 1, high)
    return low
