"""What a kernel under measurement is: a case asks, a builder answers."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

from tpu_compiler.topology import chip_named


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel call on one row, batch 1 per device.

    Attributes:
      chip: a name in topology.CHIPS.
      kernel: "attention", "decode_attention" or "cross_entropy".
      direction: "forward", "backward" or "forward+backward".
      seq: tokens of the row (T and S). heads, kv_heads, head_dim: H, K, D.
      dtype: "bfloat16" or "float32".
      mask: "causal" (one document), "segments" (packed, causal inside), "window", or "apart": the
        program of a row of `seq` with the counts of its documents in rows of their own, one call.
      window: visible keys of a query when mask is "window", itself included.
      lengths: lengths of the row's documents, in order, from position 0; the rest is padding.
      blocks: block sizes by name, or () for the kernel's own choice.
      sizes: further sizes by name (vocabulary of cross_entropy, page of decode_attention).
    """

    chip: str = "v4"
    kernel: str = "attention"
    direction: str = "forward"
    seq: int = 4096
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    mask: str = "segments"
    window: int = 0
    lengths: tuple[int, ...] = (4096,)
    blocks: tuple[tuple[str, int | None], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()

    def key(self) -> str:
        """A short stable name for files and resumption."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def case_of(fields: dict) -> Case:
    """The case that `dataclasses.asdict` and JSON made these fields of."""
    fields = dict(fields)
    fields["lengths"] = tuple(fields.get("lengths", ()))
    for name in ("blocks", "sizes"):
        fields[name] = tuple(tuple(pair) for pair in fields.get(name, ()))
    return Case(**fields)


@dataclasses.dataclass
class Built:
    """What to compile for a case, and how often each region of its kernels runs.

    Attributes:
      fn: called as fn(*args) under jax.jit, for one device.
      args: (shape, dtype) pairs or pytrees of jax.ShapeDtypeStruct.
      trips: of a loop around kernels whose trip count the compiler does not state.
      counts: {kernel name: {region: times}}; see cost.attribute. A kernel name is what
        `pl.pallas_call(name=...)` gave, without the ".1" that XLA appends.
    """

    fn: Callable
    args: Sequence
    counts: dict[str, dict[str, float]]
    compiler_options: dict | None = None
    trips: int | None = None


def segment_ids(case: Case):
    """int32 [seq]: 1, 2, ... per document, 0 for padding."""
    import numpy as np

    if sum(case.lengths) > case.seq:
        raise ValueError(f"lengths sum to {sum(case.lengths)}, more than seq={case.seq}")
    ids = np.zeros(case.seq, np.int32)
    start = 0
    for i, length in enumerate(case.lengths):
        ids[start : start + length] = i + 1
        start += length
    return ids


def floor_cycles(case: Case) -> float:
    """Matrix-unit floor, cycles per core.

    Cross-entropy: its products at peak, one forward and two for the gradients. Attention: the row
    passes of the 512 x 512 blocks that hold a visible pair, the ones on the diagonal as trapezoids
    in strips of mxu_size.

    Scores contract over head_dim, so a pass fills head_dim of the unit's rows (rounded up);
    P V can be written with P stationary, and then fills it. Backward is 2.5 forwards (7 products
    against 2).
    """
    import numpy as np

    chip = chip_named(case.chip)
    if case.kernel == "cross_entropy":
        sizes = dict(case.sizes)
        products = {"forward": 1, "backward": 2, "forward+backward": 3}[case.direction]
        flops = 2.0 * products * case.seq * sizes["embed"] * sizes["vocab"]
        return flops / chip.flops_per_cycle / chip.cores
    ids, block, mxu_size = segment_ids(case), min(512, case.seq), chip.mxu_size
    visible = 0.0
    strip = min(mxu_size, block)
    diagonal = (block + strip) / (2 * block)
    for i in range(0, case.seq, block):
        for j in range(0, i + block, block):
            q, k = ids[i : i + block], ids[j : j + block]
            near = not case.window or i - (j + block - 1) < case.window
            if near and np.intersect1d(q[q > 0], k[k > 0]).size:
                visible += (diagonal if i == j else 1.0) * block * block
    scores = -(-case.head_dim // mxu_size) * mxu_size
    passes = visible * (scores + case.head_dim) / mxu_size**2 * case.heads
    times = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}[case.direction]
    return times * passes / (chip.mxus * chip.mxu_rows_per_cycle) / chip.cores
