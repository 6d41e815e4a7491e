"""How often each named region of the TPU kernels runs: what turns a schedule into cycles.

The compiler's final schedule of a kernel says how many cycles each region takes once; which
regions run how often is known from the block list. tools/bench_kernels.py multiplies the two.
Region names are the kernels' `jax.named_scope`s.
"""

from collections.abc import Mapping

import numpy as np

from lemur_kernels.attention import steps as st
from lemur_kernels.attention.tpu_forward import KINDS, Tiling, kinds_of


def region_counts(
    kind_BQN, needed_BQN, options, tiling: Tiling, *, heads: int, backward: bool, chains: int = 1
) -> Mapping[str, int]:
    """Executions of each region in one call, all grid steps, heads and cores together.

    Args:
      kind_BQN, needed_BQN: what steps.kinds gives for the rows.
      heads: H; chains: of the backward kernel.
    """
    kind, needed = np.asarray(kind_BQN), np.asarray(needed_BQN)
    blocks_of_heads = heads // tiling.heads
    loops = tiling.heads // tiling.unroll
    counts = {"grid": int(needed.sum()) * blocks_of_heads}
    for code in kinds_of(options):
        steps = int((needed & (kind == code)).sum()) * blocks_of_heads
        counts[KINDS[code]] = steps * loops
    empty = int((needed & (kind == st.EMPTY)).sum()) * blocks_of_heads
    blocks = kind.shape[0] * kind.shape[1] * blocks_of_heads
    counts |= {"empty": empty * tiling.heads, "finish": (blocks - empty) * tiling.heads}
    if backward:
        counts["start"] = blocks * tiling.heads
        counts["open"] = counts["close"] = kind.shape[0] * chains * kind.shape[2]
    elif not options.packed:
        counts["start"] = blocks
    return counts
