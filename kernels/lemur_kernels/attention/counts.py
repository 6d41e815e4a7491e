"""How often each named region of the TPU kernels runs: what turns a schedule into cycles.

The compiler's final schedule of a kernel says how many cycles each region takes once; which
regions run how often is known from the block list. tools/bench_kernels.py multiplies the two.
Region names are the kernels' `jax.named_scope`s.
"""

from collections.abc import Mapping

import numpy as np

from lemur_kernels.attention import steps as st
from lemur_kernels.attention.tilings import Tiling
from lemur_kernels.attention.tpu_forward import KINDS, kinds_of


def region_counts(
    rows, options, tiling: Tiling, *, heads: int, backward: bool, chains: int = 1
) -> Mapping[str, int]:
    """Executions of each region in one pass, all grid steps, heads, cores and spans together.

    Args:
      rows: mask.Rows of whole blocks.
      heads: H; chains: of the backward kernel.
    """
    kind, needed = (np.asarray(x) for x in st.kinds(rows, options, tiling.block))
    spans = span_count(kind.shape[2], tiling) if backward else 1
    if spans > 1:
        kind, needed = _by_span(kind, needed, spans, tiling.span // tiling.block)
    blocks_of_heads = heads // tiling.heads
    loops = tiling.heads // tiling.unroll * blocks_of_heads
    square_loops = tiling.heads // tiling.square_unroll * blocks_of_heads
    counts = {"grid": int(needed.sum()) * blocks_of_heads}
    for code in kinds_of(options):
        counts[KINDS[code]] = int((needed & (kind == code)).sum()) * loops
    if options.packed:
        del counts["edge"]
        for code in (st.EDGE, st.CORNER):
            name, pairs = KINDS[code], needed & (kind == code)
            strips = int(pairs.sum()) * (tiling.block // tiling.square)
            squares = _squares(rows, options, tiling, pairs, below_diagonal=code == st.CORNER)
            counts[f"{name}_strip"] = strips * blocks_of_heads
            counts[f"{name}_strip/{name}_squares"] = squares * blocks_of_heads
            counts[f"{name}_strip/{name}_squares/{name}_square"] = squares * square_loops
            if code == st.CORNER:
                counts["corner_strip/corner"] = strips * square_loops
        counts.pop("corner")
    empty = int((needed & (kind == st.EMPTY)).sum()) * blocks_of_heads
    blocks = int(needed.any(-1).sum()) * blocks_of_heads
    counts |= {"empty": empty * tiling.heads, "finish": (blocks - empty) * tiling.heads}
    if backward:
        held = kind.shape[2] if spans == 1 else tiling.span // tiling.block
        counts["start"] = blocks * tiling.heads
        counts["open"] = counts["close"] = kind.shape[0] * chains * held
    elif not options.packed:
        counts["start"] = blocks
    return counts


def span_count(key_blocks: int, tiling: Tiling) -> int:
    """Passes of the backward kernel over the keys of a row."""
    return -(-key_blocks * tiling.block // tiling.span)


def _by_span(kind_BQN, needed_BQN, spans: int, blocks: int):
    """kind and needed [spans B, Q, N]: each span a row of its own, as tpu_backward lists them."""
    kinds, needs = [], []
    span_N = np.arange(kind_BQN.shape[2]) // blocks
    for i in range(spans):
        inside = needed_BQN & (kind_BQN != st.EMPTY) & (span_N == i)
        unseen = ~inside.any((1, 2))
        kind = np.where(unseen[:, None, None], st.EMPTY, kind_BQN)
        inside[unseen, 0, i * blocks] = True
        kinds.append(kind)
        needs.append(inside)
    return np.concatenate(kinds), np.concatenate(needs)


def _squares(rows, options, tiling: Tiling, pairs_BQN, *, below_diagonal: bool) -> int:
    """Squares with something visible in these pairs; the ones on the diagonal left out."""
    side = tiling.square
    first_BR = np.asarray(st.first_keys(rows, options.window))
    first_BR = first_BR.reshape(len(first_BR), -1, side).min(-1)  # of each strip of queries
    first_BR = np.tile(first_BR, (len(pairs_BQN) // len(first_BR), 1))  # spans
    per_block, count = tiling.block // side, 0
    for row, q, k in np.argwhere(pairs_BQN):
        for strip in range(per_block):
            start = max(first_BR[row, q * per_block + strip] - k * tiling.block, 0) // side
            count += max(0, (strip if below_diagonal else per_block) - start)
    return count
