"""B holds A's key and value heads several times over: once for each query head, or part of them.

Llama's query head h reads kv head h // G, so an expanded k holds each head G times in a row
("repeat"). Written one after another and all again ("tile") every group but the first reads the
wrong head.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.parity import configs, damage
from lemur_jax.convert.parity.damage import EXPLAINED
from lemur_jax.convert.parity.finding import Finding
from lemur_jax.convert.parity.weights import Weights

_LEAVES = ("layers/wk", "layers/wv", "layers/bk", "layers/bv")


def is_expansion(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether B has A's sizes but for a multiple of its kv heads."""
    alike = configs.same_structure(a, dataclasses.replace(b, kv_heads=a.kv_heads))
    return alike and b.kv_heads > a.kv_heads and b.kv_heads % a.kv_heads == 0


def diagnose_expansion(a: Weights, b: Weights) -> Iterator[Finding]:
    """Findings about the order of the expanded heads, in each layer."""
    few, many = a.config.kv_heads, b.config.kv_heads
    orders = {"repeat": np.arange(many) // (many // few), "tile": np.arange(many) % few}
    for layer in range(a.config.layers):
        for leaf in (leaf for leaf in _LEAVES if leaf in a.rules):
            right = a.tensor(leaf, layer).reshape(few, -1)
            found = b.tensor(leaf, layer).reshape(many, -1)
            fits = [
                name
                for name, order in orders.items()
                if damage.agree(right[order], found).mean() > EXPLAINED
            ]
            yield _finding(leaf, layer, fits, few, many)


def _finding(leaf: str, layer: int, fits: list[str], few: int, many: int) -> Finding:
    if "repeat" in fits:
        what = f"is expanded from {few} to {many} heads, each repeated in place: the same model"
        return Finding("expanded_heads", leaf, layer, what, fault=False)
    again = f"keep the {few} heads, or repeat each of them {many // few} times in place"
    if "tile" in fits:
        what = f"is expanded from {few} to {many} heads in tile order, where Llama repeats each"
        return Finding("tiled_heads", leaf, layer, what, again)
    what = f"has {many} heads, which are not the {few} of the other model in any order tried"
    return Finding("unexplained", leaf, layer, what, again)
