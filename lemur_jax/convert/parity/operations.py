"""The weights agree, an operation does not: which mistake of the code would compute that?"""

import dataclasses

import numpy as np

from lemur_jax.convert.parity.reference import Reference, Variant

_EPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-12)
_THETAS = (1e4, 5e5, 1e6, 5e6, 1e7)
_CLOSE = 1e-3  # of the largest value: float32 against float32, at long positions


def explain(truth: Reference, name: str, inputs, mine: np.ndarray, *weights) -> str | None:
    """A sentence about the mistake that gives `mine`, or None if none of those known here does.

    Args:
      truth: the reference of this model.
      name: of the operation.
      inputs: as the operation got them.
      mine: what our code made of them.
      weights: of the operation, HF's layout.
    """
    for say, config, variant in _mistakes(truth.config, name):
        wrong = Reference(config, truth.positions_BT, np.float64, variant)
        found = wrong.compute(name, inputs, *weights)
        if found.shape == mine.shape:
            gap = np.abs(found - mine).max()
            if gap <= _CLOSE * np.abs(found).max() and gap < _gap(
                truth, name, inputs, mine, weights
            ):
                return say
    return None


def _gap(truth, name, inputs, mine, weights) -> float:
    return 0.1 * float(np.abs(truth.compute(name, inputs, *weights) - mine).max())


def _mistakes(config, name):
    """(sentence, config, variant) of everything that can be wrong with this operation."""
    size = config.head_dim
    if name in ("attention_norm", "mlp_norm"):
        for eps in _EPS:
            if eps != config.norm_eps:
                yield f"eps is {eps:g}, not {config.norm_eps:g}", _with(config, norm_eps=eps), None
    if name in ("rope_q", "rope_k"):
        yield "neighbours are rotated, not halves", config, Variant(interleaved=True)
        plain = dataclasses.replace(config.rope, kind="default", factor=1.0)
        if config.rope.kind != "default":
            say = f"rope scaling {config.rope.kind!r} is ignored"
            yield say, _with(config, rope=plain), None
        for theta in _THETAS:
            if theta != config.rope.theta:
                rope = dataclasses.replace(config.rope, theta=theta)
                say = f"theta is {theta:g}, not {config.rope.theta:g}"
                yield say, _with(config, rope=rope), None
    if name in ("scores", "attended"):
        yield "the attention scale is missing", config, Variant(scale=size**0.5)
        yield "the attention scale is applied twice", config, Variant(scale=size**-0.5)
        say = "query head h reads kv head h % K, not h // G (tiled, not repeated)"
        yield say, config, Variant(tiled=True)
    if name == "activated":
        for kind in ("silu", "gelu", "gelu_pytorch_tanh", "relu"):
            if kind != config.activation:
                say = f"the activation is {kind}, not {config.activation}"
                yield say, _with(config, activation=kind), None


def _with(config, **fields):
    return dataclasses.replace(config, **fields)
