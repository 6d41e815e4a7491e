"""The wrong orders in which rows and columns of a projection are found, by name.

A rotary pair is (i, i + D/2) of a head in HF's layout ("halves") and (2i, 2i + 1) in Meta's
("interleaved"). Converting q and k between the two is a permutation of rows inside each head, and
needs the right number of heads: that of q for q, that of kv for k.

An order p says which of the right rows stands at each place: wrong[i] = right[p[i]].
"""

from dataclasses import dataclass

import numpy as np

from lemur_jax.config import ModelConfig


@dataclass(frozen=True)
class Order:
    """Attributes: kind and what, as of a Finding; fix; order, int64 [rows]."""

    kind: str
    what: str
    fix: str
    order: np.ndarray


def to_halves(rows: int, heads: int) -> np.ndarray:
    """halves = interleaved[order], for `heads` heads."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def head_orders(leaf: str, config: ModelConfig) -> list[Order]:
    """Known mistakes with the output features of q, k and v, and the input features of o."""
    heads = config.kv_heads if leaf in ("layers/wk", "layers/wv") else config.heads
    heads = config.kv_heads if leaf in ("layers/bk", "layers/bv") else heads
    rows, groups = heads * config.head_dim, config.heads // config.kv_heads
    halves = to_halves(rows, heads)
    interleaved = np.argsort(halves)
    found = [
        Order(
            "interleaved",
            "is interleaved (Meta layout)",
            f"permute its rows to halves, with {heads} heads of {config.head_dim}",
            interleaved,
        ),
        Order(
            "permuted_twice",
            "was permuted from Meta's layout to HF's twice",
            f"undo one of the two permutations, with {heads} heads of {config.head_dim}",
            halves,
        ),
    ]
    for wrong in dict.fromkeys((config.heads, config.kv_heads, groups, 1)):
        if wrong == heads or rows % (2 * wrong) or rows == 2 * wrong:
            continue
        by_wrong = to_halves(rows, wrong)
        again = f"permute it from the Meta layout again, with {heads} heads"
        found += [
            Order(
                "wrong_heads",
                f"was permuted from Meta's layout with {wrong} heads in place of {heads}",
                again,
                interleaved[by_wrong],
            ),
            Order(
                "wrong_heads",
                f"was un-permuted to Meta's layout with {wrong} heads in place of {heads}",
                again,
                np.argsort(by_wrong),
            ),
            Order(
                "wrong_heads",
                f"was un-permuted with {wrong} heads in place of {heads} and permuted again",
                again,
                np.argsort(by_wrong)[halves],
            ),
        ]
    if heads == config.heads and groups > 1 and config.kv_heads > 1:
        tiled = _spread(np.arange(heads).reshape(config.kv_heads, groups).T.reshape(-1), config)
        say = f"query head h belongs to kv head h // {groups}"
        found += [
            Order(
                "tiled_heads",
                f"has its heads in tile order (head h for kv head h % {config.kv_heads})",
                f"reorder its heads: {say}",
                tiled,
            ),
            Order(
                "tiled_heads",
                "has its heads reordered from tile to repeat order though they were in it",
                f"undo the reordering: {say}",
                np.argsort(tiled),
            ),
        ]
    return _distinct(found)


def fused_orders(leaf: str, rows: int) -> list[Order]:
    """Mistakes with gate and up as one matrix; the order is one of its rows [gate; up].

    Args:
      leaf: layers/w_gate or layers/w_up.
      rows: of one of the two.
    """
    up = leaf == "layers/w_up"
    halves = np.arange(rows) + rows * up  # this leaf as a half of a fused matrix
    fix = "split the fused matrix of gate_proj and up_proj again, with its rows as they are in it"
    return [
        Order(
            "fused_rows",
            "has rows of gate_proj and up_proj in turn: a half of a matrix in which they alternate",
            fix,
            halves % 2 * rows + halves // 2,
        ),
        Order(
            "fused_rows",
            "has every second row of gate_proj and then of up_proj: split as if they alternated",
            fix,
            2 * np.arange(rows) + up,
        ),
    ]


def _spread(heads: np.ndarray, config: ModelConfig) -> np.ndarray:
    return (heads[:, None] * config.head_dim + np.arange(config.head_dim)).reshape(-1)


def _distinct(orders: list[Order]) -> list[Order]:
    """The first of equal ones, and none that changes nothing."""
    seen = {np.arange(len(orders[0].order)).tobytes()}
    kept = []
    for order in orders:
        if (key := order.order.tobytes()) not in seen:
            seen.add(key)
            kept.append(order)
    return kept


def describe(order: np.ndarray, things: str) -> str:
    """A sentence about an order that no mistake above has.

    Args:
      order: wrong[i] = right[order[i]].
      things: "rows" or "columns".
    """
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    size = int(np.gcd.reduce([*breaks.tolist(), len(order)]))
    blocks = (order[::size] // size).tolist()
    if 1 < len(blocks) <= 64:
        return (
            f"has its {len(blocks)} blocks of {size} {things} in the order "
            f"{', '.join(map(str, blocks))} (shards merged in the wrong order?)"
        )
    shown = ", ".join(map(str, order[:6].tolist()))
    return f"has its {things} in another order: the first ones are {shown}, ..."
