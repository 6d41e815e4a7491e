"""B's weights against A's: equal, or which mistake turned one into the other.

Every tensor that differs is tried against each hypothesis on a sample of its rows; the one that
agrees best is then compared in full, so that a second fault inside the same tensor is found too.
Nothing is guessed: a tensor that no hypothesis explains is reported as that.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.parity import damage
from lemur_jax.convert.parity.damage import EXPLAINED
from lemur_jax.convert.parity.finding import Finding, short_name
from lemur_jax.convert.parity.orders import describe, fused_orders, head_orders
from lemur_jax.convert.parity.places import Sketches
from lemur_jax.convert.parity.weights import Weights

STEP_ELEMENTS = 2**23  # of a tensor compared at a time
_SAMPLED_ROWS = 96
_ABSURD = 1e3  # difference / size: no training comes that far
_UNRELATED = 0.3  # correlation
_DAMAGE = ("bit_flip", "zeros", "not_finite", "damaged")

Rows = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Hypothesis:
    """A mistake: `rows(indices)` gives, from A, what B's rows should then be."""

    kind: str
    what: str
    fix: str
    rows: Rows
    exact: bool = False  # the numbers may be so small that all are close to each other


def diagnose_layer(a: Weights, b: Weights, layer: int, sketches: Sketches) -> Iterator[Finding]:
    """Findings about every tensor of a layer; two of A and one of B are in memory at a time."""
    for leaf in a.layer_leaves:
        right, found = matrix(a.tensor(leaf, layer)), matrix(b.tensor(leaf, layer))
        sketches.add(leaf, layer, right, found)

        def others(leaf=leaf):
            for other in a.layer_leaves:
                if other != leaf and a.shape(other) == a.shape(leaf):
                    yield other, matrix(a.tensor(other, layer))

        for finding in diagnose_tensor(leaf, layer, right, found, a.config, others):
            if finding.kind in _DAMAGE:  # one place, one file: it is worth knowing which
                where = b.source.where(leaf, (layer,))
                finding = dataclasses.replace(finding, fix=f"{finding.fix} ({where})")
            yield finding


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
    if damage.constant(found) and not damage.close(right, found).all():
        yield damage.same_everywhere(leaf, layer, float(found[0, 0]))
        return
    indices = sample_rows(len(right))
    sample = found[indices]
    for same in (damage.agree, damage.close):
        best = _best(leaf, right, found.dtype, config, others, indices, sample, same)
        if best is not None:
            hypothesis, _ = best
            if hypothesis.kind != "none":
                yield Finding(hypothesis.kind, leaf, layer, hypothesis.what, hypothesis.fix)
            step = max(1, STEP_ELEMENTS // right.shape[1])
            harm = damage.assess(
                len(right),
                lambda start, stop: hypothesis.rows(np.arange(start, stop)),  # noqa: B023
                lambda start, stop: found[start:stop],
                step,
            )
            yield from damage.findings(harm, leaf, layer, (right.dtype, found.dtype))
            return
    yield from by_values(leaf, layer, right, found, config)


def _best(
    leaf, right, dtype, config, others, indices, sample, same
) -> tuple[Hypothesis, float] | None:
    """The hypothesis that agrees best with the sample, if any explains it."""
    best: tuple[Hypothesis, float] | None = None
    for hypothesis in _hypotheses(leaf, right, dtype, config, others):
        if hypothesis.exact and same is damage.close:
            continue
        score = float(same(hypothesis.rows(indices), sample).mean())
        needed = 0.05 if hypothesis.kind == "none" else EXPLAINED
        if score >= needed and (best is None or score > best[1]):
            best = hypothesis, score
        if score == 1.0 and hypothesis.kind != "none":
            break
    return best


def _hypotheses(leaf, right, dtype, config: ModelConfig, others) -> Iterator[Hypothesis]:
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
        if {leaf, other} == {"layers/w_gate", "layers/w_up"}:
            gate, up = (right, array) if leaf == "layers/w_gate" else (array, right)
            for mistake in fused_orders(leaf, rows):
                yield Hypothesis(
                    mistake.kind,
                    mistake.what,
                    mistake.fix,
                    lambda i, gate=gate, up=up, order=mistake.order: np.where(
                        (order[i] < rows)[:, None], gate[order[i] % rows], up[order[i] % rows]
                    ),
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
    yield from misread(right, dtype)


def misread(right: np.ndarray, dtype: np.dtype) -> Iterator[Hypothesis]:
    """The right bits, taken for something else; B stores the result as `dtype`."""

    def swapped(i: np.ndarray) -> np.ndarray:
        bits = right[i].astype(dtype).view(f"u{dtype.itemsize}")
        return bits.byteswap().view(dtype)

    yield Hypothesis(
        "byte_order",
        "has the bytes of every number in reverse order",
        "read it as little-endian, as safetensors and every file here is",
        swapped,
        exact=True,
    )
    half, brain = np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)
    for stored, read in ((half, brain), (brain, half)):
        yield Hypothesis(
            "misread",
            f"holds the bits of {stored.name}, read as {read.name}",
            f"read it as {stored.name} and write it again",
            lambda i, stored=stored, read=read: right[i].astype(stored).view(read).astype(dtype),
            exact=True,
        )


def _transposed(right: np.ndarray, rows: np.ndarray) -> np.ndarray:
    flat = rows[:, None] * right.shape[1] + np.arange(right.shape[1])
    return right[flat % right.shape[0], flat // right.shape[0]]


def by_values(leaf, layer, right, found, config) -> Iterator[Finding]:
    """Findings when no hypothesis about places fits: values changed, or an unknown order."""
    indices = sample_rows(len(right))
    x, y = (array[indices].astype(np.float64) for array in (right, found))
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(finite, x, 0), np.where(finite, y, 0)
    factor = float((x * y).sum() / max((x * x).sum(), 1e-300))
    name = leaf.rpartition("/")[2]
    if factor and damage.close(factor * x, y).mean() > EXPLAINED:
        say, fix = _factor(factor, config)
        yield Finding("scaled", leaf, layer, f"is {say} times what it should be", fix)
    elif "norm" in name and damage.close(x + np.median(y - x), y).mean() > EXPLAINED:
        shift = float(np.median(y - x))
        what = f"is {shift:+.6g} off in every element"
        yield Finding("offset", leaf, layer, what, "some models store a norm's scale minus one")
    elif (text := _unknown_order(right, found)) is not None:
        yield Finding("reordered", leaf, layer, text, "put it back in order")
    else:
        yield _unexplained(leaf, layer, x, y, float(finite.mean()))


def _unexplained(leaf, layer, x: np.ndarray, y: np.ndarray, finite: float) -> Finding:
    """A difference with no reason: how large it is, and what such a one usually is.

    Args:
      leaf, layer: which.
      x, y: of A and of B, float64 samples, 0 where either is not finite.
      finite: share of elements that are finite in both.
    """
    with np.errstate(over="ignore"):
        size = float(np.sqrt((x * x).mean())) or 1.0
        error = float(np.sqrt(((x - y) ** 2).mean())) / size
        dx, dy = x - x.mean(), y - y.mean()
        across = float(np.sqrt((dx * dx).sum()) * np.sqrt((dy * dy).sum()))
        alike = float((dx * dy).sum()) / max(across, 1e-300)
    if error > _ABSURD or finite < EXPLAINED:
        fix = (
            "unrelated numbers, and no weights: memory that was never written, or read with the "
            "wrong dtype or byte order; write it again from its source"
        )
    elif abs(alike) < _UNRELATED:
        fix = (
            "unrelated numbers: another model's, random (never loaded), or in an order that is not "
            "among those tried; write it again from its source"
        )
    else:
        fix = "compare how the two were made; a trained model differs from its start like this"
    # A power of ten, so that layers that differ alike are one sentence.
    about = 10.0 ** round(math.log10(min(max(error, 1e-9), 1e300)))
    what = f"differs, and no hypothesis explains it (difference / size: about {about:g})"
    return Finding("unexplained", leaf, layer, what, fix)


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
        if (hx[order] == hy).mean() >= EXPLAINED and len(np.unique(order)) > len(order) * 0.9:
            return describe(order, things)
    return None


def _hashes(array: np.ndarray) -> np.ndarray:
    """One random number for each row's bits."""
    factors = np.random.default_rng(0).integers(1, 2**63, array.shape[1], dtype=np.uint64) | 1
    bits = f"u{array.dtype.itemsize}"
    step = max(1, STEP_ELEMENTS // array.shape[1])
    parts = [
        (np.ascontiguousarray(array[i : i + step]).view(bits) * factors).sum(axis=1)
        for i in range(0, len(array), step)
    ]
    return np.concatenate(parts)


def matrix(array: np.ndarray) -> np.ndarray:
    """A vector as a matrix of one column."""
    return array[:, None] if array.ndim == 1 else array


def sample_rows(rows: int) -> np.ndarray:
    """Some rows: all of a small tensor or of a vector, evenly spread neighbours of a large one."""
    if rows <= 2 * _SAMPLED_ROWS:
        return np.arange(rows)
    starts = np.linspace(0, rows - 4, _SAMPLED_ROWS // 4).astype(int)
    return np.unique(starts[:, None] + np.arange(4))


def equal(x: np.ndarray, y: np.ndarray) -> bool:
    """The same dtype and bits."""
    if x.dtype != y.dtype:
        return False
    step = max(1, STEP_ELEMENTS // x.shape[1])
    return all(
        damage.same_bits(x[i : i + step], y[i : i + step]).all() for i in range(0, len(x), step)
    )
