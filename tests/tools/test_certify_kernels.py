"""The generator of the table of certified shapes, on a toy kernel and on made-up results."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import certify_kernels as certify  # noqa: E402
from lemur_kernels.attention import shapes  # noqa: E402
from lemur_kernels.attention.tilings import Tiling  # noqa: E402
from tpu_compiler.cases import Case  # noqa: E402

HERE = str(Path(__file__).resolve().parent)


def _group(*lengths: int) -> list[Case]:
    return [Case(seq=n, lengths=(n,), mask="causal") for n in lengths]


def _attempts(limit_of: dict[int, int], accept: int) -> tuple[dict, list]:
    """Attempts on made-up results: (block, heads) cost 100 / heads for one document and block for
    packed rows; more than limit_of[seq] heads have no room."""
    asked = []

    def ask(case, blocks):
        asked.append((case.seq, blocks["block"], blocks["heads"]))
        if blocks["heads"] > limit_of[case.seq]:
            return {"ok": False, "why": "refused", "error": "vmem"}
        packed = {"cycles": blocks["block"]}
        cycles = 100 // blocks["heads"]
        return {"ok": True, "cycles": cycles, "outside_cycles": 1, "variants": {"packed": packed}}

    candidates = [{"block": block, "heads": h} for block in (30, 20, 10) for h in (8, 4, 2)]
    found = certify.certify_group(_group(*limit_of), lambda case: candidates, ask, accept)
    return {case.seq: tried for case, tried in found}, asked


def _best(tried: list) -> tuple | None:
    accepted = [(certify.total(r), b["block"], b["heads"]) for b, r in tried if r["ok"]]
    return min(accepted)[1:] if accepted else None


def test_lengths_try_the_candidates_of_the_reference_best_first():
    """Red if certify_group ranks by the candidates' order, or total leaves out packed rows (30, 4
    would win), or what had no room is dropped."""
    found, asked = _attempts({512: 8, 2048: 4, 4096: 4, 8192: 2, 32768: 0}, accept=2)
    assert {seq: _best(tried) for seq, tried in found.items()} == {
        512: (30, 8),  # more room than the reference: its own first one as well
        2048: (20, 4),
        4096: (20, 4),
        8192: (30, 2),  # 20, 4 and 30, 4 have no room; then in their order
        32768: None,
    }
    tried = {n: [(b, h) for seq, b, h in asked if seq == n] for n in found}
    assert tried[4096] == [(30, 8), (30, 4), (20, 8), (20, 4)]  # two block sizes accepted
    assert tried[512] == [(20, 4), (30, 8)]
    assert tried[8192] == [(20, 4), (30, 4), (30, 8), (30, 2)]
    assert len(tried[32768]) == 9


def test_a_journal_cut_off_by_a_kill_is_read(tmp_path):
    """Red if journal_of raises on a half line."""
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps({"key": "a", "result": {"ok": True}}) + '\n{"key": "b", "resu')
    assert list(certify.journal_of(path)) == ["a"]
    assert certify.journal_of(tmp_path / "none") == {}


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: no TPU compiler (pip install libtpu==0.0.42.1)",
)
def test_a_toy_is_certified_once_and_checked(tmp_path, monkeypatch, capsys):
    """Red if the journal is not used (the second run compiles again), or check compares nothing."""
    out, journal = tmp_path / "table.csv", tmp_path / "journal.jsonl"
    arguments = [
        *("certify_kernels.py", "--builder", "toy_kernel:build", "--path", HERE, "--seq", "4096"),
        *("--chip", "v5e", "--head-dim", "128", "--heads", "64/8", "--dtype", "bfloat16"),
        *("--direction", "forward", "--journal", str(journal), "--out", str(out)),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert certify.main() == 0
    table = out.read_text()
    (found,) = shapes.certificates(out)
    assert found.shape == shapes.Shape("v5e", "forward", "bfloat16", 128, 64, 8, 4096)
    assert found.blocks == {"block": 512} and set(found.kcycles) == {"causal", "segments", "window"}
    assert len(journal.read_text().splitlines()) == 1
    with monkeypatch.context() as patch:
        patch.setattr(certify.Worker, "ask", lambda *_: pytest.fail("compiled again"))
        assert certify.main() == 0
    assert out.read_text() == table
    monkeypatch.setattr(sys, "argv", [*arguments, "--check", "1"])
    assert certify.main() == 0
    line = table.splitlines()[-1]
    spills = f",{found.vmem_kib},{found.spills},"
    assert spills in line
    out.write_text(table.replace(spills, f",{found.vmem_kib},7,"))
    shapes.certificates.cache_clear()
    assert certify.main() == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_the_whole_matrix():
    """Red if a chip, width, length, head count or type of the proof is left out."""
    options = argparse.Namespace(
        chip=list(certify.CHIPS),
        head_dim=certify.HEAD_DIMS,
        seq=certify.SEQUENCES,
        heads=certify.HEADS,
        dtype=certify.DTYPES,
        direction=certify.DIRECTIONS,
    )
    matrix = certify.groups(options)
    assert len(matrix) == 5 * 5 * 3 * 2 * 2 and all(len(group) == 7 for group in matrix)
    assert {c.chip for g in matrix for c in g} == {"v4", "v5e", "v5p", "v6e", "v7x"}
    assert matrix[0][0].head_dim == 128 and matrix[0][0].dtype == "bfloat16"


def test_the_shipped_table_is_one_that_the_kernels_take():
    """Red if certified.csv has a column that Tiling lacks, or a program larger than the chip."""
    table = shapes.certificates()
    assert table
    for c in table:
        assert Tiling(**c.blocks).block % 128 == 0, c
        assert c.vmem_kib * 1024 <= certify.CHIPS[c.shape.chip].vmem_bytes, c
        assert 0 < c.kcycles["segments"] <= 1.6 * c.kcycles["causal"], c
    assert len({c.shape for c in table}) == len(table)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: no TPU compiler (pip install libtpu==0.0.42.1)",
)
def test_lines_of_the_shipped_table_compile_to_what_they_say(monkeypatch, capsys):
    """Red if the kernels changed and certified.csv did not: run tools/certify_kernels.py."""
    monkeypatch.setattr(sys, "argv", ["certify_kernels.py", "--check", "3"])
    assert certify.main() == 0, capsys.readouterr().out
