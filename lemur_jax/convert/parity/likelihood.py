"""How likely a text is to a model under each candidate, in one pass over its weights."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lemur_jax.convert.parity.candidates import Candidate
from lemur_jax.convert.parity.reference import GRAPH, Reference, product
from lemur_jax.convert.parity.weights import Weights

_BLOCK_ELEMENTS = 2**25  # of the head at a time


def losses(
    weights: Weights,
    tokens_T: np.ndarray,
    candidates: Sequence[Candidate],
    each_layer: Callable[[int], None] = lambda layer: None,
) -> np.ndarray:
    """Nats of each token but the first, [candidates, T - 1], float32 products.

    Args:
      weights: the model.
      tokens_T: ids of one text.
      candidates: what to try; each is computed for itself, the weights are read once.
      each_layer: called before each layer.
    """
    positions_BT = np.arange(len(tokens_T))[None]
    with np.errstate(over="ignore", invalid="ignore"):
        models = [
            Reference(
                dataclasses.replace(weights.config, **dict(candidate.config)),
                positions_BT,
                np.float32,
                candidate.variant,
            )
            for candidate in candidates
        ]
        shifts = {candidate.table_shift for candidate in candidates}
        entering = {shift: _lookup(weights, tokens_T, shift) for shift in shifts}
        states = [entering[candidate.table_shift] for candidate in candidates]
        for layer in range(weights.config.layers):
            each_layer(layer)
            states = _layer(weights, layer, models, states)
        norm = weights.tensor("norm")
        states = [model.norm(x, norm) for model, x in zip(models, states)]
        return _head(weights, tokens_T, candidates, np.concatenate(states))


def _layer(weights, layer, models, states) -> list[np.ndarray]:
    values = [{"x": x} for x in states]
    steps = [name for name in GRAPH if name != "scores"]
    for step, name in enumerate(steps):
        tensors = []
        for leaf in models[0].leaves(name):
            known = leaf in weights.rules
            # Widened once for all candidates.
            tensors.append(weights.tensor(leaf, layer).astype(np.float32) if known else None)
        for model, mine in zip(models, values):
            inputs = [mine[i] for i in model.inputs(name)]
            mine[name] = model.compute(name, inputs, *tensors)
            needed = {"out"}.union(*(model.inputs(later) for later in steps[step + 1 :]))
            for done in set(mine) - needed:
                del mine[done]  # the results of all candidates together are the largest thing here
    return [mine["out"] for mine in values]


def _lookup(weights: Weights, tokens_T, shift: int) -> np.ndarray:
    rows = np.clip(tokens_T + shift, 0, weights.config.vocab_size - 1)
    return weights.take("table", rows).astype(np.float32)[None]


def _head(weights, tokens_T, candidates, states_CTE) -> np.ndarray:
    vocabulary = weights.config.vocab_size
    leaf = "table" if weights.config.tie_embeddings else "head"
    shifts = [c.table_shift if leaf == "table" else c.head_shift for c in candidates]
    wanted = np.stack([np.clip(tokens_T[1:] + shift, 0, vocabulary - 1) for shift in shifts])
    x = states_CTE[:, :-1]
    top = np.full(wanted.shape, -np.inf)
    total, right = np.zeros(wanted.shape), np.zeros(wanted.shape)
    step = max(1, _BLOCK_ELEMENTS // weights.config.embed)
    for start in range(0, vocabulary, step):
        stop = min(start + step, vocabulary)
        rows = weights.rows(leaf, start, stop).astype(np.float32)
        for c in range(len(candidates)):  # one at a time: logits of all would not fit
            logits = product(x[c], rows).astype(np.float64)
            higher = np.maximum(top[c], logits.max(axis=-1))
            sums = np.exp(logits - higher[:, None]).sum(axis=-1)
            total[c] = total[c] * np.exp(top[c] - higher) + sums
            top[c] = higher
            here = (wanted[c] >= start) & (wanted[c] < stop)
            right[c, here] = logits[here, wanted[c, here] - start]
    nats = np.log(total) + top - right
    return np.where(np.isfinite(nats), nats, 1e9)  # a NaN explains nothing
