"""The generator of the table of certified shapes, on a toy kernel and on made-up results."""

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import certify_kernels as certify  # noqa: E402
import kernel_cases  # noqa: E402
from lemur_kernels.attention import shapes  # noqa: E402
from lemur_kernels.attention.tilings import Tiling  # noqa: E402
from tpu_compiler.cases import Case  # noqa: E402

HERE = str(Path(__file__).resolve().parent)
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: no TPU compiler (pip install libtpu==0.0.42.1)",
)


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
    would win), or what had no room is dropped, or another length compares one block size only."""
    found, asked = _attempts({512: 8, 2048: 4, 4096: 4, 8192: 2, 32768: 0}, accept=2)
    assert {seq: _best(tried) for seq, tried in found.items()} == {
        512: (30, 8),  # more room than the reference: its own first one as well
        2048: (20, 4),
        4096: (20, 4),
        8192: (20, 2),  # 20, 4 and 30, 4 have no room; then in their order
        32768: None,
    }
    tried = {n: [(b, h) for seq, b, h in asked if seq == n] for n in found}
    assert tried[4096] == [(30, 8), (30, 4), (20, 8), (20, 4)]  # two block sizes accepted
    assert tried[512] == [(20, 4), (30, 4), (30, 8)]
    assert tried[8192] == [(20, 4), (30, 4), (30, 8), (30, 2), (20, 8), (20, 2)]
    assert len(tried[32768]) == 9


def test_a_journal_cut_off_by_a_kill_is_read(tmp_path):
    """Red if journal_of raises on a half line."""
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps({"key": "a", "result": {"ok": True}}) + '\n{"key": "b", "resu')
    assert list(certify.journal_of(path)) == ["a"]
    assert certify.journal_of(tmp_path / "none") == {}


@needs_compiler
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


def _run(monkeypatch, *given: str) -> int:
    monkeypatch.setattr(sys, "argv", ["certify_kernels.py", *given])
    shapes.certificates.cache_clear()
    return certify.main()


def _line(seq: int = 4096, **fields) -> shapes.Certificate:
    shape = shapes.Shape("v5e", "forward", "bfloat16", 128, 64, 8, seq)
    masks = {"causal": 1.0, "segments": 1.0, "window": 1.0}
    return shapes.Certificate(dataclasses.replace(shape, **fields), {"block": 512}, 100, 0, masks)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--jobs", "0"], "'0' must be an integer from 1 on"),
        (["--check", "0"], "'0' must be an integer from 1 on"),
        (["--check", "-1"], "must be an integer from 1 on"),
        (["--seq", "x"], "'x' must be an integer from 1 on"),
        (["--heads", "8x1"], "'8x1' must be query heads / kv heads, as 64/8"),
        (["--heads", "8/0"], "'8/0' must be query heads / kv heads"),
        (["--heads", "8/3"], "'8/3': kv heads must divide the query heads; nearest: 6/3"),
        (["--heads", "7/2"], "nearest: 6/2"),
        (["--heads", "1/2"], "nearest: 2/2"),
        (["--out", "/no/such/place.csv"], "no directory /no/such: make it"),
        (["--out", "/no/such/place.csv", "--check", "1"], "is no table"),
        (["--check", "2", "--seq", "4095"], "no line of .* has all of the given"),
        (["--summary", "--chip", "v4", "--heads", "6/3"], "no line of .* has all of the given"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said(given, message, monkeypatch, capsys):
    """Red if a `type=` of main goes, or one of its parser.error."""
    with pytest.raises(SystemExit) as error:
        _run(monkeypatch, *given)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_check_draws_from_the_lines_that_pass_the_filters(tmp_path, monkeypatch, capsys):
    """Red if `chosen` leaves a filter out, or check draws without the seed."""
    table = [_line(seq=128 * i) for i in range(1, 20)] + [_line(chip="v4"), _line(heads=8)]
    out, compiled = tmp_path / "table.csv", []
    out.write_text(shapes.table_text(table, {"kernels": "toy"}))

    def certificate(case, tried):
        compiled.append(certify._shape(case))
        return next(c for c in table if c.shape == compiled[-1])

    monkeypatch.setattr(certify, "certificate", certificate)
    monkeypatch.setattr(certify.compiling, "missing", lambda: None)
    monkeypatch.setattr(certify.importlib.metadata, "version", lambda name: "0")
    monkeypatch.setattr(certify.Worker, "ask", lambda *_: {})
    toy = ("--out", str(out), "--builder", "toy_kernel:build", "--path", HERE)

    def drawn(*given: str) -> list[shapes.Shape]:
        compiled.clear()
        assert _run(monkeypatch, *toy, *given) == 0
        return [*compiled]

    assert drawn("--check", "9", "--chip", "v4") == [_line(chip="v4").shape]
    assert drawn("--check", "9", "--heads", "8/8") == [_line(heads=8).shape]
    three = drawn("--check", "3", "--seed", "1")
    assert len(three) == 3 and three == drawn("--check", "3", "--seed", "1")
    assert three != drawn("--check", "3", "--seed", "2")
    assert f"3 of {len(table)} lines, --seed 2" in capsys.readouterr().out


def test_lines_of_other_code_are_not_stamped_anew(tmp_path, monkeypatch, capsys):
    """Red if main carries lines over without asking whose they are."""
    out = tmp_path / "table.csv"
    monkeypatch.setattr(certify.compiling, "missing", lambda: None)
    monkeypatch.setattr(certify.importlib.metadata, "version", lambda name: "0")
    made = {"ok": True, "cycles": 1e3, "outside_cycles": 0, "vmem_bytes": 0, "spill_stores": 0}
    made["variants"] = {mask: {"cycles": 1e3} for mask in ("segments", "window")}

    def compile_all(matrix, *_):
        return {case: [({"block": 512}, made)] for group in matrix for case in group}

    monkeypatch.setattr(certify, "run", compile_all)
    toy = ("--out", str(out), "--builder", "toy_kernel:build", "--path", HERE)
    one = ("--chip", "v5e", "--direction", "forward", "--dtype", "bfloat16", "--head-dim", "128")
    one += ("--heads", "64/8")
    new = {"kernels": "toy", "jax": "0", "libtpu": "0"}

    def table(made_with, *lines):
        out.write_text(shapes.table_text(lines, made_with))

    def lengths() -> list[int]:
        shapes.certificates.cache_clear()
        return [c.shape.seq for c in shapes.certificates(out)]

    table(new | {"kernels": "old"}, _line(512), _line(4096))
    with pytest.raises(SystemExit) as error:
        _run(monkeypatch, *toy, *one, "--seq", "4096")
    assert error.value.code == 2
    assert "1 lines of" in (said := capsys.readouterr().err) and "--drop_old" in said
    assert lengths() == [512, 4096] and "kernels old" in shapes.stamp(out)
    assert _run(monkeypatch, *toy, *one, "--seq", "4096", "--drop_old") == 0
    assert lengths() == [4096] and "kernels toy" in shapes.stamp(out)
    assert _run(monkeypatch, *toy, *one, "--seq", "512") == 0  # the same make: both stay
    assert lengths() == [512, 4096]
    table(new | {"kernels": "old"}, _line(512), _line(4096))
    assert _run(monkeypatch, *toy, *one, "--seq", "512", "4096") == 0  # none of the old is left
    assert lengths() == [512, 4096] and "kernels toy" in shapes.stamp(out)


def test_a_summary_says_what_is_certified(monkeypatch, capsys):
    """Red if summary groups by something else, or counts lines twice."""
    lines = [_line(), _line(chip="v4"), _line(heads=32), _line(seq=512, dtype="float32")]
    assert certify.summary(lines) == [
        "head_dim 128 bfloat16 seq 4096: 3 of 4 = v5e, v4 x heads 64/8, 32/8 x forward",
        "head_dim 128 float32 seq 512: 1 of 1 = v5e x heads 64/8 x forward",
    ]
    assert _run(monkeypatch, "--summary") == 0
    assert "head_dim 128 bfloat16" in capsys.readouterr().out


@needs_compiler
def test_the_shipped_table_was_compiled_from_the_shipped_kernels():
    """Red if steps.py, tpu_forward.py or tpu_backward.py changed and certified.csv did not."""
    assert f"kernels {kernel_cases.fingerprint()}," in shapes.stamp()


def test_only_the_programs_are_in_the_stamp(tmp_path, monkeypatch):
    """Red if fingerprint reads pallas_tpu.py, or forgets one of the three files."""
    import lemur_kernels.attention as package

    folder = Path(package.__file__).parent
    for path in folder.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    before = kernel_cases.fingerprint()
    monkeypatch.setattr(package, "__file__", str(tmp_path / "__init__.py"))
    assert kernel_cases.fingerprint() == before
    for name in ("pallas_tpu.py", "shapes.py", "api.py"):
        (tmp_path / name).write_text("changed = 1")
    (tmp_path / "steps.py").write_text("# a comment\n" + (tmp_path / "steps.py").read_text())
    assert kernel_cases.fingerprint() == before
    for name in ("steps.py", "tpu_forward.py", "tpu_backward.py"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text + "changed = 1\n")
        assert kernel_cases.fingerprint() != before
        (tmp_path / name).write_text(text)


def test_the_whole_matrix():
    """Red if a chip, width, length, head count or type of the proof is left out."""
    matrix = certify.groups(argparse.Namespace(**certify.MATRIX))
    assert len(matrix) == 5 * 5 * 3 * 2 * 2 and all(len(group) == 7 for group in matrix)
    assert {c.chip for g in matrix for c in g} == {"v4", "v5e", "v5p", "v6e", "v7x"}
    assert matrix[0][0].head_dim == 128 and matrix[0][0].dtype == "bfloat16"


def test_the_shipped_table_is_one_that_the_kernels_take():
    """Red if certified.csv has a column that Tiling lacks, a program larger than the chip, or lacks
    a shape of the matrix."""
    table = shapes.certificates()
    assert table
    for c in table:
        assert Tiling(**c.blocks).block % 128 == 0, c
        assert c.vmem_kib * 1024 <= certify.CHIPS[c.shape.chip].vmem_bytes, c
        assert 0 < c.kcycles["segments"] <= 1.6 * c.kcycles["causal"], c
    matrix = certify.groups(argparse.Namespace(**certify.MATRIX))
    assert {c.shape for c in table} >= {certify._shape(case) for group in matrix for case in group}
    assert len({c.shape for c in table}) == len(table)


@pytest.mark.slow
@needs_compiler
def test_lines_of_the_shipped_table_compile_to_what_they_say(monkeypatch, capsys):
    """Red if the kernels changed and certified.csv did not: run tools/certify_kernels.py."""
    monkeypatch.setattr(sys, "argv", ["certify_kernels.py", "--check", "3"])
    assert certify.main() == 0, capsys.readouterr().out
