"""Compiles the public attention function ahead of time for real chips, on a machine without one.

    python tests/kernels/attention_compile_table.py --chips v4 v5e --cases unpacked

One JSON line per case: what the TPU compiler says, never a measured speed. The tiling is the one
that a run takes from certified.csv, which the certification itself compiles on packed rows of equal
lengths only: here are the rest. Needs libtpu (the project's `tpu` extra).
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from tpu_compiler import compiling, outside
from tpu_compiler.topology import CHIPS, chip_named


class Case(NamedTuple):
    """T queries of S keys, H and K heads of 128, bf16, two rows."""

    T: int
    S: int
    H: int
    K: int
    packed: bool
    window: int | None = None
    gradient: bool = True
    projected: bool = False  # one row, heads first, v made from 8192 features in the same program


CASES = {
    "unpacked": (Case(2048, 4096, 64, 8, False), Case(1000, 4096, 8, 1, False, 512)),
    # The list of blocks that run again with a running maximum is a second kernel.
    "packed": (Case(4096, 4096, 64, 8, True, gradient=False),),
    "projected": (Case(4096, 4096, 64, 8, True, gradient=False, projected=True),),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--cases", choices=CASES, default="unpacked")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attention_dump_") as dump:
        compiling.start(Path(dump))
        for chip in options.chips:
            for case in CASES[options.cases]:
                found = _outside(chip, case) if case.projected else _compiled(chip, case)
                row = {"chip": chip, **case._asdict(), **found}
                print(json.dumps(row), flush=True)


def _compiled(chip: str, case: Case) -> dict:
    """The kernels in the program and its VMEM, or the compiler's error. jax is imported late, after
    the environment."""
    import jax
    from lemur_kernels.attention import attention

    def attend(q, k, v, positions_BT, segments_BT, positions_BS, segments_BS):
        return attention(
            *(q, k, v),
            q_positions_BT=positions_BT,
            kv_positions_BS=positions_BS,
            q_segments_BT=segments_BT,
            kv_segments_BS=segments_BS,
            packed=case.packed,
            window=case.window,
            implementation="pallas_tpu",
        )

    def with_gradient(q, k, v, *rows_and_dout):
        *rows, dout = rows_and_dout
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *rows), q, k, v)
        return out, pull(dout)

    B, D = 2, 128
    q, kv = ((B, case.T, case.H, D), "bfloat16"), ((B, case.S, case.K, D), "bfloat16")
    rows = [((B, case.T), "int32")] * 2 + [((B, case.S), "int32")] * 2
    fn, more = (with_gradient, [q]) if case.gradient else (attend, [])
    try:
        compiled = compiling.compile_for(chip, fn, q, kv, kv, *rows, *more)
    except compiling.CompileError as error:
        return {"error": str(error)}
    names = " ".join(kernel.name for kernel in compiled.kernels)  # as "jvp_lemur_..._.1"
    return {
        "kernels": sorted(set(re.findall(r"lemur_attention_[a-z]+", names))),
        "vmem_MiB": round(compiled.vmem_bytes / 2**20, 1),
        "seconds": round(compiled.seconds, 1),
    }


def _outside(chip: str, case: Case) -> dict:
    """What runs beside the kernels, cycles of a TensorCore: does anything but the product pass
    over v, which the kernel takes transposed?"""
    import jax.numpy as jnp
    from lemur_kernels.attention import pallas_tpu, shapes
    from lemur_kernels.attention.mask import Options, Rows
    from lemur_kernels.attention.tilings import Tiling

    S, H, K, E, D = case.S, case.H, case.K, 8192, 128
    shape = shapes.Shape(chip, "forward", "bfloat16", D, H, K, S)
    tiling = Tiling(**shapes.certificate_for(shape).blocks)
    options = Options(packed=True, scale=D**-0.5, window=None)

    def attend(x_SE, w_EKD, q_HSD, k_KSD, segments_1S, positions_1S):
        v_KSD = jnp.einsum("SE,EKD->SKD", x_SE, w_EKD).transpose(1, 0, 2)
        rows = Rows(positions_1S, positions_1S, segments_1S, segments_1S)
        return pallas_tpu.forward_heads_first(q_HSD, k_KSD, v_KSD, rows, options, tiling)

    arrays = [(S, E), (E, K, D), (H, S, D), (K, S, D)]
    arguments = [(shape, "bfloat16") for shape in arrays] + [((1, S), "int32")] * 2
    compiled = compiling.compile_for(chip, attend, *arguments)
    cycles = outside.outside(compiled.hlo, chip_named(chip))
    return {"outside": {name: round(count) for name, count in cycles.items() if count >= 2000}}


if __name__ == "__main__":
    main()
