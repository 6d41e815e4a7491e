"""B's weights against A's: equal, or which mistake turned one into the other.

Every tensor that differs is tried against each hypothesis on a sample of its rows; the one that
agrees best is then compared in full, so that a second fault inside the same tensor is found too.
Nothing is guessed: a tensor that no hypothesis explains is reported as that.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.parity import damage
from lemur_jax.convert.parity.finding import Finding, short_name
from lemur_jax.convert.parity.orders import describe, head_orders
from lemur_jax.convert.parity.weights import Weights

_STEP_ELEMENTS = 2**23  # of a tensor compared at a time
_SAMPLED_ROWS = 96
_EXPLAINED = 0.9  # of the sampled elements must agree; the rest is looked at one by one
_SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4)  # rows of a vocabulary

Rows = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Hypothesis:
    """A mistake: `rows(indices)` gives, from A, what B's rows should then be."""

    kind: str
    what: str
    fix: str
    rows: Rows


def diagnose_layer(a: Weights, b: Weights, layer: int, sketches: "Sketches") -> Iterator[Finding]:
    """Findings about every tensor of a layer; two of A and one of B are in memory at a time."""
    for leaf in a.layer_leaves:
        right, found = matrix(a.tensor(leaf, layer)), matrix(b.tensor(leaf, layer))
        sketches.add(leaf, layer, right, found)

        def others(leaf=leaf):
            for other in a.layer_leaves:
                if other != leaf and a.shape(other) == a.shape(leaf):
                    yield other, matrix(a.tensor(other, layer))

        yield from diagnose_tensor(leaf, layer, right, found, a.config, others)


class Sketches:
    """A few numbers of every tensor, to find where a tensor that fits nowhere belongs."""

    def __init__(self):
        self.right: dict[str, list[np.ndarray]] = {}
        self.found: dict[str, list[np.ndarray]] = {}

    def add(self, leaf: str, layer: int, right: np.ndarray, found: np.ndarray) -> None:
        """Takes note of a tensor of A and of B; layers come in order."""
        rows = np.linspace(0, len(right) - 1, min(len(right), 64)).astype(int)
        columns = rows * 7 % right.shape[1]
        for side, array in ((self.right, right), (self.found, found)):
            side.setdefault(leaf, []).append(array[rows, columns])

    def origin(self, leaf: str, layer: int) -> int | None:
        """Whose tensor of A stands in this layer of B; None if it is no other layer's."""
        for other, sketch in enumerate(self.right[leaf]):
            if other != layer and damage.agree(sketch, self.found[leaf][layer]).mean() > _EXPLAINED:
                return other
        return None


def place_layers(findings: list[Finding], sketches: Sketches) -> list[Finding]:
    """The findings, with tensors that no hypothesis explained traced to other layers."""
    origin: dict[tuple[str, int], int] = {}
    for f in findings:
        if f.kind in ("unexplained", "reordered") and f.layer is not None:
            where = sketches.origin(f.subject, f.layer)
            if where is not None:
                origin[f.subject, f.layer] = where
    by_layer: dict[int, dict[str, int]] = {}
    for (leaf, layer), where in origin.items():
        by_layer.setdefault(layer, {})[leaf] = where
    differing: dict[int, set] = {}
    for f in findings:
        if f.fault and f.layer is not None:
            differing.setdefault(f.layer, set()).add(f.subject)
    whole = {
        layer: set(places.values()).pop()
        for layer, places in by_layer.items()
        if len(set(places.values())) == 1 and set(places) == differing[layer] and len(places) > 1
    }
    kept = _pairs([f for f in findings if (f.subject, f.layer) not in origin])
    for layer, where in sorted(whole.items()):
        if whole.get(where) != layer:
            what, fix = f"is a copy of layer {where}", f"write layer {layer} again from its source"
            kept.append(Finding("layer_copied", "layer", layer, what, fix))
        elif layer < where:
            what = f"and layer {where} are swapped"
            kept.append(Finding("layers_swapped", "layer", layer, what, "exchange them"))
    for (leaf, layer), where in origin.items():
        if layer not in whole:
            what = f"is that of layer {where}"
            kept.append(Finding("layer_copied", leaf, layer, what, "write it again"))
    return kept


def _pairs(findings: list[Finding]) -> list[Finding]:
    """Two tensors that hold each other's weights are one finding."""
    holds = {
        (f.subject, f.layer, f.what.rpartition(" ")[2]) for f in findings if f.kind == "exchanged"
    }
    result = []
    for f in findings:
        name, held = short_name(f.subject), f.what.rpartition(" ")[2]
        partner = next(
            (
                subject
                for subject, layer, other in holds
                if layer == f.layer and other == name and short_name(subject) == held
            ),
            None,
        )
        if f.kind != "exchanged" or partner is None:
            result.append(f)
        elif f.subject < partner:
            both = f"{f.subject}+{partner}"
            result.append(Finding("swapped", both, f.layer, "are swapped", "exchange them"))
    return result


def diagnose_vocabulary(a: Weights, b: Weights) -> Iterator[Finding]:
    """Findings about what is outside the layers, by blocks of rows."""
    yield from _plain("norm", None, matrix(a.tensor("norm")), matrix(b.tensor("norm")), a.config)
    for leaf in ("table", "head"):
        if leaf in a.rules and leaf in b.rules and a.shape(leaf) == b.shape(leaf):
            yield from _vocabulary(a, b, leaf)


def diagnose_tensor(leaf, layer, right, found, config, others=lambda: ()) -> Iterator[Finding]:
    """Findings about one tensor.

    Args:
      leaf, layer: which.
      right, found: A's and B's, [rows, columns].
      config: A's.
      others: A's other tensors of this shape in the same layer, (leaf, array) pairs.
    """
    if equal(right, found):
        return
    indices = _sample(len(right))
    sample = found[indices]
    for same in (damage.agree, damage.close):
        best = _best(leaf, right, config, others, indices, sample, same)
        if best is not None:
            hypothesis, _ = best
            if hypothesis.kind != "none":
                yield Finding(hypothesis.kind, leaf, layer, hypothesis.what, hypothesis.fix)
            step = max(1, _STEP_ELEMENTS // right.shape[1])
            harm = damage.assess(
                len(right),
                lambda start, stop: hypothesis.rows(np.arange(start, stop)),  # noqa: B023
                lambda start, stop: found[start:stop],
                step,
            )
            yield from damage.findings(harm, leaf, layer, (right.dtype, found.dtype))
            return
    yield from _by_values(leaf, layer, right, found, config)


def _plain(leaf, layer, right, found, config):
    return diagnose_tensor(leaf, layer, right, found, config)


def _best(leaf, right, config, others, indices, sample, same) -> tuple[Hypothesis, float] | None:
    """The hypothesis that agrees best with the sample, if any explains it."""
    best: tuple[Hypothesis, float] | None = None
    for hypothesis in _hypotheses(leaf, right, config, others):
        score = float(same(hypothesis.rows(indices), sample).mean())
        needed = 0.05 if hypothesis.kind == "none" else _EXPLAINED
        if score >= needed and (best is None or score > best[1]):
            best = hypothesis, score
        if score == 1.0 and hypothesis.kind != "none":
            break
    return best


def _hypotheses(leaf, right, config: ModelConfig, others) -> Iterator[Hypothesis]:
    rows, columns = right.shape
    yield Hypothesis("none", "", "", lambda i: right[i])
    if leaf.rpartition("/")[2] in ("wq", "wk", "wv", "bq", "bk", "bv"):
        for order in head_orders(leaf, config):
            yield Hypothesis(
                order.kind, order.what, order.fix, lambda i, order=order: right[order.order[i]]
            )
    if leaf == "layers/wo":
        for order in head_orders(leaf, config):
            yield Hypothesis(
                order.kind,
                order.what + ", in its columns",
                order.fix,
                lambda i, order=order: right[i][:, order.order],
            )
    for other, array in others():
        yield Hypothesis(
            "exchanged",
            f"holds the weights of {short_name(other)}",
            f"exchange {short_name(leaf)} and {short_name(other)}",
            lambda i, array=array: array[i],
        )
    if columns > 1 and rows > 1:
        yield Hypothesis(
            "transposed",
            "is transposed"
            + ("" if rows == columns else f" (under the shape [{rows}, {columns}])"),
            "transpose it",
            # B's numbers, read in order, are those of A's transpose.
            lambda i: _transposed(right, i),
        )


def _transposed(right: np.ndarray, rows: np.ndarray) -> np.ndarray:
    flat = rows[:, None] * right.shape[1] + np.arange(right.shape[1])
    return right[flat % right.shape[0], flat // right.shape[0]]


def _by_values(leaf, layer, right, found, config) -> Iterator[Finding]:
    """No hypothesis about places fits: perhaps one about values, or an unknown order."""
    indices = _sample(len(right))
    x, y = (array[indices].astype(np.float64) for array in (right, found))
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(finite, x, 0), np.where(finite, y, 0)
    factor = float((x * y).sum() / max((x * x).sum(), 1e-300))
    name = leaf.rpartition("/")[2]
    if factor and damage.close(factor * x, y).mean() > _EXPLAINED:
        say, fix = _factor(factor, config)
        yield Finding("scaled", leaf, layer, f"is {say} times what it should be", fix)
    elif "norm" in name and damage.close(x + np.median(y - x), y).mean() > _EXPLAINED:
        shift = float(np.median(y - x))
        what = f"is {shift:+.6g} off in every element"
        yield Finding("offset", leaf, layer, what, "some models store a norm's scale minus one")
    elif (text := _unknown_order(right, found)) is not None:
        yield Finding("reordered", leaf, layer, text, "put it back in order")
    else:
        scale = float(np.sqrt((x * x).mean())) or 1.0
        error = float(np.sqrt(((x - y) ** 2).mean())) / scale
        yield Finding(
            "unexplained",
            leaf,
            layer,
            f"differs, and no hypothesis explains it (difference / size: {error:.2g})",
            "compare how the two were made; a trained model differs from its start like this",
        )


def _factor(factor: float, config: ModelConfig) -> tuple[str, str]:
    root = math.sqrt(config.head_dim)
    for value, name in ((root, "sqrt(head_dim)"), (1 / root, "1/sqrt(head_dim)")):
        if abs(factor / value - 1) < 1e-2:
            return (
                f"{name} = {value:.4g}",
                "the attention scale was folded into it: divide it out",
            )
    return f"{factor:.6g}", "divide by that"


def _unknown_order(right: np.ndarray, found: np.ndarray) -> str | None:
    """The order of rows or of columns, if B has A's in some order."""
    if right.dtype != found.dtype:
        return None
    for things, x, y in (("rows", right, found), ("columns", right.T, found.T)):
        if len(x) < 2:
            continue
        hx, hy = _hashes(x), _hashes(y)
        by_hash = np.argsort(hx, kind="stable")
        places = np.searchsorted(hx[by_hash], hy)
        order = by_hash[np.minimum(places, len(hx) - 1)]
        if (hx[order] == hy).mean() >= _EXPLAINED and len(np.unique(order)) > len(order) * 0.9:
            return describe(order, things)
    return None


def _hashes(array: np.ndarray) -> np.ndarray:
    """One random number for each row's bits."""
    factors = np.random.default_rng(0).integers(1, 2**63, array.shape[1], dtype=np.uint64) | 1
    bits = f"u{array.dtype.itemsize}"
    step = max(1, _STEP_ELEMENTS // array.shape[1])
    parts = [
        (np.ascontiguousarray(array[i : i + step]).view(bits) * factors).sum(axis=1)
        for i in range(0, len(array), step)
    ]
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------
# Rows of a vocabulary
# ---------------------------------------------------------------------------------------------


def _vocabulary(a: Weights, b: Weights, leaf: str) -> Iterator[Finding]:
    rows = a.shape(leaf)[0]
    indices = _sample(rows)
    sample, right = b.take(leaf, indices), a.take(leaf, indices)
    moved = damage.close(right, sample).mean(axis=1) < 0.5  # rows out of place
    shift = _shift(a, leaf, indices[moved], sample[moved]) if moved.any() else 0
    if moved.mean() > 0.95 and not shift:
        other = "head" if leaf == "table" else "table"
        if other in a.rules and damage.agree(a.take(other, indices), sample).mean() > _EXPLAINED:
            what, fix = f"holds the rows of {short_name(other)}", "exchange them, or untie them"
            yield Finding("exchanged", leaf, None, what, fix)
        else:
            yield from _by_values(leaf, None, right, sample, a.config)
        return
    first = 0
    if shift:
        first = _first_moved(a, b, leaf, shift)
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
        inside = (source >= 0) & (source < rows)
        low, high = source[inside].min(), source[inside].max() + 1
        result = b.rows(leaf, start, stop).astype(a.dtype(leaf))
        result[inside] = a.rows(leaf, int(low), int(high))[source[inside] - low]
        return result

    step = max(1, _STEP_ELEMENTS // a.config.embed)
    harm = damage.assess(rows, expected, lambda start, stop: b.rows(leaf, start, stop), step)
    yield from damage.findings(harm, leaf, None, (a.dtype(leaf), b.dtype(leaf)))


def _shift(a: Weights, leaf: str, indices: np.ndarray, sample: np.ndarray) -> int:
    """By how many rows the rows `sample` of B are out of place; 0 if by none tried."""
    rows = a.shape(leaf)[0]
    for shift in _SHIFTS:
        inside = (indices >= shift) & (indices - shift < rows)
        if inside.any():
            right = a.take(leaf, indices[inside] - shift)
            if damage.agree(right, sample[inside]).mean() > _EXPLAINED:
                return shift
    return 0


def _first_moved(a: Weights, b: Weights, leaf: str, shift: int) -> int:
    """The row from which on B's rows are shifted, by bisection."""

    def moved(row: int) -> bool:
        found = b.rows(leaf, row, row + 1)
        return damage.close(a.rows(leaf, row, row + 1), found).mean() < 0.5

    low, high = 0, a.shape(leaf)[0] - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if moved(middle) else (middle + 1, high)
    return low


# ---------------------------------------------------------------------------------------------


def matrix(array: np.ndarray) -> np.ndarray:
    """A vector as a matrix of one column."""
    return array[:, None] if array.ndim == 1 else array


def _sample(rows: int) -> np.ndarray:
    """Some rows: all of a small tensor or of a vector, evenly spread neighbours of a large one."""
    if rows <= 2 * _SAMPLED_ROWS:
        return np.arange(rows)
    starts = np.linspace(0, rows - 4, _SAMPLED_ROWS // 4).astype(int)
    return np.unique(starts[:, None] + np.arange(4))


def equal(x: np.ndarray, y: np.ndarray) -> bool:
    """The same dtype and bits."""
    if x.dtype != y.dtype:
        return False
    step = max(1, _STEP_ELEMENTS // x.shape[1])
    return all(
        damage.same_bits(x[i : i + step], y[i : i + step]).all() for i in range(0, len(x), step)
    )
