"""The Llama layer once more, in numpy, written from the papers and sharing no code with the model.

RMSNorm (arXiv:1910.07467), rotary positions as a product of complex numbers (arXiv:2104.09864),
grouped-query attention (arXiv:2305.13245), gated MLP (arXiv:2002.05202); weights in HF's layout.
float64 is the truth; the same operations in float32 show how much rounding alone changes.

Dimension key: B rows, T tokens of a row, E embed, H heads, K kv heads, D head dim, F mlp.
"""

import dataclasses
import math

import numpy as np

from lemur_jax.config import ModelConfig, RopeConfig

# Operation -> its inputs, in the order of computation. "x" enters the layer, "out" leaves it.
GRAPH = {
    "attention_norm": ("x",),
    "q": ("attention_norm",),
    "k": ("attention_norm",),
    "v": ("attention_norm",),
    "rope_q": ("q",),
    "rope_k": ("k",),
    "scores": ("rope_q", "rope_k"),
    "attended": ("rope_q", "rope_k", "v"),
    "o": ("attended",),
    "middle": ("x", "o"),
    "mlp_norm": ("middle",),
    "gate": ("mlp_norm",),
    "up": ("mlp_norm",),
    "activated": ("gate", "up"),
    "down": ("activated",),
    "out": ("middle", "down"),
}
# Operation -> weight and bias that it reads.
WEIGHTS = {
    "attention_norm": ("layers/attention_norm", None),
    "q": ("layers/wq", "layers/bq"),
    "k": ("layers/wk", "layers/bk"),
    "v": ("layers/wv", "layers/bv"),
    "o": ("layers/wo", "layers/bo"),
    "mlp_norm": ("layers/mlp_norm", None),
    "gate": ("layers/w_gate", "layers/b_gate"),
    "up": ("layers/w_up", "layers/b_up"),
    "down": ("layers/w_down", "layers/b_down"),
}
_BLOCK_ELEMENTS = 2**24  # of a weight that are widened at a time: 128 MiB of float64


@dataclasses.dataclass(frozen=True)
class Variant:
    """How someone's mistake computes; the defaults are Llama.

    Attributes:
      scale: of the scores before the softmax, in units of 1 / sqrt(D).
      tiled: query head h reads kv head h % K in place of h // G.
      interleaved: rotary turns neighbours (2i, 2i+1) in place of halves (i, i + D/2).
      exchanged: pairs of operations whose results have changed places, e.g. ("gate", "up").
      orders: (operation, order of its output features) pairs, e.g. ("k", permutation).
      transposed: leaves whose matrix is used the other way round.
    """

    scale: float = 1.0
    tiled: bool = False
    interleaved: bool = False
    exchanged: tuple[tuple[str, str], ...] = ()
    orders: tuple[tuple[str, tuple[int, ...]], ...] = ()
    transposed: frozenset[str] = frozenset()


class Reference:
    """Operations of one layer at given positions, in one floating-point type."""

    def __init__(
        self,
        config: ModelConfig,
        positions_BT: np.ndarray,
        dtype: type = np.float64,
        variant: Variant | None = None,
    ):
        self.config = config
        self.positions_BT = positions_BT
        self.dtype = np.dtype(dtype)
        self.variant = variant or Variant()
        self.orders = {name: np.array(order) for name, order in self.variant.orders}
        self.turn_BTd, self.rope_scale = _turns(config, positions_BT, self.dtype)
        self.visible_BTS = positions_BT[:, None, :] <= positions_BT[:, :, None]

    def compute(self, name: str, inputs: list[np.ndarray], weight=None, bias=None) -> np.ndarray:
        """One operation of GRAPH.

        Args:
          name: of the operation.
          inputs: what GRAPH says, cast to this reference's type here.
          weight, bias: of WEIGHTS, HF's layout, any dtype.
        """
        values = [np.asarray(value, self.dtype) for value in inputs]
        if name in ("attention_norm", "mlp_norm"):
            return self.norm(values[0], weight)
        if name in WEIGHTS:
            y = self._product(name, values[0], weight, bias)
        else:
            y = getattr(self, "_" + name)(*values)
        if name in self.orders:
            y = y[..., self.orders[name]]
        return self._heads(y) if name in ("q", "k", "v") else y

    def layer(self, x_BTE: np.ndarray, read) -> np.ndarray:
        """The whole layer; `read(leaf)` gives a weight, None for a bias that the model lacks."""
        values = {"x": np.asarray(x_BTE, self.dtype)}
        for name in GRAPH:
            if name != "scores":
                weights = [None if leaf is None else read(leaf) for leaf in self.leaves(name)]
                values[name] = self.compute(name, [values[i] for i in self.inputs(name)], *weights)
        return values["out"]

    def inputs(self, name: str) -> list[str]:
        """The operations whose results an operation takes."""
        pairs = self.variant.exchanged
        swaps = dict(pairs) | {b: a for a, b in pairs}
        return [swaps.get(i, i) for i in GRAPH[name]]

    def leaves(self, name: str) -> tuple[str | None, ...]:
        """Flat names of the weight and bias of an operation."""
        return WEIGHTS.get(name, ())

    def norm(self, x_BTE: np.ndarray, scale_E: np.ndarray) -> np.ndarray:
        """RMSNorm."""
        eps = self.dtype.type(self.config.norm_eps)
        mean_square = np.mean(np.square(x_BTE), axis=-1, keepdims=True)
        return x_BTE / np.sqrt(mean_square + eps) * scale_E.astype(self.dtype)

    def _product(self, name, x_BTI, weight_OI, bias_O):
        if WEIGHTS[name][0] in self.variant.transposed:
            weight_OI = weight_OI.T
        y = product(x_BTI, weight_OI)
        return y if bias_O is None else y + bias_O.astype(self.dtype)

    def _heads(self, y):
        return y.reshape(*y.shape[:2], -1, self.config.head_dim)

    def _rope_q(self, q_BTHD):
        if self.variant.interleaved:
            first, second = q_BTHD[..., 0::2], q_BTHD[..., 1::2]
        else:
            first, second = np.split(q_BTHD, 2, axis=-1)
        turned = (first + 1j * second) * self.turn_BTd[:, :, None, :]
        turned = turned.astype(np.complex64 if self.dtype == np.float32 else np.complex128)
        if self.variant.interleaved:
            result = np.stack([turned.real, turned.imag], axis=-1).reshape(q_BTHD.shape)
        else:
            result = np.concatenate([turned.real, turned.imag], axis=-1)
        return (result * self.dtype.type(self.rope_scale)).astype(self.dtype)

    _rope_k = _rope_q

    def _scores(self, q_BTHD, k_BTKD):
        """Softmaxed scores [B,H,T,S]: what each query takes of each token."""
        q_BHTD = np.ascontiguousarray(q_BTHD.swapaxes(1, 2))  # strided products are slow
        logits = q_BHTD @ self._repeat(k_BTKD).swapaxes(2, 3)
        logits = logits * self.dtype.type(self.variant.scale / math.sqrt(self.config.head_dim))
        logits = np.where(self.visible_BTS[:, None], logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def _attended(self, q_BTHD, k_BTKD, v_BTKD):
        attended_BHTD = self._scores(q_BTHD, k_BTKD) @ self._repeat(v_BTKD)
        return attended_BHTD.swapaxes(1, 2).reshape(*q_BTHD.shape[:2], -1)

    def _repeat(self, x_BTKD):
        """One key or value head for each query head: [B,H,T,D]."""
        groups = self.config.heads // self.config.kv_heads
        heads = np.arange(self.config.heads)
        chosen = heads % self.config.kv_heads if self.variant.tiled else heads // groups
        return np.ascontiguousarray(x_BTKD[:, :, chosen].swapaxes(1, 2))

    def _middle(self, x, o):
        return x + o

    def _activated(self, gate, up):
        return activate(self.config.activation, gate) * up

    def _out(self, middle, down):
        return middle + down


def product(x_BTI: np.ndarray, weight_OI: np.ndarray) -> np.ndarray:
    """x times the transposed weight in the type of x; the weight is widened block by block."""
    step = max(1, _BLOCK_ELEMENTS // weight_OI.shape[1])
    x = x_BTI.reshape(-1, x_BTI.shape[-1])
    y = np.empty((x.shape[0], weight_OI.shape[0]), x.dtype)
    for start in range(0, weight_OI.shape[0], step):
        y[:, start : start + step] = (
            x @ weight_OI[start : start + step].astype(x.dtype, copy=False).T
        )
    return y.reshape(*x_BTI.shape[:-1], -1)


def activate(kind: str, x: np.ndarray) -> np.ndarray:
    """The non-linearity of the gate."""
    if kind == "silu":
        return x / (1 + np.exp(-np.clip(x, -80, None)))  # below -80 it is 0 in float32 too
    if kind == "gelu":
        return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)).astype(x.dtype))
    if kind == "gelu_pytorch_tanh":
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return np.maximum(x, 0)


# ---------------------------------------------------------------------------------------------
# Rotary frequencies, from the papers
# ---------------------------------------------------------------------------------------------


def _turns(config: ModelConfig, positions_BT, dtype) -> tuple[np.ndarray, float]:
    """exp(i * angle) [B,T,D/2], and a factor on it (YaRN's)."""
    inverse, scale = inverse_frequencies(config.rope, config.head_dim, positions_BT)
    angles = positions_BT[..., None].astype(dtype) * inverse.astype(dtype)
    return np.cos(angles) + 1j * np.sin(angles), scale


def inverse_frequencies(rope: RopeConfig, head_dim: int, positions_BT) -> tuple[np.ndarray, float]:
    """Radians per position, float64 [D/2] or (dynamic) [B,1,D/2], and the factor on cos and sin."""
    pairs = np.arange(head_dim // 2) * 2 / head_dim
    inverse = np.exp(-math.log(rope.theta) * pairs)
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "dynamic":
        # "NTK-aware": the base grows with the length, so that the longest wave spans it.
        trained = rope.original_max_positions
        length = np.maximum(positions_BT.max(axis=1) + 1.0, trained)[:, None, None]
        grown = rope.factor * length / trained - (rope.factor - 1)
        theta = rope.theta * grown ** (head_dim / (head_dim - 2))
        return theta**-pairs, 1.0
    if rope.kind == "llama3":
        # Llama 3.1: by wavelength: short ones stay, long ones slow down, a ramp between.
        turns = rope.original_max_positions * inverse / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        kept = np.clip((turns - rope.low_freq_factor) / span, 0, 1)
        return kept * inverse + (1 - kept) * inverse / rope.factor, 1.0
    if rope.kind == "yarn":
        return _yarn(rope, inverse, head_dim)
    return inverse, 1.0


def _yarn(rope: RopeConfig, inverse, head_dim):
    """arXiv:2309.00071: a ramp over pairs, between those turning beta_fast and beta_slow times."""

    def pair(turns):
        wave = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    slowed = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    mixed = inverse * (1 - slowed) + inverse / rope.factor * slowed

    def temperature(weight):
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return mixed, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mixed, temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return mixed, temperature(1.0)
