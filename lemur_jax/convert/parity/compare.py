"""Layer by layer: the reference with A's weights and our code with B's, on the same hidden states.

Each operation of ours gets the reference's inputs, so one fault shows in one operation and a second
fault elsewhere is not hidden behind it. The budget is reasoned, not tuned: the reference in float32
(and with A's weights rounded to the precision of B's numbers, if that is less) misses the reference
in float64 by some amount; ours may miss it by SLACK times as much. That holds for an operation, a
whole layer and the final logits, each with its own float32 run.

A layer's KL is that of the logits which A's norm and head would make of the two outputs. The final
logits are those of two separate runs: A through the reference, B through our code.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.parity.logits import Divergence, divergences
from lemur_jax.convert.parity.operations import explain
from lemur_jax.convert.parity.ours import Ours, exact
from lemur_jax.convert.parity.reference import GRAPH, Reference
from lemur_jax.convert.parity.transformers_layer import TransformersLayer
from lemur_jax.convert.parity.weights import Weights

# Two correct float32 evaluations differ in the order of their sums. Measured on healthy models the
# ratio stays below 4 (docs/parity.md); every fault that matters is above 100.
SLACK = 16.0
_FLOOR = 2.0**-20  # of the largest value: 8 roundings of float32, where the reference has none


@dataclass(frozen=True)
class OpError:
    """How far one operation of ours is from the reference.

    Attributes:
      name: of the operation, in `reference.GRAPH`, or "embedding", "final_norm", "head".
      max_abs: largest absolute difference.
      largest: largest absolute value of the reference.
      budget: what rounding explains.
    """

    name: str
    max_abs: float
    largest: float
    budget: float

    @property
    def diverges(self) -> bool:
        return not self.max_abs <= self.budget  # NaN diverges


@dataclass
class LayerResult:
    """A layer's operations and its whole.

    Attributes:
      layer: its number; -1 before the first, L after the last.
      ops: in order of computation.
      whole: the layer as the model runs it, on the same hidden states.
      logits: the divergence at the head, of the two outputs.
      theirs: transformers' layer on the same hidden states; None when it was not asked for.
      notes: what explains an operation that diverges though the weights agree.
    """

    layer: int
    ops: list[OpError]
    whole: OpError | None = None
    logits: Divergence | None = None
    theirs: OpError | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def first_diverging(self) -> str | None:
        """The first operation whose error rounding does not explain."""
        if (op := next((op for op in self.ops if op.diverges), None)) is not None:
            return op.name
        if self.theirs is not None and self.theirs.diverges:
            return "transformers"
        return "residual" if self.whole is not None and self.whole.diverges else None


@dataclass
class Comparison:
    """Two models.

    Attributes:
      layers: in order, with the edges: -1 is the embedding, L the final norm and the head.
      final: the final logits of A and B, each run for itself.
      rounding: the same of A in float64 and A in float32: what no implementation can avoid.
    """

    layers: list[LayerResult]
    final: Divergence
    rounding: Divergence

    @property
    def first_not_finite(self) -> tuple[int, str] | None:
        """(layer, operation) in which the reference itself meets NaN or infinity."""
        for result in self.layers:
            for op in result.ops:
                if not np.isfinite(op.largest):
                    return result.layer, op.name
        return None

    @property
    def first_diverging(self) -> tuple[int, str] | None:
        """(layer, operation) of the first divergence, None if all is rounding."""
        for result in self.layers:
            if (name := result.first_diverging) is not None:
                return result.layer, name
        if not self.final.max_abs <= SLACK * self.rounding.max_abs + _FLOOR:
            return self.layers[-1].layer, "logits"
        return None


def sample_positions(config: ModelConfig, tokens: int) -> np.ndarray:
    """Positions [2, T]: dense at the start and at the far end, spread by powers between.

    The first row ends at the last position of the model (at least 4095), the second twice as far
    out, where length extensions and rounding of angles show.
    """
    last = max(config.max_positions, 4096)
    return np.stack([_spread(end, tokens) for end in (last, 2 * last)])


def _spread(end: int, tokens: int) -> np.ndarray:
    near = far = tokens // 4
    between = np.geomspace(near + 1, end - far - 1, tokens - near - far).astype(int)
    chosen = {*range(near), *between.tolist(), *range(end - far, end)}
    spare = (position for position in range(end) if position not in chosen)
    while len(chosen) < tokens:  # rounding made two of them one
        chosen.add(next(spare))
    return np.array(sorted(chosen), np.int64)


def sample_tokens(vocabulary: int, shape: tuple[int, int]) -> np.ndarray:
    """Token ids over the whole vocabulary, its first and last row among them."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape)
    tokens[:, 0], tokens[:, 1] = 0, vocabulary - 1
    return tokens


def compare(
    a: Weights,
    b: Weights,
    *,
    tokens: int = 16,
    each_layer: Callable[[int], None] = lambda layer: None,
    transformers: bool = False,
) -> Comparison:
    """Runs both models in step.

    Args:
      a: trusted; run by the reference.
      b: run by our code. Must have a's shapes, but for the rows of the vocabulary.
      tokens: of each of the two rows.
      each_layer: called before each layer with its number.
      transformers: also run A's layers through transformers.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # B may hold inf: that is to be reported
        return _compare(a, b, tokens, each_layer, transformers)


def _compare(a, b, tokens, each_layer, transformers) -> Comparison:
    positions_BT = sample_positions(a.config, tokens)
    run = _Run(a, b, positions_BT)
    if transformers:
        run.theirs = TransformersLayer(a, positions_BT)
    layers = [
        run.embed(sample_tokens(min(m.config.vocab_size for m in (a, b)), positions_BT.shape))
    ]
    outputs = []  # of the reference and of ours on the same input, normed: [2,B,T,E]
    for layer in range(a.config.layers):
        each_layer(layer)
        result, pair = run.layer(layer)
        layers.append(result)
        outputs.append(pair)
    return run.finish(outputs, layers)


class _Run:
    """What goes from layer to layer: the hidden states of the two models.

    Attributes:
      x: of the reference, float64 [B,T,E].
      near: of the reference in float32, run for itself.
      own: of B in our code, run for itself.
    """

    def __init__(self, a: Weights, b: Weights, positions_BT):
        self.a, self.b, self.norm = a, b, a.tensor("norm")
        self.truth = Reference(a.config, positions_BT, np.float64)
        # Three runs at once: on the truth's inputs of each operation, of the layer, of the model.
        self.rounded = Reference(a.config, np.concatenate([positions_BT] * 3), np.float32)
        with exact():
            self.ours = Ours(b.config, positions_BT)
        self.theirs: TransformersLayer | None = None

    def _round(self, weight, leaf, layer=None):
        """A's weight as B could store it: another dtype is no fault, nor is one in between."""
        if weight is None:
            return None
        b = self.b
        return _as_stored(weight, b.dtype(leaf) if b is self.a else b.precision(leaf, layer))

    def embed(self, tokens_BT) -> LayerResult:
        """The hidden states in front of the first layer, of both."""
        rows = self.a.take("table", tokens_BT)
        self.x, self.own = (m.take("table", tokens_BT).astype(np.float64) for m in (self.a, self.b))
        self.near = self._round(rows, "table").astype(np.float64)
        return LayerResult(-1, [_error("embedding", self.own, self.x, self.near)])

    def layer(self, layer: int):
        """One layer of both, and what A's head will read of the two outputs on the same input."""
        result = LayerResult(layer, [])
        values = {"x": self.x}
        runs = {"x": np.stack([self.x, self.near])}  # float32: of the layer, of the model
        with exact():
            self.ours.load(self.b.layer(layer))
            for name in GRAPH:
                self._operation(name, layer, values, runs, result)
            mine = self.ours.layer(np.concatenate([self.x, self.own]).astype(np.float32))
            self.ours.drop()
        mine, self.own = np.split(mine, 2)
        result.whole = _error("layer", mine, values["out"], runs["out"][0])
        if self.theirs is not None:
            out = self.theirs(self.x, layer)
            result.theirs = _error("transformers", out, values["out"], runs["out"][0])
        self.x, self.near = values["out"], runs["out"][1]
        return result, self._at_the_head(np.stack([self.x, mine]))

    def _operation(self, name: str, layer: int, values, runs, result: LayerResult) -> None:
        """One operation, four times: truth, float32 thrice, ours. Adds to the last three."""
        wanted = GRAPH[name]
        inputs = [values[i] for i in wanted]
        weights = [
            self.a.tensor(leaf, layer) if leaf in self.a.rules else None
            for leaf in self.truth.leaves(name)
        ]
        values[name] = self.truth.compute(name, inputs, *weights)
        weights = [self._round(w, leaf, layer) for w, leaf in zip(weights, self.truth.leaves(name))]
        stacked = [np.concatenate([values[i].astype(np.float32)[None], runs[i]]) for i in wanted]
        flat = [array.reshape(-1, *array.shape[2:]) for array in stacked]
        near = self.rounded.compute(name, flat, *weights)
        near = near.reshape(3, -1, *near.shape[1:])
        runs[name] = near[1:]
        mine = self.ours.compute(name, inputs)
        result.ops.append(_error(name, mine, values[name], near[0]))
        if result.ops[-1].diverges:
            note = explain(self.truth, name, inputs, mine, *weights)
            result.notes += [f"{name}: {note}"] if note else []

    def _at_the_head(self, outputs_2BTE) -> np.ndarray:
        """What A's final norm makes of a layer's outputs [2,B,T,E]: float32, kept to the end."""
        return self.truth.norm(outputs_2BTE.astype(np.float64), self.norm).astype(np.float32)

    def finish(self, outputs_L2BTE, layers) -> Comparison:
        """The final norm, and everything that needs the head."""
        a, b = self.a, self.b
        norm, norm_32 = self.norm, self._round(self.norm, "norm")
        same = self.truth.norm(self.x, norm)
        near, near_own = (
            self.rounded.norm(x.astype(np.float32), norm_32) for x in (self.x, self.near)
        )
        with exact():
            mine, own = (self.ours.final_norm(x, b.tensor("norm")) for x in (self.x, self.own))
        found = divergences(a, b, self.ours, outputs_L2BTE, same, own, near_own, self._round)
        for result, divergence in zip(layers[1:], found.layers, strict=True):
            result.logits = divergence
        budget = SLACK * found.head_rounding + _FLOOR * found.head_largest
        head = OpError("head", found.head_error, found.head_largest, budget)
        last = LayerResult(a.config.layers, [_error("final_norm", mine, same, near), head])
        return Comparison([*layers, last], found.final, found.rounding)


def _as_stored(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in another dtype, unless that is wider and holds it as it is."""
    if dtype == array.dtype or dtype.itemsize > array.dtype.itemsize:
        return array
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def _max_abs(x, y) -> float:
    return float(np.abs(np.asarray(x, np.float64) - y).max())


def _error(name: str, mine, truth, near) -> OpError:
    largest = float(np.abs(truth).max())
    rounding = _max_abs(near, truth)
    return OpError(name, _max_abs(mine, truth), largest, SLACK * rounding + _FLOOR * largest)
