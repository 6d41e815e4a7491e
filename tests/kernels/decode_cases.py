"""Inputs for the decode attention tests, and their answer in float64 numpy, key by key.

Axis key: B rows, N query tokens, H heads, K kv heads, D head dim, P pages, M pages in a row's
table, Z tokens in a page.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from lemur_kernels.decode_attention import decode_attention, join, quantize, split


class Case(NamedTuple):
    lengths: tuple[int, ...]
    new: tuple[int, ...] | None = None  # None: one query in every row
    N: int = 1
    H: int = 8
    K: int = 2
    D: int = 64
    Z: int = 16
    dtype: str = "float32"
    int8: bool = False
    window: int | None = None
    soft_cap: float | None = None
    sharpness: float = 1.0  # factor on the queries


# Ragged, free slots, ends inside and at the edge of a page; several blocks of 128 tokens and more.
CASES = {
    "grouped": Case((70, 0, 1, 16)),
    "blocks of 128": Case((300, 33, 140), H=8, K=8, D=256),
    "one kv head, three queries": Case((260, 7, 30), (3, 2, 0), N=3, K=1),
    "window": Case((200, 45, 20), D=128, window=20),
    "window, several queries": Case((300, 40), (5, 4), N=5, K=1, window=33),
    "soft cap, queries before the start": Case((66, 2), (4, 4), N=4, D=80, soft_cap=3.0),
    "bf16": Case((100, 31, 5), (2, 1, 2), N=2, dtype="bfloat16"),
    "int8": Case((70, 35), D=256, int8=True),
    "int8 bf16": Case((90, 14), (2, 2), N=2, K=4, D=96, dtype="bfloat16", int8=True),
    "large scores": Case((70, 31), sharpness=3e3),
    "long": Case((2100, 900), H=2, K=1, Z=64),
    "long int8": Case((1500, 2048), H=4, K=2, Z=16, int8=True),
    "prefill": Case((300, 80), (130, 80), N=130, H=4, K=2),
    "pages of 256": Case((700, 100), H=4, K=1, Z=256, int8=True),
}


class Problem(NamedTuple):
    """Arguments of decode_attention; the pages keep their float32 originals for the answer."""

    case: Case
    q: np.ndarray
    k: np.ndarray  # [P, K, Z, D]
    v: np.ndarray
    table: np.ndarray
    lengths: np.ndarray
    new: np.ndarray

    @property
    def pages(self) -> dict:
        """kv_pages_PKZC and, for int8, the scales."""
        dtype = self.case.dtype
        kv = join(jnp.asarray(self.k, dtype), jnp.asarray(self.v, dtype))
        if not self.case.int8:
            return {"kv_pages_PKZC": kv}
        kv, k_scales, v_scales = quantize(kv, self.case.D)
        return {"kv_pages_PKZC": kv, "k_scales_PK": k_scales, "v_scales_PK": v_scales}

    def run(self, implementation: str, **changes) -> np.ndarray:
        arguments = {
            "q_BNHD": jnp.asarray(self.q, self.case.dtype),
            **self.pages,
            "page_table_BM": jnp.asarray(self.table),
            "lengths_B": jnp.asarray(self.lengths),
            "new_tokens_B": jnp.asarray(self.new),
            "window": self.case.window,
            "soft_cap": self.case.soft_cap,
        } | changes
        names = ("window", "soft_cap", "scale", "interpret")
        static = {name: arguments.pop(name) for name in names if name in arguments}
        q, kv = arguments.pop("q_BNHD"), arguments.pop("kv_pages_PKZC")
        return np.asarray(jitted(implementation, tuple(static.items()))(q, kv, **arguments))


@functools.cache
def jitted(implementation: str, static: tuple):
    return jax.jit(
        functools.partial(decode_attention, implementation=implementation, **dict(static))
    )


def problem(case: Case, seed: int = 0, spare_pages: int = 3) -> Problem:
    """Random inputs; pages are scattered; unused table entries are far out of range."""
    random = np.random.default_rng([seed, *case.lengths, case.N, case.D])
    B, M = len(case.lengths), -(-max(case.lengths) // case.Z) + 1
    P = B * M + spare_pages
    lengths = np.array(case.lengths, np.int32)
    new = np.array(case.new or (1,) * B, np.int32)
    table = random.permutation(P)[: B * M].reshape(B, M).astype(np.int32)
    for b in range(B):
        used = -(-lengths[b] // case.Z)
        table[b, used:] = random.choice([2**30 + 7, -5, P], M - used)
        if case.window is not None:
            table[b, : max(0, int(lengths[b] - new[b]) - case.window + 1) // case.Z] = 2**30 + 7
    q = random.normal(size=(B, case.N, case.H, case.D)) * case.sharpness
    k, v = random.normal(size=(2, P, case.K, case.Z, case.D))
    return Problem(case, q, k, v, table, lengths, new)


def answer(p: Problem) -> np.ndarray:
    """float64, from the values as stored (after rounding to the case's dtype)."""
    case, pages = p.case, p.pages
    q = np.asarray(jnp.asarray(p.q, case.dtype), np.float64)
    k, v = (np.asarray(x, np.float64) for x in split(pages["kv_pages_PKZC"], case.D))
    if case.int8:
        k *= np.asarray(pages["k_scales_PK"], np.float64)[..., None, None]
        v *= np.asarray(pages["v_scales_PK"], np.float64)[..., None, None]
    out = np.zeros(q.shape)
    for b in range(len(p.lengths)):
        for i in range(p.new[b]):
            position = int(p.lengths[b] - p.new[b]) + i
            first = 0 if case.window is None else max(0, position - case.window + 1)
            keys = np.arange(first, position + 1)
            if not len(keys):
                continue
            ids, places = p.table[b, keys // case.Z], keys % case.Z
            for h in range(case.H):
                head = h // (case.H // case.K)
                scores = k[ids, head, places] @ q[b, i, h] * case.D**-0.5
                if case.soft_cap is not None:
                    scores = case.soft_cap * np.tanh(scores / case.soft_cap)
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights @ v[ids, head, places] / weights.sum()
    return out
