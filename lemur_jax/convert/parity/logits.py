"""KL and the largest difference of logits, by blocks of vocabulary rows: no row of logits is held.

KL(p || q) = sum p (a - b) - log Z_a + log Z_b with logits a, b; the sums are kept relative to the
largest logit so far, as an online softmax does.
"""

from dataclasses import dataclass

import numpy as np

from lemur_jax.convert.parity.ours import Ours, exact
from lemur_jax.convert.parity.reference import product
from lemur_jax.convert.parity.weights import Weights

_BLOCK_ELEMENTS = 2**25  # of the head at a time: 128 MiB of float32


@dataclass(frozen=True)
class Divergence:
    """Two sets of logits.

    Attributes:
      max_abs: largest absolute difference of a logit.
      kl: nats, mean over tokens, of the second distribution from the first.
      kl_max: nats, the worst token.
      same_choice: share of tokens with the same most likely next token.
    """

    max_abs: float
    kl: float
    kl_max: float
    same_choice: float


class OnlineKL:
    """Adds blocks of two sets of logits [..., V_block]; `result` when all have come."""

    def __init__(self, shape: tuple[int, ...]):
        self.top = np.full((2, *shape), -np.inf)
        self.best = np.full((2, *shape), -1)
        self.z = np.zeros((2, *shape))
        self.cross = np.zeros(shape)
        self.max_abs = 0.0
        self.seen = 0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """The logits of the next rows of the vocabulary, of both models."""
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        self.max_abs = max_abs(self.max_abs, a - b)
        for side, logits in enumerate((a, b)):
            block_top = logits.max(axis=-1)
            top = np.maximum(self.top[side], block_top)
            shrink = np.exp(self.top[side] - top)
            weights = np.exp(logits - top[..., None])
            self.z[side] = self.z[side] * shrink + weights.sum(axis=-1)
            if side == 0:
                self.cross = self.cross * shrink + (weights * (a - b)).sum(axis=-1)
            better = block_top > self.top[side]
            self.best[side] = np.where(better, logits.argmax(axis=-1) + self.seen, self.best[side])
            self.top[side] = top
        self.seen += a.shape[-1]

    def result(self) -> Divergence:
        log_z = np.log(self.z) + self.top
        kl = self.cross / self.z[0] - log_z[0] + log_z[1]
        kl = np.where(kl < 0, 0, kl)  # rounding of a KL of nothing; NaN stays
        same = float((self.best[0] == self.best[1]).mean())
        return Divergence(self.max_abs, float(kl.mean()), float(kl.max()), same)


@dataclass(frozen=True)
class AtTheHead:
    """What one pass over both heads gives.

    Attributes:
      layers: for each layer, A's logits of the reference's and of our output.
      final: A by the reference and B by our code.
      rounding: A by the reference in float64 and in float32.
      head_error, head_rounding, head_largest: of the product with the head alone: the largest error
        of ours, that of the reference in float32, and the largest logit.
    """

    layers: list[Divergence]
    final: Divergence
    rounding: Divergence
    head_error: float
    head_rounding: float
    head_largest: float


def divergences(a: Weights, b: Weights, ours: Ours, states, same, own, near, as_b) -> AtTheHead:
    """One pass over both heads.

    Args:
      a, b: the models.
      ours: our code, for B's logits.
      states: for each layer the normed outputs [2,B,T,E], float32, of reference and ours.
      same: the reference's final normed states [B,T,E], float64.
      own: B's final normed states by our code [B,T,E].
      near: A's final normed states by the reference in float32 [B,T,E].
      as_b: (weight, leaf) -> A's weight as B could store it.
    """
    vocabulary = min(a.config.vocab_size, b.config.vocab_size)
    step = max(1, _BLOCK_ELEMENTS // a.config.embed)
    layered = [OnlineKL(part.shape[1:-1]) for part in states]
    final, rounding = OnlineKL(same.shape[:-1]), OnlineKL(same.shape[:-1])
    head_error = head_rounding = largest = 0.0
    for start in range(0, vocabulary, step):
        stop = min(start + step, vocabulary)
        rows_a, rows_b = (model.rows("head", start, stop) for model in (a, b))
        wide = rows_a.astype(np.float32)  # once for all layers
        for total, part in zip(layered, states):
            total.add(*product(part, wide))
        del wide
        truth = product(same, rows_a)
        both = np.concatenate([same, near]).astype(np.float32)
        narrow, narrow_own = np.split(product(both, as_b(rows_a, "head")), 2)
        with exact():
            mine, free = np.split(ours.logits(np.concatenate([same, own]), rows_b), 2)
        final.add(truth, free)
        rounding.add(truth, narrow_own)
        head_error = max_abs(head_error, mine - truth)
        head_rounding = max_abs(head_rounding, narrow - truth)
        largest = max_abs(largest, truth)
    results = [total.result() for total in layered]
    return AtTheHead(results, final.result(), rounding.result(), head_error, head_rounding, largest)


def max_abs(before: float, values: np.ndarray) -> float:
    """The larger of `before` and the largest absolute value; NaN wins."""
    return float(np.maximum(before, np.abs(values).max()))
