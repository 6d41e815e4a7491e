"""Whether a batch in micro-batches has the loss and gradient of the same batch in one."""

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.check.certificate import Result, judge
from lemur_jax.check.evidence import Evidence
from lemur_jax.check.subject import Subject, Weights
from lemur_jax.data.pipeline import Batch
from lemur_jax.model import param
from lemur_jax.train import step as training

# Sums in another order: of float32 products, or of products rounded to 16 bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
MOST_MICRO_BATCHES = 4


def check_accumulation(evidence: Evidence, subject: Subject, weights: Weights) -> Result:
    """The run's own gradient function on M micro-batches and on one, with weights so unequal that a
    mean of the micro-batches' means is far off: the first keeps an eighth of its tokens."""
    config = subject.config
    micro = min(max(2, config.micro_batches), MOST_MICRO_BATCHES)
    wanted = micro * subject.ways
    learnt = np.flatnonzero(evidence.batch.weights.sum(axis=1) > 0)
    if not len(learnt):
        return judge("accumulation", "no row has a learnt token", {}, ["see masks"])
    batch = Batch(*(field[np.resize(learnt, wanted)] for field in evidence.batch))
    kept = batch.weights.copy()
    length = kept.shape[1]
    kept[: subject.ways] *= np.arange(length) % 8 == 0
    batch = batch._replace(weights=kept)
    shares = [float(part.sum()) for part in np.split(kept, micro)]
    explicit = config.explicit_gradients
    differentiate = training.explicit_gradients if explicit else training.gradients

    def run(weights: Weights, batch: Batch):
        sums, grads = differentiate(weights.model, batch, config.loss, weights.adapters)
        tokens = jnp.maximum(sums.tokens, 1.0)
        return sums.nll / tokens, jax.tree.map(lambda g: g / tokens, grads)

    with jax.set_mesh(subject.mesh):
        loss, grads = jax.jit(run)(weights, subject.place(batch, 1))
        parts_loss, parts_grads = jax.jit(run)(weights, subject.place(batch, micro))
        distances = jax.jit(_distances)(grads, parts_grads)
    far = {name: float(value) for name, value in distances.items()}
    worst = max(far, key=far.get)
    of_loss = abs(float(parts_loss) - float(loss)) / max(abs(float(loss)), 1e-12)
    tolerance = TOLERANCE[config.model.dtype]
    figures = {
        "micro-batches": micro,
        "learnt tokens of each": shares,
        "loss, one batch": float(loss),
        "loss, micro-batches": float(parts_loss),
        "relative difference of the loss": of_loss,
        "largest relative difference of a gradient": far[worst],
        "of": worst,
        "tolerance": tolerance,
    }
    fixes = []
    if not (of_loss <= tolerance and far[worst] <= tolerance):
        fixes.append(
            f"{micro} micro-batches of unequal weights differ from one batch by {of_loss:.3g} in "
            f"the loss and {far[worst]:.3g} in the gradient of {worst} (tolerance {tolerance}): "
            "sums must be added up and divided once; use TrainConfig.micro_batches=1 and report it"
        )
    summary = (
        f"{micro} micro-batches with {', '.join(f'{s:g}' for s in shares)} learnt tokens and one "
        f"batch of all: loss within {of_loss:.2g}, gradients within {far[worst]:.2g} "
        f"(tolerance {tolerance})"
    )
    return judge("accumulation", summary, figures, fixes)


def _distances(a, b) -> dict[str, jax.Array]:
    """|a - b| / |a| of each leaf, by name."""
    flat, other = param.flatten(a), param.flatten(b)
    return {
        name: jnp.linalg.norm((x - other[name]).ravel().astype(jnp.float32))
        / jnp.maximum(jnp.linalg.norm(x.ravel().astype(jnp.float32)), 1e-12)
        for name, x in flat.items()
    }
