"""A second reading of the baselines by ../shared/tpu_cost (optional reference material of the
project's authors), where it exists: its own dump, its own parser, its own guess of what each region
is. The two share libtpu only."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("LEMUR_SHARED", ROOT.parent / "shared")) / "tpu_cost"

_PROGRAM = """
import json, sys
chip, S = sys.argv[1], int(sys.argv[2])
sys.path.insert(0, %r)
sys.argv = ["attn.py", chip, "none"]
import attn
H, K, b, c = 64, 8, 1024, 512
nq, nk, run = attn.blk(S, b, b)
rows, columns = (H * nq * nk, H * run, H * nq, 1), (H * nq * nk, H * run, K * nk, 1)
args = attn.io(H, K, S=S)
found = {}
for fused in (False, True):
    name = "splash_fused" if fused else "splash"
    f = attn.splash(H, S, b, b, c, fused)
    if not fused:
        found["forward/" + name] = attn.run(name, f, args, {"fwd": rows}, 1)
    counts = {"fwd": rows, "dq": rows, "dkv": columns}
    found["forward+backward/" + name] = attn.run(name, attn.grad(f), args, counts, 1)
print("FOUND " + json.dumps(found))
"""


def second_reading(chip: str, seq: int) -> dict[str, float]:
    """{"direction/name": bundles per core} by shared/tpu_cost; {} where it is not there or has
    another model of the chip."""
    if not (SHARED / "attn.py").exists() or chip == "v7x":
        return {}
    with tempfile.TemporaryDirectory(prefix="tpu_dump_") as folder:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM % str(SHARED), chip, str(seq)],
            capture_output=True,
            text=True,
            env=os.environ | {"DUMP": str(Path(folder) / "dump"), "JAX_PLATFORMS": "cpu"},
        )
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not found:
        raise RuntimeError(f"{SHARED}/attn.py failed: {done.stderr.strip().splitlines()[-1:]}")
    return {k: v for k, v in json.loads(found[0].removeprefix("FOUND ")).items() if v}


def compare(chip: str, results: dict, seq: int) -> Table | str:
    """A table of both readings (bundles x counts, without the floor of the row passes)."""
    theirs = second_reading(chip, seq)
    if not theirs:
        return f"{chip}: no second reading ({SHARED} has none for it)"
    table = Table(title=f"{chip}: two readings of the same schedule, Mcycles/core")
    for column in ("kernel", "ours", "shared/tpu_cost", "difference"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, value in theirs.items():
        result = results.get(tuple(name.replace("_", " ").split("/")))
        if result and result["ok"]:
            mine = result["schedule_cycles"]
            cells = (f"{mine / 1e6:.3f}", f"{value / 1e6:.3f}", f"{mine / value - 1:+.1%}")
            table.add_row(name, *cells)
    return table
