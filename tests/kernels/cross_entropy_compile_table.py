"""Compiles the loss and its gradient for real TPUs, on a machine without one; prints JSON lines.

    python tests/kernels/cross_entropy_compile_table.py --chips v4 v5e --cases sample
    python tests/kernels/cross_entropy_compile_table.py --cases cost --cost ../shared/tpu_cost

The first says what the compiler accepts, with its VMEM and HBM; the second also predicts time: our
kernel by its final schedule, XLA's operations by the static cost model in a folder of tpu_cost
scripts (hlocost.py; optional reference material of the project's authors). Nothing here is measured
on a TPU.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import kernel_cases
from tpu_compiler import cases, compiling
from tpu_compiler.cost import attribute
from tpu_compiler.topology import CHIPS

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
    parser.add_argument("--cost", metavar="DIR", help="folder with hlocost.py")
    options = parser.parse_args()
    if options.cost:
        sys.path.insert(0, options.cost)
    with tempfile.TemporaryDirectory(prefix="cross_entropy_dump_") as folder:
        dump = Path(folder)
        compiling.start(dump)
        for chip in options.chips:
            for case in CASES[options.cases]:
                row = {"chip": chip, **case._asdict(), **_compiled(chip, case, bool(options.cost))}
                print(json.dumps(row), flush=True)
                for path in dump.iterdir():
                    path.unlink()


def _compiled(chip: str, case: Case, with_cost: bool) -> dict:
    """What the compiler says of the loss and gradient; jax comes after the environment."""
    import jax
    from lemur_kernels.cross_entropy import cross_entropy

    kernel = case.implementation == "pallas_tpu"

    def step(x, w, targets, weights):
        def total(x, w):
            out = cross_entropy(
                x, w, targets, weights,
                z_loss=1e-4, chunk_tokens=case.chunk_tokens, valid_vocab=case.vocab - 100,
                implementation=case.implementation,  # the chip is that of compile_for's mesh
            )  # fmt: skip
            return out.loss + out.z_loss

        return jax.value_and_grad(total, (0, 1))(x, w)

    tokens = (case.rows, LENGTH)
    arrays = (
        ((*tokens, case.embed), case.dtype),
        ((case.embed, case.vocab), case.dtype),
        (tokens, "int32"),
        (tokens, "float32"),
    )
    try:
        compiled = compiling.compile_for(chip, step, *arrays)
    except compiling.CompileError as error:
        return {"error": str(error)}
    shapes = re.findall(rf"f32\[((?:\d+,)+){case.vocab}\]", compiled.hlo)
    rows = (math.prod(map(int, shape.strip(",").split(","))) for shape in shapes)
    chunk = case.rows * min(case.chunk_tokens, LENGTH)
    # Other f32 arrays have that shape: the head's gradient, or f32 probabilities.
    unknown = chunk == case.embed or case.dtype == "float32"
    row = {
        "vmem_limit_MiB": compiled.vmem_bytes >> 20 if kernel else None,
        "f32_logits": None if unknown else chunk in rows,
        "temp_MiB": compiled.temp_bytes >> 20,
        "peak_MiB": compiled.peak_bytes >> 20,
    }
    return row | (_cost(chip, case, compiled) if with_cost else {})


def _cost(chip: str, case: Case, compiled: compiling.Compiled) -> dict:
    """Predicted ms: matmul fusions by XLA's own cycles, our kernel by its final schedule, the rest
    by bytes (hlocost.py)."""
    of_chip = CHIPS[chip]
    flops = of_chip.flops_per_cycle * of_chip.clock_hz * of_chip.cores
    kernel_ms = 0.0
    if case.implementation == "pallas_tpu":
        kernel_ms = _project_cycles(chip, case, compiled) / of_chip.clock_hz * 1e3

    def custom(instruction):
        return kernel_ms / 1e3 if "cross_entropy_project" in instruction.name else None

    spec = {"flops": flops, "bw": of_chip.hbm_bytes_per_s, "clk": of_chip.clock_hz}
    with contextlib.redirect_stdout(io.StringIO()):
        kinds, _ = importlib.import_module("hlocost").report(compiled.hlo, spec, None, custom, 0)
    total = 1e3 * sum(kind[1] for kind in kinds.values())
    floor = 3 * 2e3 * case.rows * LENGTH * case.embed * case.vocab / flops
    return {
        "project_ms_per_call": round(kernel_ms, 2),
        "total_ms": round(total, 2),
        "floor_ms": round(floor, 2),
        "total_Mcycles": round(total * of_chip.clock_hz / 1e9, 2),
    }


def _project_cycles(chip: str, case: Case, compiled: compiling.Compiled) -> float:
    """Cycles per core of one call of the projection kernel, for one chunk of every row."""
    name = "lemur_cross_entropy_project"
    chunk = cases.Case(
        chip=chip,
        kernel="cross_entropy",
        direction="forward+backward",
        seq=case.rows * min(case.chunk_tokens, LENGTH),
        dtype=case.dtype,
        sizes=(("embed", case.embed), ("vocab", case.vocab)),
    )
    (kernel,) = (kernel for kernel in compiled.kernels if name in kernel.name)
    return attribute(kernel, kernel_cases.build(chunk).counts[name], CHIPS[chip]).cycles


if __name__ == "__main__":
    main()
