"""The benchmark's tables, on made-up measurements."""

import argparse
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import bench_kernels as bench
import kernel_cases
from tpu_compiler.cases import Case

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


def _variants(packed: float, apart: float) -> dict:
    """Our cycles in kernels, the same for each packing."""
    return {
        name: {"cycles": cycles}
        for row in bench.packings(4096)
        for name, cycles in ((row, packed), (f"{row}, documents apart", apart))
    }


def _printed(results: dict, **changed) -> str:
    options = argparse.Namespace(**{**vars(OPTIONS), **changed})
    console = Console(width=160, file=io.StringIO())
    for table in bench.tables("v4", results, options):
        console.print(table)
    return console.file.getvalue()


def test_ratios_count_what_runs_outside_the_kernels():
    """Red if _total leaves out outside_cycles."""
    rows = _variants(0.54e6, apart=0.5e6)
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
    assert "0.540" in packed and "0.500" in packed and "1.08" in packed  # nothing outside in these
    assert "demo code, mean of rows" in text
    one = _printed({("forward", "ours"): _result(1.0e6, variants=rows)}, case=["8 x"])
    assert "8 x 512" in one and "16 x 256" not in one


def _counts(lengths: tuple[int, ...], mask: str) -> dict:
    """Region counts of both kernels at blocks of 512, documents from position 0 on."""
    blocks = {"block": 512, "span": 4096, "square": 256}
    case = Case(
        chip="v4",
        direction="forward+backward",
        mask=mask,
        lengths=lengths,
        blocks=(*blocks.items(),),
    )
    return kernel_cases.build(case).counts


def test_documents_apart_are_charged_for_their_own_blocks():
    """Red if a document in a row of its own kept the length of the packed row."""
    whole = (1024, 512, 2560)  # whole blocks: nothing is shared, so packing may not cost a step
    assert _counts(whole, "apart") == _counts(whole, "segments")
    packed, apart = (_counts((256,) * 16, mask) for mask in ("segments", "apart"))
    for kernel in ("lemur_attention_forward", "lemur_attention_backward"):
        assert apart[kernel]["grid"] == 2 * packed[kernel]["grid"] > 0, kernel
        assert apart[kernel]["empty"] == 0, kernel


def test_a_kernel_on_one_core_is_named_with_what_it_would_cost():
    """Red if the note adds nothing to the total."""
    alone = {"name": "dkv.1", "cycles": 3e6}
    result = _result(5e6, 1e6, kernels=[alone], one_core=["dkv.1"])
    assert "one of the two cores would run it alone, 9.000 Mcycles" in " ".join(
        _printed({("forward", "splash"): result}).split()
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--kernel", "decode_attention"], "decode_attention is not compared here; its compil"),
        (["--kernel", "matmul"], "'matmul' is none of attention, cross_entropy"),
        (["--blocks", "width=2"], "'width' is none of block, heads"),
        (["--blocks", "block"], "'' must be an integer from 1 on"),
        (["--kernel", "cross_entropy", "--blocks", "block=512"], "--blocks and --case are for att"),
        (["--case", "9 x 9"], "--case '9 x 9' begins none of one document, 8 x 512"),
        (["--heads", "8", "--kv-heads", "3"], "--kv-heads 3 must divide --heads 8"),
        (["--head-dim", "100"], "v4: head_dim=100 is none of 64, 80, 96, 128, 256"),
        (["--seq", "0"], "'0' must be an integer from 1 on"),
        (["--seq", "-4096"], "must be an integer from 1 on"),
        (["--only", "theirs"], "--only theirs: choose from ours, splash"),
        (["--kernel", "cross_entropy", "--embed", "8200"], "v4: embed=8200 is more than"),
    ],
)
def test_what_cannot_be_compiled_is_said_before_compiling(given, message, monkeypatch, capsys):
    """Red if a branch of `wrong` goes, or a `type=` of main."""
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *given])
    monkeypatch.setattr(bench, "measure_chip", lambda *_: pytest.fail("compiled"))
    with pytest.raises(SystemExit) as error:
        bench.main()
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("why", "status"), [("refused", 1), ("crashed", 1), ("unsupported", 0)])
def test_a_failed_compilation_is_the_exit_status(why, status, monkeypatch, capsys):
    """Red if main returns 0 whatever happened, or 1 where tokamax is not installed."""
    rows = _variants(1e6, apart=1e6)
    results = {
        ("forward", "ours"): _result(1.0e6, variants=rows),
        ("forward", "splash"): {"ok": False, "why": why, "error": "vmem"},
    }
    given = ["--chip", "v4", "--direction", "forward", "--only", "ours", "splash"]
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *given, "--no-crosscheck"])
    monkeypatch.setattr(bench, "measure_chip", lambda *_: results)
    monkeypatch.setattr(bench.compiling, "missing", lambda: None)
    assert bench.main() == status
    assert ("1 of 2 compilations failed" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize("seq", [4096, 32768])
def test_packings_fill_the_row(seq):
    """Red if the unequal documents do not add up, or a demo row is longer than the row."""
    for name, lengths in bench.packings(seq).items():
        assert min(lengths) > 0 and sum(lengths) <= seq, name
        assert name.startswith("demo text") or sum(lengths) >= 0.9 * seq, name
    assert len(bench.packings(seq)["8 unequal"]) == 8
