"""Compiles the TPU kernel ahead of time for real chips, on a machine without one; prints a table.

    python tests/kernels/decode_compile_table.py --chips v4 v5e --cases sample
    python tests/kernels/decode_compile_table.py --bundles ../shared/tpu_cost

One JSON line per case: what the TPU compiler says, never a measured speed. Needs libtpu (the
project's `tpu` extra). With --bundles a reader of the compiler's dumps (bundles.py in the given
folder) adds the final schedule's bundles of one block of keys, to be held against the cycles in
which HBM can deliver that block: where they are fewer, compute hides behind the copies.
"""

import argparse
import importlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from typing import NamedTuple

# topology, chip config, HBM bytes/s and clock Hz per core. Public figures; v7x: jax's tpu_info,
# clock not public (assumed).
CHIPS = {
    "v4": ("v4:2x2x1", "megacore", 1.228e12 / 2, 1.05e9),
    "v5e": ("v5e:2x2", "default", 0.819e12, 1.5e9),
    "v5p": ("v5:2x2x1", "megacore", 2.765e12 / 2, 1.75e9),
    "v6e": ("v6e:2x2", "default", 1.64e12, 1.75e9),
    "v7x": ("tpu7x:2x2x1", "default", 7.38e12 / 2, 1.9e9),
}


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
    parser.add_argument("--bundles", help="folder with bundles.py, a reader of compiler dumps")
    options = parser.parse_args()
    dump = tempfile.mkdtemp(prefix="decode_attention_")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    if options.bundles:
        sys.path.insert(0, options.bundles)
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=(final_).*"
        )
    try:
        for chip in options.chips:
            for case in CASES[options.cases]:
                row = {"chip": chip, **case._asdict(), **_compile(chip, case)}
                if options.bundles and "error" not in row:
                    row |= _bundles(chip, case, dump)
                for name in os.listdir(dump):
                    os.remove(os.path.join(dump, name))
                print(json.dumps(row), flush=True)
    finally:
        shutil.rmtree(dump)


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


def _compile(chip: str, case: Case) -> dict:
    """The chosen sizes, compile verdict and VMEM; jax is imported late, after the environment."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import (
        AbstractDevice,
        AbstractMesh,
        Mesh,
        NamedSharding,
        PartitionSpec,
        use_abstract_mesh,
    )
    from lemur_kernels.decode_attention import decode_attention

    topology, config, _, _ = CHIPS[chip]
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chip_config_name=config,
        chips_per_host_bounds=(2, 2, 1),
    ).devices  # fmt: skip
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    # Tells the kernel its target, as a mesh of real devices would.
    target = AbstractMesh(
        (1,), ("x",), abstract_device=AbstractDevice(
            device_kind=devices[0].device_kind, platform="tpu", num_cores=devices[0].num_cores
        ),
    )  # fmt: skip
    plan, page, itemsize, M = _plan(case)
    P, B = case.rows * M, case.rows

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    arrays = [
        array((B, case.queries, case.heads, case.head_dim), jnp.dtype(case.q)),
        array((P, *page), jnp.dtype(case.pages)),
        array((B, M), jnp.int32), array((B,), jnp.int32), array((B,), jnp.int32),
    ]  # fmt: skip
    if case.pages == "int8":
        arrays += [array((P, case.kv_heads), jnp.float32)] * 2

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
        with use_abstract_mesh(target):
            compiled = jax.jit(step).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:  # the compiler's verdict is the result, whatever its type
        return {**sizes, "error": str(error).strip()[:400]}
    used = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', compiled.as_text())
    return {**sizes, "vmem_MiB": round(max(map(int, used), default=0) / 2**20, 1)}


def _bundles(chip: str, case: Case, dump: str) -> dict:
    """Bundles of one full block, without and with masks, next to the cycles of its copies."""
    from lemur_kernels.decode_attention.plan import COPIES_PER_TURN

    reader = importlib.import_module("bundles")
    (prefix,) = reader.prefixes(dump, "decode_attention")
    names, _, use, schedule, root = reader.analyse(prefix)
    text = {bundle[0]: bundle[3] for bundle in schedule}
    plan, page, itemsize, _ = _plan(case)

    def products(node):
        return reader.stats(names, use, node.a, node.b)[1][names.index("MXU")]

    def copies_in(node):
        return sum(text[i].count("dma.") for i in range(node.a, node.b) if i in text)

    def bundles(node, trips, leave_out=()):
        """Bundles executed in a node when each loop inside it runs `trips(loop)` times."""
        own, _ = reader.stats(names, use, node.a, node.b, [(c.a, c.b) for c in node.ch])
        inside = [c for c in node.ch if c not in leave_out]
        return own + sum(bundles(c, trips) * (trips(c) if c.kind == "loop" else 1) for c in inside)

    def every(node):
        return [node] + [n for child in node.ch for n in every(child)]

    def forms(node):
        return [c for c in node.ch if c.kind == "skip" and products(c) > 0]

    loops = [n for n in every(root) if n.kind == "loop" and len(forms(n)) == 2]
    if not loops:
        return {"bundles": "the reader does not see the block loop"}
    loop = min(loops, key=lambda n: n.b - n.a)
    groups = plan.heads // plan.unroll
    plain, masked = sorted(bundles(n, lambda _: groups) for n in forms(loop))
    # A full block starts several copies per turn; loops over single pages are for partial ones.
    turns = plan.pages // min(COPIES_PER_TURN, plan.pages)
    copies = bundles(loop, lambda n: turns if copies_in(n) > 1 else 0, forms(loop))
    _, _, bandwidth, clock = CHIPS[chip]
    cycles = plan.pages * plan.heads * page[1] * page[2] * itemsize / (bandwidth / clock)
    return {
        "copy_bundles": copies,
        "compute_bundles": plain,
        "masked_bundles": masked,
        "hbm_cycles": round(cycles),
        "share_of_hbm_time": round((copies + plain) / cycles, 2),
    }


if __name__ == "__main__":
    main()
