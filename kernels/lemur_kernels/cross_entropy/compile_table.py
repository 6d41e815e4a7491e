"""Compiles the loss and its gradient for real TPUs, on a machine without one; prints JSON lines.

    python -m lemur_kernels.cross_entropy.compile_table --chips v4 v5e --cases sample
    python -m lemur_kernels.cross_entropy.compile_table --cases cost --cost ../shared/tpu_cost

The first says what the compiler accepts, with its VMEM and HBM; the second also predicts time with
the static cost model in a folder of tpu_cost scripts (bundles.py, hlocost.py). Run it in a process
of its own: libtpu reads its environment once. Nothing here is measured on a TPU.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
from typing import NamedTuple

# topology, chip config, and of a device: bf16 FLOP/s, HBM bytes/s, clock Hz, cores.
CHIPS = {
    "v4": ("v4:2x2x1", "megacore", 275e12, 1.228e12, 1.05e9, 2),
    "v5e": ("v5e:2x2", "default", 197e12, 0.819e12, 1.5e9, 1),
    "v5p": ("v5:2x2x1", "megacore", 459e12, 2.765e12, 1.75e9, 2),
    "v6e": ("v6e:2x2", "default", 918e12, 1.64e12, 1.75e9, 1),
    "v7x": ("tpu7x:2x2x1", "default", None, None, None, 1),
}
LENGTH = 4096


class Case(NamedTuple):
    """rows of 4096 tokens; z-loss on, padded vocabulary, chunks of chunk_tokens of each row."""

    embed: int = 8192
    vocab: int = 32128
    dtype: str = "bfloat16"
    rows: int = 1
    chunk_tokens: int = LENGTH
    implementation: str = "pallas_tpu"


_WIDTHS = list(itertools.product((2048, 4096, 8192), (32000, 32128, 128256)))
_KERNEL_CHUNKS = ((1, LENGTH), (2, LENGTH), (4, LENGTH), (4, 1024))
_XLA_CHUNKS = ((1, 512), (1, LENGTH), (4, 512), (4, LENGTH))
CASES = {
    "quick": [Case()],
    "sample": [Case(), Case(2048, 128256), Case(4096, 32000, "float32")],
    "whole": [
        *(Case(E, V) for E, V in _WIDTHS),
        *(Case(E, 32128, "float32") for E in (2048, 8192)),
        Case(100, 1000),
        Case(chunk_tokens=1000),
        Case(rows=4, chunk_tokens=512),
    ],
    "cost": [
        *(Case(rows=rows, implementation="reference") for rows in (1, 2, 4)),
        *(Case(rows=r, chunk_tokens=c, implementation="chunked") for r, c in _XLA_CHUNKS),
        *(Case(rows=r, chunk_tokens=c) for r, c in _KERNEL_CHUNKS),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--cases", choices=CASES, default="sample")
    parser.add_argument("--cost", metavar="DIR", help="folder with bundles.py and hlocost.py")
    options = parser.parse_args()
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    dump = tempfile.mkdtemp(prefix="cross_entropy_dump_")
    if options.cost:
        sys.path.insert(0, options.cost)
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=(final_).*"
        )
    try:
        for chip in options.chips:
            for case in CASES[options.cases]:
                row = {"chip": chip, **case._asdict()} | _compiled(chip, case, options.cost, dump)
                print(json.dumps(row), flush=True)
                for name in os.listdir(dump):
                    os.remove(os.path.join(dump, name))
    finally:
        shutil.rmtree(dump)


def _compiled(chip: str, case: Case, cost: str | None, dump: str) -> dict:
    """What the compiler says of the loss and gradient; jax comes after the environment."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from lemur_kernels.cross_entropy import cross_entropy

    devices = topologies.get_topology_desc(
        platform="tpu",
        topology_name=CHIPS[chip][0],
        chip_config_name=CHIPS[chip][1],
        chips_per_host_bounds=(2, 2, 1),
    ).devices
    where = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)

    kernel = case.implementation == "pallas_tpu"

    def step(x, w, targets, weights):
        def total(x, w):
            out = cross_entropy(
                x, w, targets, weights,
                z_loss=1e-4, chunk_tokens=case.chunk_tokens, valid_vocab=case.vocab - 100,
                implementation=case.implementation, chip=chip if kernel else None,
            )  # fmt: skip
            return out.loss + out.z_loss

        return jax.value_and_grad(total, (0, 1))(x, w)

    tokens = (case.rows, LENGTH)
    arrays = (
        array((*tokens, case.embed), case.dtype),
        array((case.embed, case.vocab), case.dtype),
        array(tokens, "int32"),
        array(tokens, "float32"),
    )
    try:
        lowered = jax.jit(step).trace(*arrays).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
    except Exception as error:  # the compiler's verdict is the result, whatever its type
        return {"error": str(error).strip()[:400]}
    text, memory = compiled.as_text(), compiled.memory_analysis()
    shapes = re.findall(rf"f32\[((?:\d+,)+){case.vocab}\]", text)
    rows = (math.prod(map(int, shape.strip(",").split(","))) for shape in shapes)
    chunk = case.rows * min(case.chunk_tokens, LENGTH)
    # Other f32 arrays have that shape: the head's gradient, or f32 probabilities.
    unknown = chunk == case.embed or case.dtype == "float32"
    used = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', text)
    row = {
        "vmem_limit_MiB": max(map(int, used), default=0) >> 20 if kernel else None,
        "f32_logits": None if unknown else chunk in rows,
        "temp_MiB": memory.temp_size_in_bytes >> 20,
        "peak_MiB": memory.peak_memory_in_bytes >> 20,
    }
    return row | (_cost(chip, case, text, dump) if cost and CHIPS[chip][2] else {})


def _cost(chip: str, case: Case, text: str, dump: str) -> dict:
    """Predicted ms: matmul fusions by XLA's own cycles, our kernel by its final schedule, the rest
    by bytes (hlocost.py)."""
    flops, bandwidth, clock = CHIPS[chip][2:5]
    kernel_ms = 0.0
    if case.implementation == "pallas_tpu":
        kernel_ms = _project_cycles(chip, case, dump) / clock * 1e3

    def custom(instruction):
        return kernel_ms / 1e3 if "cross_entropy_project" in instruction.name else None

    spec = {"flops": flops, "bw": bandwidth, "clk": clock}
    with contextlib.redirect_stdout(io.StringIO()):
        kinds, _ = importlib.import_module("hlocost").report(text, spec, None, custom, 0)
    total = 1e3 * sum(kind[1] for kind in kinds.values())
    floor = 3 * 2e3 * case.rows * LENGTH * case.embed * case.vocab / flops
    return {
        "project_ms_per_call": round(kernel_ms, 2),
        "total_ms": round(total, 2),
        "floor_ms": round(floor, 2),
        "total_Mcycles": round(total * clock / 1e9, 2),
    }


def _project_cycles(chip: str, case: Case, dump: str) -> float:
    """Cycles per core of one call of the projection kernel: each region of its final schedule
    times how often the grid runs it, and never fewer than its matrix products need at peak."""
    from lemur_kernels.cross_entropy.blocks import choose

    bundles = importlib.import_module("bundles")
    flops, _, clock, cores = CHIPS[chip][2:]
    N = case.rows * min(case.chunk_tokens, LENGTH)
    b = choose(chip, N, case.embed, case.vocab, case.dtype)
    tokens, tiles, depths = -(-N // b.tokens), -(-case.vocab // b.columns), case.embed // b.depth
    product = 2 * b.tokens * b.columns * b.depth / (flops / clock / cores)
    clear = b.tokens * b.columns / 1024  # stores that zero the accumulator
    (prefix,) = bundles.prefixes(dump, "cross_entropy_project")
    names, _, use, _, root = bundles.analyse(prefix)
    mxu, eup = names.index("MXU"), names.index("EUP")

    def cycles(node, times, inside):
        count, slots = bundles.stats(names, use, node.a, node.b, [(c.a, c.b) for c in node.ch])
        total = times * (max(count, product) if slots[mxu] > 1000 else count)
        for child in node.ch:
            length, all_slots = bundles.stats(names, use, child.a, child.b)
            runs = times
            if child.kind == "loop":
                runs = times * b.tokens // b.strip if inside else tokens * tiles * depths
            elif any(grandchild.kind == "loop" for grandchild in child.ch):
                runs = tokens * tiles  # the exp of a finished tile
            elif length > 40 and not all_slots[mxu]:
                is_clear = not all_slots[eup] and abs(length - clear) < 0.1 * clear
                runs = tokens * tiles if is_clear else tokens
            total += cycles(child, runs, inside or child.kind == "loop")
        return total

    return cycles(root, 1, False) / cores


if __name__ == "__main__":
    main()
