"""The mistakes that make one tensor of another, one at a time and two at once.

A mistake of a conversion is a rule about places or bits, so each hypothesis computes, from A, what
B's rows should then be; nothing is fitted to B.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.parity.finding import short_name
from lemur_jax.convert.parity.orders import Order, fused_orders, head_orders

Rows = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Hypothesis:
    """A mistake: `rows(indices)` gives, from A, what B's rows should then be."""

    kind: str
    what: str
    fix: str
    rows: Rows
    exact: bool = False  # the numbers may be so small that all are close to each other


NONE = "none"  # the kind of no mistake at all


def single(
    leaf: str,
    right: np.ndarray,
    dtype: np.dtype,
    config: ModelConfig,
    others: Iterable[tuple[str, np.ndarray]],
) -> Iterator[Hypothesis]:
    """No mistake, and every mistake alone.

    Args:
      leaf: which tensor.
      right: A's, [rows, columns].
      dtype: of B's.
      config: A's.
      others: A's other tensors of this shape in the same layer.
    """
    yield Hypothesis(NONE, "", "", lambda i: right[i])
    for order in wrong_orders(leaf, config):
        yield _ordered(leaf, order, lambda i: right[i])
    for other, array in others:
        yield _other(leaf, other, lambda i, array=array: array[i])
        if {leaf, other} == {"layers/w_gate", "layers/w_up"}:
            gate, up = (right, array) if leaf == "layers/w_gate" else (array, right)
            yield from _fused(leaf, gate, up)
    if min(right.shape) > 1:
        yield _transposed(right)
    yield from misread(right, dtype)


def pairs(
    leaf: str,
    right: np.ndarray,
    config: ModelConfig,
    others: Iterable[tuple[str, np.ndarray]],
) -> Iterator[Hypothesis]:
    """Two mistakes at once: another tensor's numbers, transposed ones, heads in a wrong order."""
    orders = wrong_orders(leaf, config)
    if min(right.shape) > 1:
        yield from _with_transposition(leaf, right, orders)
    for other, array in others:
        exchanged = _other(leaf, other, lambda i, array=array: array[i])
        if min(right.shape) > 1:
            yield _both(exchanged, _transposed(array))
        for order in orders:
            yield _both(exchanged, _ordered(leaf, order, exchanged.rows))


def _with_transposition(leaf: str, right: np.ndarray, orders: list[Order]) -> Iterator[Hypothesis]:
    transposed = _transposed(right)
    for order in orders:
        ordered = _ordered(leaf, order, lambda i: right[i])
        places = (None, order.order) if heads_in_columns(leaf) else (order.order, None)
        yield _both(ordered, _transposed(right, *places))
        after = _ordered(leaf, order, transposed.rows)
        yield _both(transposed, after)


def _both(first: Hypothesis, second: Hypothesis) -> Hypothesis:
    """Two mistakes, of which `second` computes what both make."""
    return dataclasses.replace(
        second,
        kind="two_mistakes",
        what=f"{first.what}, and then {second.what}",
        fix=f"undo the second, then the first: {second.fix}; {first.fix}",
        exact=first.exact or second.exact,
    )


def heads_in_columns(leaf: str) -> bool:
    """Whether heads are columns of a tensor in HF's layout, [out, in]."""
    return leaf == "layers/wo"


def wrong_orders(leaf: str, config: ModelConfig) -> list[Order]:
    """The wrong orders of heads and their halves; none for a tensor without heads."""
    if leaf.rpartition("/")[2] not in ("wq", "wk", "wv", "wo", "bq", "bk", "bv"):
        return []
    return head_orders(leaf, config)


def _ordered(leaf: str, order: Order, rows: Rows) -> Hypothesis:
    if heads_in_columns(leaf):
        what = order.what + ", in its columns"
        return Hypothesis(order.kind, what, order.fix, lambda i: rows(i)[:, order.order])
    return Hypothesis(order.kind, order.what, order.fix, lambda i: rows(order.order[i]))


def _other(leaf: str, other: str, rows: Rows) -> Hypothesis:
    what = f"holds the weights of {short_name(other)}"
    return Hypothesis(
        "exchanged", what, f"exchange {short_name(leaf)} and {short_name(other)}", rows
    )


def _fused(leaf: str, gate: np.ndarray, up: np.ndarray) -> Iterator[Hypothesis]:
    count = len(gate)
    for mistake in fused_orders(leaf, count):

        def rows(i: np.ndarray, order=mistake.order) -> np.ndarray:
            of_gate = (order[i] < count)[:, None]
            return np.where(of_gate, gate[order[i] % count], up[order[i] % count])

        yield Hypothesis(mistake.kind, mistake.what, mistake.fix, rows)


def _transposed(
    right: np.ndarray, row_order: np.ndarray | None = None, column_order: np.ndarray | None = None
) -> Hypothesis:
    """B's numbers, read in order, are those of A's transpose; of A with its rows or columns in
    another order, if one is given."""
    height, width = right.shape

    def rows(i: np.ndarray) -> np.ndarray:
        flat = i[:, None] * width + np.arange(width)
        row, column = flat % height, flat // height
        row = row if row_order is None else row_order[row]
        return right[row, column if column_order is None else column_order[column]]

    under = "" if height == width else f" (under the shape [{height}, {width}])"
    return Hypothesis("transposed", f"is transposed{under}", "transpose it", rows)


def misread(right: np.ndarray, dtype: np.dtype) -> Iterator[Hypothesis]:
    """The right bits, taken for something else; B stores the result as `dtype`."""

    def swapped(i: np.ndarray) -> np.ndarray:
        bits = right[i].astype(dtype).view(f"u{dtype.itemsize}")
        return bits.byteswap().view(dtype)

    yield Hypothesis(
        "byte_order",
        "has the bytes of every number in reverse order",
        "read it as little-endian, as safetensors and every file here is",
        swapped,
        exact=True,
    )
    half, brain = np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)
    for stored, read in ((half, brain), (brain, half)):
        yield Hypothesis(
            "misread",
            f"holds the bits of {stored.name}, read as {read.name}",
            f"read it as {stored.name} and write it again",
            lambda i, stored=stored, read=read: right[i].astype(stored).view(read).astype(dtype),
            exact=True,
        )
