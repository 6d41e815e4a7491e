"""The benchmark's tables, on made-up measurements."""

import argparse
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import bench_kernels as bench

OPTIONS = argparse.Namespace(
    kernel="attention",
    direction=["forward"],
    only=["ours", "splash", "flash"],
    seq=4096,
    heads=64,
    kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    embed=8192,
    vocab=32128,
    regions=False,
    case=None,
    blocks=[],
)


def _result(cycles: float, outside: float = 0.0, **more) -> dict:
    return {
        "ok": True,
        "cycles": cycles,
        "schedule_cycles": cycles,
        "mxu_cycles": cycles / 2,
        "outside_cycles": outside,
        "shares": {"VALU": 0.25},
        "spill_stores": 1,
        "spill_fills": 2,
        "vmem_bytes": 2**20,
        "temp_bytes": 0,
        "code_bundles": 10,
        "compile_seconds": 1.0,
        "kernels": [],
        **more,
    }


def _printed(results: dict, **changed) -> str:
    options = argparse.Namespace(**{**vars(OPTIONS), **changed})
    console = Console(width=160, file=io.StringIO())
    for table in bench.tables("v4", results, options):
        console.print(table)
    return console.file.getvalue()


def test_ratios_count_what_runs_outside_the_kernels():
    """Red if _total leaves out outside_cycles."""
    rows = {name: {"cycles": 0.54e6} for name in bench.packings(4096)}
    text = _printed(
        {
            ("forward", "ours"): _result(1.0e6, 0.1e6, variants=rows),
            ("forward", "splash"): _result(2.0e6, 0.2e6),
            ("forward", "flash"): {"ok": False, "why": "refused", "error": "vmem"},
        }
    )
    ours = next(line for line in text.splitlines() if line.startswith("│ ours"))
    assert "1.100" in ours and "0.50" in ours and "1.02" in ours  # of 2.2; of the floor, 1.081
    assert "flash: refused: vmem" in text
    packed = next(line for line in text.splitlines() if line.startswith("│ 8 x 512"))
    assert "0.640" in packed and "0.291" in packed
    assert "demo code, mean of rows" in text
    one = _printed({("forward", "ours"): _result(1.0e6, variants=rows)}, case=["8 x"])
    assert "8 x 512" in one and "16 x 256" not in one


def test_a_kernel_on_one_core_is_named_with_what_it_would_cost():
    """Red if the note adds nothing to the total."""
    alone = {"name": "dkv.1", "cycles": 3e6}
    result = _result(5e6, 1e6, kernels=[alone], one_core=["dkv.1"])
    assert "one of the two cores would run it alone, 9.000 Mcycles" in " ".join(
        _printed({("forward", "splash"): result}).split()
    )


@pytest.mark.parametrize("seq", [4096, 32768])
def test_packings_fill_the_row(seq):
    """Red if the unequal documents do not add up, or a demo row is longer than the row."""
    for name, lengths in bench.packings(seq).items():
        assert min(lengths) > 0 and sum(lengths) <= seq, name
        assert name.startswith("demo text") or sum(lengths) >= 0.9 * seq, name
    assert len(bench.packings(seq)["8 unequal"]) == 8
