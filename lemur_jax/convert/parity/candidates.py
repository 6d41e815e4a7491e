"""Everything that may be wrong with a model as a whole, each with what would put it right.

A candidate is applied to results, not to weights: permuted rows of a weight are permuted features
of its product. So one pass over the weights tries all of them.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.parity.finding import short_name
from lemur_jax.convert.parity.orders import head_orders
from lemur_jax.convert.parity.reference import Variant

_THETAS = (1e4, 5e5, 1e6)
_EPS = (1e-5, 1e-6)


@dataclass(frozen=True)
class Candidate:
    """A mistake and its cure.

    Attributes:
      kind, subject, what, fix: of the finding, if this is it.
      config: fields of ModelConfig to replace.
      variant: how to compute.
      table_shift, head_shift: row i of the table (the head) is found in row i + shift.
    """

    kind: str
    subject: str
    what: str
    fix: str = ""
    config: tuple[tuple[str, object], ...] = ()
    variant: Variant = dataclasses.field(default_factory=Variant)
    table_shift: int = 0
    head_shift: int = 0

    def __add__(self, other: "Candidate") -> "Candidate":
        """This cure, and another on top of it; it goes by the name of the other."""
        a, b = self.variant, other.variant
        orders = dict(a.orders)
        for name, order in b.orders:
            orders[name] = tuple(np.array(orders[name])[list(order)]) if name in orders else order
        variant = Variant(
            scale=a.scale * b.scale,
            tiled=a.tiled or b.tiled,
            interleaved=a.interleaved or b.interleaved,
            exchanged=tuple(set(a.exchanged) ^ set(b.exchanged)),
            orders=tuple(orders.items()),
            transposed=a.transposed ^ b.transposed,
        )
        return dataclasses.replace(
            other,
            config=tuple((dict(self.config) | dict(other.config)).items()),
            variant=variant,
            table_shift=self.table_shift + other.table_shift,
            head_shift=self.head_shift + other.head_shift,
        )


AS_IT_IS = Candidate("none", "", "is as it should be")


def candidates(config: ModelConfig) -> list[Candidate]:
    """All that can be told apart for this config."""
    return [
        *_orders(config),
        *_places(config),
        *_settings(config),
        *_rows(config),
    ]


def _orders(config) -> Iterator[Candidate]:
    by_leaf = {}
    for leaf, name in (("wq", "q"), ("wk", "k"), ("wv", "v"), ("wo", "attended")):
        found = head_orders(f"layers/{leaf}", config)
        if leaf in ("wv", "wo"):  # nobody rotates those; their heads may still be in another order
            found = [order for order in found if order.kind == "tiled_heads"]
        by_leaf[leaf] = [
            Candidate(
                order.kind,
                f"layers/{leaf}",
                order.what,
                order.fix,
                variant=Variant(orders=((name, tuple(np.argsort(order.order).tolist())),)),
            )
            for order in found
        ]
        yield from by_leaf[leaf]
    for first, second in (("wq", "wk"), ("wq", "wo")):
        for a in by_leaf[first]:
            for b in by_leaf[second]:
                if a.kind == b.kind and a.kind != "wrong_heads":
                    what = a.what.replace("is ", "are ").replace("was ", "were ")
                    both = f"{a.subject}+{b.subject}"
                    yield dataclasses.replace(a + b, subject=both, what=what)


def _places(config) -> Iterator[Candidate]:
    for pair, leaves in ((("gate", "up"), "w_gate+layers/w_up"), (("k", "v"), "wk+layers/wv")):
        variant = Variant(exchanged=(pair,))
        yield Candidate(
            "swapped", f"layers/{leaves}", "are swapped", "exchange them", variant=variant
        )
    inner = config.heads * config.head_dim
    square = {
        "wq": inner == config.embed,
        "wo": inner == config.embed,
        "wk": config.kv_heads * config.head_dim == config.embed,
        "wv": config.kv_heads * config.head_dim == config.embed,
        "w_gate": config.mlp == config.embed,
        "w_up": config.mlp == config.embed,
        "w_down": config.mlp == config.embed,
    }
    for name in (name for name, is_square in square.items() if is_square):
        leaf = f"layers/{name}"
        variant = Variant(transposed=frozenset([leaf]))
        yield Candidate("transposed", leaf, "is transposed", "transpose it", variant=variant)


def _settings(config) -> Iterator[Candidate]:
    for eps in _EPS:
        if eps != config.norm_eps:
            yield Candidate(
                "norm_eps",
                "rms_norm_eps",
                f"is {config.norm_eps:g}, it should be {eps:g}",
                f"set rms_norm_eps to {eps:g} in config.json",
                config=(("norm_eps", eps),),
            )
    for theta in _THETAS:
        if theta != config.rope.theta:
            yield Candidate(
                "rope_theta",
                "rope_theta",
                f"is {config.rope.theta:g}, it should be {theta:g}",
                f"set rope_theta to {theta:g} in config.json (inside rope_parameters, if there)",
                config=(("rope", dataclasses.replace(config.rope, theta=theta)),),
            )
    if config.rope.kind != "default":
        plain = dataclasses.replace(config.rope, kind="default", factor=1.0)
        what = f"is {config.rope.kind!r}, it should be none"
        fix = "set rope_scaling to null in config.json (rope_type of rope_parameters: default)"
        yield Candidate("rope_scaling", "rope_scaling", what, fix, config=(("rope", plain),))
    root = math.sqrt(config.head_dim)
    for scale, name in ((root, "1/sqrt(head_dim)"), (1 / root, "sqrt(head_dim)")):
        yield Candidate(
            "scaled",
            "layers/wq",
            f"(or k_proj) has {name} folded into it",
            "divide it out: the scale belongs to the attention",
            variant=Variant(scale=scale),
        )


def _rows(config) -> Iterator[Candidate]:
    for shift in (1, -1):
        belongs = f"its row i holds what belongs in row i {'-+'[shift < 0]} 1"
        what = f"is off by one row: {belongs}"
        fix = "put its rows back in their places"
        one = Candidate("shifted_rows", "table", what, fix, table_shift=shift)
        yield one
        if not config.tie_embeddings:
            head = dataclasses.replace(one, subject="head", table_shift=0, head_shift=shift)
            yield head
            both = f"are off by one row: {belongs}".replace("its row", "their row")
            yield dataclasses.replace(one + head, subject="table+head", what=both)


def name(candidate: Candidate) -> str:
    """For a list of losses."""
    return f"{short_name(candidate.subject)} {candidate.what}".strip()
