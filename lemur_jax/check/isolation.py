"""Whether a document of a packed row is computed as if it were alone in it.

All documents of odd number get other tokens: the logits of the even ones, and the gradient of
their loss, must not move by one bit; then the other way round. Documents are told apart by what is
written in the rows (`evidence.begins`), not by the segment ids that are to be judged.

Dimension key: N rows, T tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.check.certificate import Result, judge
from lemur_jax.check.evidence import Evidence, begins
from lemur_jax.check.subject import Subject, Weights
from lemur_jax.data.pipeline import Batch
from lemur_jax.train import step as training


def check_isolation(evidence: Evidence, subject: Subject, weights: Weights) -> Result:
    """Perturbs documents and looks at the others."""
    documents = _documents(evidence)
    most = documents.max(axis=1)
    rows = np.argsort(-most, kind="stable")[: subject.ways]
    rows = rows[most[rows] > 1]
    if not len(rows):
        return judge(
            "isolation",
            f"none of the run's first {len(documents)} rows holds two documents: not judged",
            {},
            [],
            noted=True,
        )
    rows = np.resize(rows, subject.ways)  # the same rows again, until every device has one
    batch = Batch(*(field[rows] for field in evidence.batch))
    documents = documents[rows]
    figures = {"rows": len(set(rows.tolist())), "documents": int(documents.max(axis=1).sum())}
    moved_logits = moved_gradient = 0.0
    stirred = np.inf
    probe = _Probe(subject, weights)
    for kept in (0, 1):
        found = probe.perturb(batch, documents, kept)
        moved_logits, moved_gradient = max(moved_logits, found[0]), max(moved_gradient, found[1])
        stirred = min(stirred, found[2])
    figures |= {
        "largest change of another document's logits": moved_logits,
        "largest change of the gradient of another document's loss": moved_gradient,
        "least change of the perturbed documents' logits": stirred,
    }
    return _judge(evidence, figures, moved_logits, moved_gradient, stirred)


def _judge(
    evidence: Evidence, figures: dict, moved_logits: float, moved_gradient: float, stirred: float
) -> Result:
    moved = max(moved_logits, moved_gradient)
    if evidence.mixed_on_purpose:
        summary = "documents of a row see each other, as packing='lemur_compat' intends"
        fixes = [] if moved else ["packing='lemur_compat' should mix documents, but they are apart"]
        return judge("isolation", summary, figures, fixes, noted=True)
    fixes = []
    if moved or not np.isfinite(moved):
        fixes.append(
            f"perturbing a document moved another one's logits by {moved_logits:g} and its "
            f"gradient by {moved_gradient:g}; both must be 0. If `masks` failed too, the segment "
            "ids are wrong: build the data set again. Else the attention leaks: try "
            "ModelConfig.attention='reference' and report it"
        )
    if not stirred:
        fixes.append("other tokens did not change the logits of their own document: nothing works")
    summary = (
        f"{figures['documents']} documents in {figures['rows']} rows: perturbing one moves the "
        f"others' logits by {moved_logits:g} and gradients by {moved_gradient:g}"
    )
    return judge("isolation", summary, figures, fixes)


def _documents(evidence: Evidence) -> np.ndarray:
    """[N,T]: 1, 2, ... in each row; 0: padding."""
    real = evidence.batch.segment_ids != 0
    segments = evidence.batch.segment_ids
    starts = begins(evidence)
    if evidence.rounds_begin_with_bos:
        starts = np.zeros_like(starts)
    starts[:, 1:] |= (segments[:, 1:] != segments[:, :-1]) & real[:, 1:]
    starts[:, 0] = real[:, 0]
    return np.where(real, np.cumsum(starts, axis=1), 0)


class _Probe:
    """The run's own forward and backward pass, compiled once."""

    def __init__(self, subject: Subject, weights: Weights):
        self._subject, self._weights = subject, weights
        config = subject.config
        explicit = config.explicit_gradients
        differentiate = training.explicit_gradients if explicit else training.gradients

        def observe(weights: Weights, batch: Batch):
            one = jax.tree.map(lambda x: x[0], batch)
            logits, _ = weights.adapted(one.inputs, one.positions, one.segment_ids)
            gradient = differentiate(weights.model, batch, config.loss, weights.adapters)[1]
            return logits[..., : config.model.vocab_size], gradient

        def compare(before, after, kept, others):
            apart = jnp.abs(before[0] - after[0]).max(-1)
            leaves = zip(*map(jax.tree.leaves, (before[1], after[1])))
            gradient = jnp.stack([jnp.abs(x - y).max() for x, y in leaves]).max()
            return (apart * kept).max(), gradient, (apart * others).max()

        self._observe, self._compare = jax.jit(observe), jax.jit(compare)

    def perturb(self, batch: Batch, documents: np.ndarray, kept: int) -> tuple[float, float, float]:
        """(change of the kept documents' logits, of the gradient of their loss, of the others'
        logits), largest absolute values; kept are those whose number is `kept` modulo 2."""
        subject, vocab = self._subject, self._subject.config.model.vocab_size
        is_kept = (documents % 2 == kept) & (documents > 0)
        others = (documents > 0) & ~is_kept
        # A document that is not learnt gets a small weight: its gradient must not move either.
        weights = np.where(is_kept, np.maximum(batch.weights, 1e-3), 0).astype(np.float32)
        stirred = np.where(others, (batch.inputs + 1 + vocab // 3) % vocab, batch.inputs)
        before = batch._replace(weights=weights)
        after = before._replace(inputs=stirred.astype(np.int32))
        flags = [
            subject.place(batch._replace(weights=which.astype(np.float32)), 1).weights[0]
            for which in (is_kept, others)
        ]
        with jax.set_mesh(subject.mesh):
            seen = [self._observe(self._weights, subject.place(x, 1)) for x in (before, after)]
            return tuple(float(x) for x in self._compare(*seen, *flags))
