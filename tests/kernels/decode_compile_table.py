"""Compiles the TPU kernel ahead of time for real chips, on a machine without one; prints a table.

    python tests/kernels/decode_compile_table.py --chips v4 v5e --cases sample
    python tests/kernels/decode_compile_table.py --bundles

One JSON line per case: what the TPU compiler says, never a measured speed. Needs libtpu (the
project's `tpu` extra). --bundles adds the final schedule's bundles of one block of keys, to be held
against the cycles in which HBM can deliver that block: where they are fewer, compute hides behind
the copies.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from tpu_compiler import compiling
from tpu_compiler.bundles import Kernel, Node
from tpu_compiler.topology import CHIPS


class Case(NamedTuple):
    head_dim: int = 128
    heads: int = 64
    kv_heads: int = 8
    pages: str = "bfloat16"
    page_tokens: int = 64
    rows: int = 16
    queries: int = 1
    context: int = 4096
    window: int | None = None
    soft_cap: float | None = None

    @property
    def q(self) -> str:
        return "bfloat16" if self.pages == "int8" else self.pages


HEADS = ((8, 1), (32, 32), (64, 8))
FULL = tuple(
    Case(head_dim, *heads, pages, page_tokens)
    for head_dim, heads, pages, page_tokens in itertools.product(
        (64, 80, 96, 128, 256), HEADS, ("bfloat16", "int8", "float32"), (16, 32, 64, 128, 256)
    )
)
EXTRA = (
    Case(queries=4), Case(queries=256, rows=4), Case(96, 12, 6, "int8", 16, queries=7),
    Case(window=1024), Case(64, 64, 8, "bfloat16", 16, window=128), Case(soft_cap=50.0),
    Case(64, 8, 1, rows=3, queries=5), Case(128, 40, 5), Case(256, 16, 1, "float32", 256),
    Case(queries=512, rows=2, heads=32, kv_heads=32), Case(context=32768, rows=64, page_tokens=16),
    Case(pages="int8", context=32768, rows=16, page_tokens=16, heads=32, kv_heads=32),
)  # fmt: skip
SAMPLE = (
    Case(), Case(64, 8, 1, "int8", 16), Case(256, 32, 32, "float32", 256, queries=4),
    Case(96, 12, 6, "int8", 16, queries=7, window=128),
)  # fmt: skip
TABLE = (
    Case(), Case(page_tokens=16), Case(pages="int8"), Case(64), Case(heads=8, kv_heads=1),
    Case(heads=8, kv_heads=1, page_tokens=16), Case(heads=32, kv_heads=32), Case(queries=4),
    Case(heads=32, kv_heads=32, pages="int8"),
    Case(heads=8, kv_heads=1, pages="int8"), Case(256, 16, 8), Case(pages="float32"),
)  # fmt: skip
CASES = {"full": FULL + EXTRA, "sample": SAMPLE, "table": TABLE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--cases", choices=CASES, default="table")
    parser.add_argument("--bundles", action="store_true", help="also count those of one block")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="decode_attention_") as folder:
        dump = Path(folder)
        compiling.start(dump)
        for chip in options.chips:
            for case in CASES[options.cases]:
                row = {"chip": chip, **case._asdict(), **_compile(chip, case, options.bundles)}
                print(json.dumps(row), flush=True)
                for path in dump.iterdir():
                    path.unlink()


def _plan(case: Case):
    from lemur_kernels.decode_attention.pages import page_shape
    from lemur_kernels.decode_attention.plan import make_plan

    shape = page_shape(case.kv_heads, case.page_tokens, case.head_dim)
    itemsize = {"bfloat16": 2, "int8": 1, "float32": 4}[case.pages]
    M = case.context // case.page_tokens
    plan = make_plan(
        case.rows, case.queries, case.heads, case.kv_heads, M, *shape[1:], itemsize, case.window
    )
    return plan, shape, itemsize, M


def _compile(chip: str, case: Case, with_bundles: bool) -> dict:
    """The chosen sizes, compile verdict and VMEM; jax is imported late, after the environment."""
    from lemur_kernels.decode_attention import decode_attention

    plan, page, itemsize, M = _plan(case)
    P, B = case.rows * M, case.rows
    arrays = [
        ((B, case.queries, case.heads, case.head_dim), case.q),
        ((P, *page), case.pages),
        ((B, M), "int32"), ((B,), "int32"), ((B,), "int32"),
    ]  # fmt: skip
    if case.pages == "int8":
        arrays += [((P, case.kv_heads), "float32")] * 2

    def step(q, pages, table, lengths, new, k_scales=None, v_scales=None):
        return decode_attention(
            q, pages, page_table_BM=table, lengths_B=lengths, new_tokens_B=new,
            k_scales_PK=k_scales, v_scales_PK=v_scales, window=case.window,
            soft_cap=case.soft_cap, implementation="pallas_tpu",
        )  # fmt: skip

    sizes = {
        "block_tokens": plan.pages * case.page_tokens,
        "block_heads": plan.heads,
        "block_bytes": plan.pages * plan.heads * page[1] * page[2] * itemsize,
    }
    try:
        compiled = compiling.compile_for(chip, step, *arrays)
    except compiling.CompileError as error:
        return {**sizes, "error": str(error)}
    (kernel,) = compiled.kernels
    counted = _bundles(chip, case, kernel) if with_bundles else {}
    return {**sizes, "vmem_MiB": round(compiled.vmem_bytes / 2**20, 1), **counted}


def _bundles(chip: str, case: Case, kernel: Kernel) -> dict:
    """Bundles of one full block, without and with masks, next to the cycles of its copies."""
    from lemur_kernels.decode_attention.plan import COPIES_PER_TURN

    plan, page, itemsize, _ = _plan(case)

    def products(node: Node) -> int:
        return sum(bundle.mxu_rows for bundle in kernel.bundles[node.start : node.stop])

    def copies_in(node: Node) -> int:
        return sum(b.text.count("dma.") for b in kernel.bundles[node.start : node.stop])

    def bundles(node: Node, trips, leave_out=()) -> int:
        """Bundles executed in a node when each loop inside it runs `trips(loop)` times."""
        inside = [child for child in node.children if child not in leave_out]
        return len(node.own()) + sum(
            bundles(child, trips) * (trips(child) if child.kind == "loop" else 1)
            for child in inside
        )

    def every(node: Node) -> list[Node]:
        return [node] + [n for child in node.children for n in every(child)]

    def forms(node: Node) -> list[Node]:
        return [n for n in node.children if n.kind == "region" and products(n) > 0]

    loops = [n for n in every(kernel.root) if n.kind == "loop" and len(forms(n)) == 2]
    if not loops:
        return {"bundles": "the reader does not see the block loop"}
    loop = min(loops, key=lambda n: n.stop - n.start)
    groups = plan.heads // plan.unroll
    plain, masked = sorted(bundles(n, lambda _: groups) for n in forms(loop))
    # A full block starts several copies per turn; loops over single pages are for partial ones.
    turns = plan.pages // min(COPIES_PER_TURN, plan.pages)
    copies = bundles(loop, lambda n: turns if copies_in(n) > 1 else 0, forms(loop))
    of_chip = CHIPS[chip]
    bytes_per_cycle = of_chip.hbm_bytes_per_s / of_chip.cores / of_chip.clock_hz
    cycles = plan.pages * plan.heads * page[1] * page[2] * itemsize / bytes_per_cycle
    return {
        "copy_bundles": copies,
        "compute_bundles": plain,
        "masked_bundles": masked,
        "hbm_cycles": round(cycles),
        "share_of_hbm_time": round((copies + plain) / cycles, 2),
    }


if __name__ == "__main__":
    main()
