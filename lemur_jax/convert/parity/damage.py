"""What kind of damage makes some elements of a tensor differ, when most of it is right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from lemur_jax.convert.parity.finding import Finding
from lemur_jax.convert.parity.weights import narrowest

FLOAT16_MAX = 65504.0
EXPLAINED = 0.9  # of the sampled elements must agree; the rest is looked at one by one
_ALL_OVER = 0.01  # of the elements wrong, in nearly all rows: other weights, no damage
_KEPT = 64  # differing elements that are looked at one by one


def same_bits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Elementwise: the same dtype and bits (two NaNs of the same bits are the same)."""
    bits = f"u{x.dtype.itemsize}"
    return np.ascontiguousarray(x).view(bits) == np.ascontiguousarray(y).view(bits)


def close(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Elementwise: equal up to rounding to bfloat16 or float16 (its subnormals included)."""
    x, y = x.astype(np.float32), y.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(x - y) <= np.abs(x) * 2.0**-8 + 6e-8


def agree(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`same_bits` where the dtypes are the same, `close` where they are not."""
    return same_bits(x, y) if x.dtype == y.dtype else close(x, y)


def constant(array: np.ndarray) -> bool:
    """Whether every element is the same number."""
    return all((row == array[0, 0]).all() for row in array)


def same_everywhere(leaf: str, layer: int | None, value: float) -> Finding:
    """A tensor that is one number."""
    if value == 0:
        what = "holds only zeros"
    elif value == 1 and "norm" in leaf:
        what = "is 1 in every element: set back to its start, never loaded, or folded elsewhere"
    else:
        what = f"is {value:.6g} in every element"
    return Finding("constant", leaf, layer, what, "write it again from its source")


@dataclass
class Damage:
    """Everything that differs between a tensor and what it should be.

    Attributes:
      row_count: rows of the tensor.
      size: elements.
      unequal: elements whose bits differ; of different dtypes, by more than rounding.
      wrong: elements that differ by more than rounding could.
      not_finite, zero, overflowed: of the wrong ones: NaN or inf; 0 where the other is not; whose
        right value float16 cannot hold and which are inf or float16's last value.
      rows: of the wrong elements that did not overflow.
      some_unequal, some_wrong: (row, column, right, found) of the first few.
      largest: largest absolute difference of finite values.
      most: largest right value that overflowed.
    """

    row_count: int = 0
    size: int = 0
    unequal: int = 0
    wrong: int = 0
    not_finite: int = 0
    zero: int = 0
    overflowed: int = 0
    rows: set[int] = field(default_factory=set)
    some_unequal: list[tuple] = field(default_factory=list)
    some_wrong: list[tuple] = field(default_factory=list)
    largest: float = 0.0
    most: float = 0.0

    def add(self, start: int, right: np.ndarray, found: np.ndarray) -> None:
        """The next rows [n, columns], the first of which is row `start`."""
        self.size += right.size
        differs = ~agree(right, found)
        if not differs.any():
            return
        places = np.argwhere(differs)
        x, y = right[differs], found[differs]
        wide_x, wide_y = x.astype(np.float32), y.astype(np.float32)
        wrong = ~close(x, y)
        over = wrong & (np.abs(wide_x) > FLOAT16_MAX) & ~(np.abs(wide_y) < FLOAT16_MAX)
        with np.errstate(invalid="ignore", over="ignore"):
            gaps = np.abs(wide_x - wide_y)
        self.largest = max(self.largest, float(np.max(gaps, where=np.isfinite(gaps), initial=0)))
        self.most = max(self.most, float(np.max(np.abs(wide_x), where=over, initial=0)))
        self.unequal += len(x)
        self.overflowed += int(over.sum())
        wrong &= ~over
        self.wrong += int(wrong.sum())
        self.not_finite += int((wrong & ~np.isfinite(wide_y)).sum())
        self.zero += int((wrong & (wide_y == 0)).sum())
        self.rows.update((np.unique(places[wrong, 0]) + start).tolist())
        for kept, mask in ((self.some_unequal, ~over), (self.some_wrong, wrong)):
            for i in np.flatnonzero(mask)[: _KEPT - len(kept)]:
                kept.append((start + int(places[i, 0]), int(places[i, 1]), x[i], y[i]))


def assess(rows: int, right: Callable, found: Callable, step: int) -> Damage:
    """Reads both by blocks of `step` rows: right(start, stop) and found(start, stop)."""
    damage = Damage(row_count=rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        damage.add(start, right(start, stop), found(start, stop))
    return damage


def findings(d: Damage, subject: str, layer: int | None, dtypes) -> Iterator[Finding]:
    """Findings about the damage; none when there is none.

    Args:
      d: what `assess` found.
      subject, layer: of the findings.
      dtypes: of the right tensor and of the one found.
    """
    if d.overflowed:
        how = "elements are" if d.overflowed > 1 else "element is"
        yield Finding(
            "float16_overflow",
            subject,
            layer,
            f"overflowed in float16: {d.overflowed} {how} inf or {FLOAT16_MAX:g} where up to "
            f"{d.most:g} was there",
            "convert it as bfloat16 or float32",
        )
    flips = _flips(d.some_unequal, d.unequal - d.overflowed) or _flips(d.some_wrong, d.wrong)
    if flips:
        row, column, x, y = flips[0]
        more = f"{len(flips)} elements, the first" if len(flips) > 1 else "one element,"
        yield Finding(
            "bit_flip",
            subject,
            layer,
            f"has a flipped bit in {more} [{row}, {column}]: bit {_flipped_bit(x, y)} of "
            f"{dtypes[1].name}, {float(x):.6g} became {float(y):.6g}",
            "copy the file again; storage, memory or the network damaged it",
        )
    elif d.wrong:
        yield Finding(*_kind(d, subject, layer))
    elif d.unequal > d.overflowed:
        # No figures, so that layers that are rounded alike are one sentence.
        share = "most" if 2 * (d.unequal - d.overflowed) > d.size else "some"
        if not _rounded(d.some_unequal):
            what = f"differs in {share} of its elements, by less than rounding to 16 bits would"
            fix = "none, if one was trained from the other: the numbers have more than 16 bits"
            yield Finding("unexplained", subject, layer, what, fix)
            return
        yield Finding(
            "rounded",
            subject,
            layer,
            f"is rounded: {share} of its elements differ, by no more than rounding to 16 bits",
            "nothing, if a dtype was asked for",
            fault=False,
        )


def _kind(d: Damage, subject: str, layer: int | None) -> tuple:
    where = _where(d)
    again = "copy or convert this tensor again"
    if d.zero == d.wrong:
        return "zeros", subject, layer, f"holds zeros in {where}", f"{again}: a write was cut short"
    if d.not_finite == d.wrong:
        return "not_finite", subject, layer, f"holds NaN or inf in {where}", again
    if d.wrong > _ALL_OVER * d.size and len(d.rows) > 0.9 * d.row_count:
        what = "differs a little all over, in no order"
        return "unexplained", subject, layer, what, "none, if one was trained from the other"
    row, column, x, y = d.some_wrong[0]
    what = f"differs in {where}; the first, [{row}, {column}], was {float(x):.6g}: {float(y):.6g}"
    return "damaged", subject, layer, what, again


def _rounded(examples: list[tuple]) -> bool:
    """Whether what was found are numbers of 16 bits."""
    found = np.array([y for _, _, _, y in examples])
    return narrowest(found, found.dtype).itemsize == 2


def _where(d: Damage) -> str:
    rows = sorted(d.rows)
    many = f"{d.wrong} of {d.size} elements"
    if len(rows) == 1:
        return f"{many}, row {rows[0]}"
    if rows[-1] - rows[0] + 1 == len(rows):
        return f"{many}, rows {rows[0]} to {rows[-1]}"
    return f"{many}, in {len(rows)} rows"


def _flips(examples: list[tuple], count: int) -> list[tuple]:
    """The examples, if they are all there are and each is a single bit."""
    if not count or count != len(examples):
        return []
    return examples if all(_flipped_bit(x, y) is not None for _, _, x, y in examples) else []


def _flipped_bit(x, y) -> int | None:
    """Which bit differs, if exactly one does. `x` is rounded to the dtype of `y` first."""
    bits = f"u{y.dtype.itemsize}"
    with np.errstate(over="ignore"):
        x = x.astype(y.dtype)
    changed = int(x.view(bits)) ^ int(y.view(bits))
    return changed.bit_length() - 1 if changed.bit_count() == 1 else None
