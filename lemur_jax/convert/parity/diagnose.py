"""B's weights against A's: equal, or which mistake turned one into the other.

Every tensor that differs is tried against each hypothesis on a sample of its rows; the one that
agrees best is then compared in full, so that a second fault inside the same tensor is found too.
Two mistakes at once are tried where no single one explains a tensor. Nothing is guessed: a tensor
that no hypothesis explains is reported as that.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.parity import damage
from lemur_jax.convert.parity.damage import EXPLAINED
from lemur_jax.convert.parity.finding import Finding
from lemur_jax.convert.parity.hypotheses import (
    NONE,
    Hypothesis,
    heads_in_columns,
    pairs,
    single,
    wrong_orders,
)
from lemur_jax.convert.parity.orders import describe
from lemur_jax.convert.parity.places import Sketches
from lemur_jax.convert.parity.weights import Weights

STEP_ELEMENTS = 2**23  # of a tensor compared at a time
_SAMPLED_ROWS = 96
_ABSURD = 1e3  # difference / size: no training comes that far
_UNRELATED = 0.3  # correlation
_DAMAGE = ("bit_flip", "zeros", "not_finite", "damaged")


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
    best = _best(lambda: single(leaf, right, found.dtype, config, others()), indices, sample)
    if best is None:
        finding = by_values(leaf, layer, right, found, config)
        if finding.kind != "unexplained":
            yield finding
            return
        best = _best(lambda: pairs(leaf, right, config, others()), indices, sample)
    if best is None:
        mistakes = single(leaf, right, found.dtype, config, others())
        yield _mistaken_and_scaled(leaf, layer, mistakes, indices, sample, config) or finding
        return
    if best.kind != NONE:
        yield Finding(best.kind, leaf, layer, best.what, best.fix)
    step = max(1, STEP_ELEMENTS // right.shape[1])
    harm = damage.assess(
        len(right),
        lambda start, stop: best.rows(np.arange(start, stop)),
        lambda start, stop: found[start:stop],
        step,
    )
    yield from damage.findings(harm, leaf, layer, (right.dtype, found.dtype))


def _best(
    hypotheses: Callable[[], Iterable[Hypothesis]], indices: np.ndarray, sample: np.ndarray
) -> Hypothesis | None:
    """The hypothesis that agrees best with the sample, if any explains it; to the bit, or else up
    to rounding."""
    for same in (damage.agree, damage.close):
        best, best_score = None, 0.0
        for hypothesis in hypotheses():
            if hypothesis.exact and same is damage.close:
                continue
            score = float(same(hypothesis.rows(indices), sample).mean())
            needed = 0.05 if hypothesis.kind == NONE else EXPLAINED
            if score >= needed and score > best_score:
                best, best_score = hypothesis, score
            if score == 1.0 and hypothesis.kind != NONE:
                break
        if best is not None:
            return best
    return None


def _mistaken_and_scaled(
    leaf, layer, mistakes: Iterable[Hypothesis], indices, sample, config
) -> Finding | None:
    """A mistake about places, and a factor on top of it."""
    for mistake in mistakes:
        if mistake.kind == NONE or mistake.exact:
            continue
        factor = _scale(mistake.rows(indices).astype(np.float64), sample.astype(np.float64))
        if factor is not None:
            say, fix = _factor(factor, config)
            what = f"{mistake.what}, and then is {say} times what it should be"
            fix = f"undo the second, then the first: {fix}; {mistake.fix}"
            return Finding("two_mistakes", leaf, layer, what, fix)
    return None


def _scale(x: np.ndarray, y: np.ndarray) -> float | None:
    """The factor that makes y of x, float64, if one does; what is not finite in either is left."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(finite, x, 0), np.where(finite, y, 0)
    factor = float((x * y).sum() / max((x * x).sum(), 1e-300))
    return factor if factor and damage.close(factor * x, y).mean() > EXPLAINED else None


def by_values(leaf, layer, right, found, config) -> Finding:
    """What no hypothesis about places explains: values changed, or an unknown order."""
    indices = sample_rows(len(right))
    x, y = (array[indices].astype(np.float64) for array in (right, found))
    if (factor := _scale(x, y)) is not None:
        say, fix = _factor(factor, config)
        return Finding("scaled", leaf, layer, f"is {say} times what it should be", fix)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(finite, x, 0), np.where(finite, y, 0)
    if "norm" in leaf.rpartition("/")[2]:
        shift = float(np.median(y - x))
        if damage.close(x + shift, y).mean() > EXPLAINED:
            what, fix = f"is {shift:+.6g} off in every element", "some models store scale minus one"
            return Finding("offset", leaf, layer, what, fix)
    if (reordered := _reordered(leaf, layer, right, found, config)) is not None:
        return reordered
    return _unexplained(leaf, layer, x, y, float(finite.mean()))


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
            "unrelated numbers: another model's, random (never loaded), or the right ones after "
            "mistakes that are not among those tried; write it again from its source"
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


def _reordered(leaf, layer, right: np.ndarray, found: np.ndarray, config) -> Finding | None:
    """If B has A's rows or columns in some order: two orders that are known, or that one."""
    if right.dtype != found.dtype:
        return None
    for things, x, y in (("rows", right, found), ("columns", right.T, found.T)):
        if len(x) < 2:
            continue
        hx, hy = _hashes(x), _hashes(y)
        by_hash = np.argsort(hx, kind="stable")
        places = np.searchsorted(hx[by_hash], hy)
        order = by_hash[np.minimum(places, len(hx) - 1)]
        if (hx[order] == hy).mean() < EXPLAINED or len(np.unique(order)) <= len(order) * 0.9:
            continue
        known = (
            wrong_orders(leaf, config) if (things == "columns") == heads_in_columns(leaf) else []
        )
        for first, second in itertools.product(known, repeat=2):
            if np.array_equal(first.order[second.order], order):
                what = f"{first.what}, and then {second.what}"
                fix = f"undo the second, then the first: {second.fix}; {first.fix}"
                return Finding("two_mistakes", leaf, layer, what, fix)
        return Finding("reordered", leaf, layer, describe(order, things), "put it back in order")
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
