"""How the TPU kernels cut their work: what they ask for, and first guesses for each chip.

tools/certify_kernels.py compiles the guesses of `proposals` for every chip and shape; what the
compiler accepted and predicted to be fastest is certified.csv, which shapes.py reads at run time.
"""

import dataclasses

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The cut of one kernel.

    block: tokens of a block of queries and of keys.
    heads: query heads of one grid step; a multiple or a divisor of G.
    unroll, square_unroll: heads whose code is interleaved in the body of the loop over heads, in
      blocks cut at compile time and in squares.
    strip: queries (and keys) of a tile of scores in a full block.
    trapezoid: queries of a tile on the diagonal; keys after its last query are not computed.
    square: queries and keys of a tile where documents begin or end: tiles with nothing visible
      are skipped at run time.
    depth, diagonal_depth: tiles whose scores are computed ahead of their use, in full blocks and
      in all others.
    vmem_bytes: limit on the kernel's fast memory; None is the compiler's own.
    split: backward, runs that share a kv head: 2 keeps both cores of a chip busy with one kv head.
    span: backward, keys of a row whose dk and dv are held in fast memory at a time, whole blocks.
    """

    block: int
    heads: int
    unroll: int
    square_unroll: int
    strip: int
    trapezoid: int
    square: int
    depth: int
    diagonal_depth: int
    vmem_bytes: int | None = None
    split: int = 1
    span: int = 4096


@dataclasses.dataclass(frozen=True)
class _Chip:
    """vmem: MiB that a kernel may ask for, None for the compiler's own 16. mxu: width of a matrix
    unit. cores: TensorCores that share one device's grid. forward, backward: tokens of a block."""

    vmem: int | None
    mxu: int
    cores: int
    forward: int
    backward: int


# Blocks: compiler-predicted cycles of 64/8 heads of 128, one document of 4096, see README.md.
CHIPS = {
    "v4": _Chip(None, 128, 2, 512, 512),
    "v5e": _Chip(100, 128, 1, 512, 512),
    "v5p": _Chip(48, 128, 2, 512, 512),
    "v6e": _Chip(100, 256, 1, 2048, 1024),
    "v7x": _Chip(48, 256, 1, 1024, 1024),
}


def kv_heads_per_step(heads: int, group: int) -> int:
    """kv heads of one grid step; a step of fewer query heads than a group still reads one."""
    return max(1, heads // group)


def proposals(
    chip: str, direction: str, itemsize: int, head_dim: int, heads: int, kv_heads: int, seq: int
) -> list[Tiling]:
    """Tilings worth compiling, the one expected to be fastest first.

    Args:
      chip: a name in CHIPS. direction: "forward" or "backward". itemsize: bytes of a number.
      seq: tokens of a row.
    """
    lanes = -(-head_dim // 128) * 128
    # What a narrow head takes is between its own width and all lanes, as the compiler lays it out.
    widths = dict.fromkeys((head_dim, lanes))
    found = [
        tiling
        for width in widths
        for tiling in _proposals(chip, direction, itemsize, width, heads, kv_heads, seq)
    ]
    return sorted(dict.fromkeys(found), key=lambda tiling: -tiling.block)  # stable


def _proposals(
    chip: str, direction: str, itemsize: int, width: int, heads: int, kv_heads: int, seq: int
) -> list[Tiling]:
    """As `proposals`, when a head takes `width` lanes."""
    c, backward = CHIPS[chip], direction == "backward"
    group = heads // kv_heads
    blocks = [c.backward if backward else c.forward]
    blocks += [b for b in (512, 256, 128) if b < blocks[0]]
    whole = -(-seq // 128) * 128  # a short row is one block
    found = []
    if itemsize == 4:  # an f32 product is six passes: the code is that much longer
        blocks = [b for b in blocks if b <= 512]
    for block in blocks:
        block = min(block, 1 << (whole - 1).bit_length())
        for at_once in (8, 4, 2, 1):
            # Both cores of a chip need a run of their own, also with one kv head.
            if heads % at_once or (max(at_once, group) % min(at_once, group)):
                continue
            if c.cores > 1 and not backward and heads // at_once < c.cores:
                continue
            n = kv_heads_per_step(at_once, group)
            split = 2 if backward and c.cores > 1 and kv_heads // n == 1 else 1
            if heads // (kv_heads // n * split) % at_once or kv_heads % n:
                continue
            vmem = (c.vmem or 16) * MIB
            per_key = n * width * (8 + 2 * (itemsize if split == 1 else 4))
            unrolled = 2 if backward else 4
            room = vmem // 2 // per_key // block * block
            blocks_of_keys, fit = -(-seq // block), max(1, room // block)
            spans = -(-blocks_of_keys // fit)
            span = -(-blocks_of_keys // spans) * block
            arrays = (5 if backward else 2) * at_once + 3 * n  # q, out and their like, twice
            sums = at_once + (n * span // block * 2 if backward else 0)
            used = block * width * (2 * arrays * itemsize + 4 * sums)
            if used > vmem:
                continue
            found.append(
                Tiling(
                    block=block,
                    heads=at_once,
                    unroll=1 if itemsize == 4 else min(at_once, unrolled * 512 // block or 1),
                    square_unroll=1 if itemsize == 4 else min(at_once, unrolled),
                    strip=min(512, block),
                    trapezoid=min(c.mxu, block),
                    square=min(256, block),
                    depth=1 if backward else 3 if chip == "v4" else 2,
                    diagonal_depth=2 if backward else 4,
                    vmem_bytes=c.vmem and c.vmem * MIB,
                    split=split,
                    span=span,
                )
            )
    return found
