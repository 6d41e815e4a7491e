"""What is wrong with weights whatever they mean: NaN, zeros, constants, copies, flipped bits.

Needs no twin. Zeros have a meaning in two places only, and are left alone there: biases, and rows
at the end of a vocabulary that no token has.
"""

from collections.abc import Iterator

import numpy as np

from lemur_jax.convert.parity.damage import constant, same_everywhere
from lemur_jax.convert.parity.diagnose import STEP_ELEMENTS, equal, matrix
from lemur_jax.convert.parity.finding import Finding
from lemur_jax.convert.parity.weights import Weights

_OUTLIER = 1e3  # times the usual largest of a row: a flipped top exponent bit makes 2^16 and more
_PART = 8  # one in so many columns, elements of a norm or rows of a vocabulary: no accident
_FEW_ROWS = 64  # of a vocabulary: tokens that were added and not trained, a padding token
_MULTIPLES = 1024  # vocabularies are padded to a multiple of a power of two up to this
_AGAIN = "write it again from its source"


def facts(weights: Weights, tokens: int | None = None) -> Iterator[Finding]:
    """Findings about layers, then about table, head and final norm.

    Args:
      weights: the model.
      tokens: of its tokenizer; rows from there on may be zeros. None: unknown.
    """
    yield from _layers(weights)
    yield from _vector("norm", None, matrix(weights.tensor("norm")))
    for leaf in ("table",) if weights.tied else ("table", "head"):
        yield from _vocabulary(weights, leaf, tokens)


def _layers(weights: Weights) -> Iterator[Finding]:
    sketches: list[list[np.ndarray]] = []
    matrices = [leaf for leaf in weights.layer_leaves if len(weights.shape(leaf)) == 2]
    for layer in range(weights.config.layers):
        sketch = []
        for leaf in weights.layer_leaves:
            array = matrix(weights.tensor(leaf, layer))
            if leaf in matrices:
                yield from _matrix(leaf, layer, array)
                sketch.append(array[:: max(1, len(array) // 16), 0].astype(np.float32))
            else:
                yield from _vector(leaf, layer, array)
        for other, before in enumerate(sketches):
            if all(np.array_equal(x, y) for x, y in zip(before, sketch)) and all(
                equal(weights.tensor(leaf, other), weights.tensor(leaf, layer)) for leaf in matrices
            ):
                what = f"is a copy of layer {other}: every matrix is the same, bit for bit"
                yield Finding("layer_copied", "layer", layer, what, "write it from its source")
        sketches.append(sketch)


def _vector(leaf: str, layer: int | None, array: np.ndarray) -> Iterator[Finding]:
    """Of a norm [E,1] or a bias; a bias may be zero, and either may be one number."""
    wide = array.astype(np.float32)
    if bad := int(array.size - np.isfinite(wide).sum()):
        yield _not_finite(leaf, layer, bad)
    elif "norm" in leaf and (empty := int((wide == 0).sum())) >= max(2, array.size // _PART):
        yield _zeros(leaf, layer, empty, array.size, "elements")


def _matrix(leaf: str, layer: int, array: np.ndarray) -> Iterator[Finding]:
    wide = array.astype(np.float32)
    if bad := int(array.size - np.isfinite(wide).sum()):
        yield _not_finite(leaf, layer, bad)
        return
    if wide.any() and constant(array):
        yield same_everywhere(leaf, layer, float(wide[0, 0]))
        return
    rows = int((~wide.any(axis=1)).sum())
    columns = int((~wide.any(axis=0)).sum())
    if rows:
        yield _zeros(leaf, layer, rows, len(wide), "rows")
    elif columns >= max(2, wide.shape[1] // _PART):
        yield _zeros(leaf, layer, columns, wide.shape[1], "columns")
    maxima = np.abs(wide).max(axis=1)
    largest = float(maxima.max())
    usual = float(np.median(maxima[maxima > 0])) if rows < len(wide) else 0.0
    if largest > _OUTLIER * max(usual, 1e-30):
        row, column = np.unravel_index(int(np.abs(wide).argmax()), wide.shape)
        what = (
            f"has {float(wide[row, column]):.3g} in [{row}, {column}], where the largest of "
            f"a row is usually {usual:.2g}: a flipped bit"
        )
        yield Finding("bit_flip", leaf, layer, what, "copy the file again")


def _vocabulary(weights: Weights, leaf: str, tokens: int | None) -> Iterator[Finding]:
    """Of the table or the head, by blocks of rows."""
    count, width = weights.config.vocab_size, weights.config.embed
    empty, bad = np.zeros(count, bool), 0
    used = np.zeros(width, bool)
    first, same = None, True
    step = max(1, STEP_ELEMENTS // width)
    for start in range(0, count, step):
        rows = weights.rows(leaf, start, min(start + step, count))
        wide = rows.astype(np.float32)
        first = rows[0, 0] if first is None else first
        same = same and bool((rows == first).all())
        bad += int(wide.size - np.isfinite(wide).sum())
        empty[start : start + len(rows)] = ~wide.any(axis=1)
        used |= wide.any(axis=0)
    if bad:
        yield _not_finite(leaf, None, bad)
    elif same and first:
        yield same_everywhere(leaf, None, float(first))
    elif empty.all():
        yield _zeros(leaf, None, count, count, "rows")
    else:
        unused = int((~used).sum())
        if unused >= max(2, width // _PART):
            yield _zeros(leaf, None, unused, width, "columns")
        yield from _empty_rows(leaf, empty, tokens)


def _empty_rows(leaf: str, empty: np.ndarray, tokens: int | None) -> Iterator[Finding]:
    """Of rows that are all zeros: padding at the end, a few untrained tokens, or a fault."""
    count = len(empty)
    end = count - int(np.argmax(~empty[::-1]))  # behind the last row that is not empty
    if tokens is not None:
        meant = max(end, min(tokens, count))  # from here on no token has a row
    else:
        multiple = min(count & -count, _MULTIPLES)
        padded = count - end < multiple and count - end <= count // 4
        meant = end if padded else count
    inside = np.flatnonzero(empty[:meant])
    if not len(inside):
        return
    low, high = int(inside[0]), int(inside[-1])
    if high - low + 1 > len(inside):
        where = f"between {low} and {high}"
    else:
        where = f"{low} to {high}" if high > low else f"{low}"
    what = f"holds only zeros in {len(inside)} of its {count} rows ({where})"
    if len(inside) > _FEW_ROWS or len(inside) > count // _PART:
        yield Finding("zeros", leaf, None, what, _AGAIN)
    else:
        what += ": padding, or tokens that were never trained"
        yield Finding("empty_rows", leaf, None, what, fault=False)


def _not_finite(leaf: str, layer: int | None, count: int) -> Finding:
    return Finding("not_finite", leaf, layer, f"holds {count} NaN or infinite elements", _AGAIN)


def _zeros(leaf: str, layer: int | None, count: int, of: int, things: str) -> Finding:
    if count == of:
        return same_everywhere(leaf, layer, 0.0)
    what = f"holds only zeros in {count} of its {of} {things}"
    return Finding("zeros", leaf, layer, what, _AGAIN)
