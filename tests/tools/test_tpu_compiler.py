"""The reader of the TPU compiler's final schedule: trees, names, counts, bytes, processes."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from tpu_compiler import bundles, cases, cost, outside, topology  # noqa: E402
from tpu_compiler.worker import Worker  # noqa: E402

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: no TPU compiler (pip install libtpu==0.0.42.1)",
)
HERE = str(Path(__file__).resolve().parent)

# One loop over the grid; in it a region that is skipped and an inner loop behind a guard.
SCHEDULE = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0 } /* Start region 0 */
   0x1 LB: > { %s2 = sphi %s1 } /* Start region 9 */
   0x2   : > { %9 = sbr.rel (%p1) /* loc("[]":0:0) */ target = $region3 }
   0x3   :  {} /* End region 2 */
   0x4   : > { %v1 = vmatmul.mubr.bf16.gmra.mxu0 %v0 /* loc("[full]":0:0) */  ;;
  %v2 = vld [vmem:[#a]] /* loc("[full/qk]":0:0) */ }
   0x5   : > { %v3 = vadd.f32 %v1, %v2 /* loc("[full]":0:0) */ }
   0x6 PF: > { %s3 = sadd.s32 1, %s2 } /* Start/End empty region 3 */
   0x7   : > { %10 = sbr.rel (%p2) target = $region5 }
   0x8   :  {}
   0x9 LB: >> { %v4 = vadd.f32 %v4, %v1 /* loc("[head]":0:0) */ } /* Start region 6 */
   0xa   : >> { %11 = sbr.rel (!%p3) target = $region6 }
   0xb   :  {} /* End region 6 */
   0xc PF: > { %s4 = sadd.s32 1, %s3 } /* Start/End empty region 5 */
   0xd   : > { %12 = sbr.rel (!%p4) target = $region9 }
   0xe   :  {} /* End region 9 */
   0xf PF:  { %13 = vsyncpa [#a], 1 } /* Start region 10 */
"""
NAMES = "MXU, VALU, VLOAD:FILL, VSTORE:SPILL"


def _kernel(tmp_path: Path, schedule: str = SCHEDULE) -> bundles.Kernel:
    count = sum(line.strip().startswith("0") for line in schedule.splitlines())
    rows = ["1 1 0 0" if address == 4 else "0 1 0 0" for address in range(count)]
    table = "\n".join(["== CAPACTIY:", NAMES, "4 2 1 1", "== UTILIZATION:", *rows]) + "\n"
    prefix = tmp_path / "123-toy.1"
    Path(f"{prefix}-02-final_bundles.txt").write_text(schedule)
    Path(f"{prefix}-00-final_hlo-static-per-bundle-utilization.txt").write_text(table)
    assert bundles.dumped(tmp_path) == [str(prefix)]
    return bundles.read_kernel(str(prefix), branch_delay=1)


COUNTS = {"grid": 10, "full": 7, "head": 40}


def test_a_schedule_becomes_a_tree(tmp_path):
    """Red if a region starts in its branch's delay slot (bundles._tree without branch_delay)."""
    kernel = _kernel(tmp_path)
    loop = kernel.root.children[0]
    assert (loop.kind, loop.start, loop.stop) == ("loop", 1, 15)
    inner = [(n.kind, n.start, n.stop) for n in loop.children]
    assert inner == [("region", 4, 6), ("region", 9, 12)]
    guarded = loop.children[1].children[0]
    assert (guarded.kind, guarded.start, guarded.stop) == ("loop", 9, 12)
    assert kernel.bundles[4].scopes == ("full", "full/qk")
    assert kernel.bundles[4].mxu_rows == 16


def test_total_is_bundles_times_named_counts(tmp_path):
    """Red if cost.attribute gives a named region its parent's count."""
    chip = topology.CHIPS["v5e"]
    found = cost.attribute(_kernel(tmp_path), COUNTS, chip)
    by_path = {(r.path, r.kind): r for r in found.regions}
    # prologue 2 bundles once, grid loop 9 bundles in 10 + 2 rounds, full 2, head 3
    assert [by_path["", kind].bundles for kind in ("kernel", "loop")] == [2, 9]
    assert by_path["full", "region"].executed == 7 and by_path["head", "loop"].executed == 40
    full = max(2, 16 / chip.mxus)  # the clamp: 16 rows through 4 matrix units of a row a cycle
    assert found.cycles == 2 + 9 * 12 + 7 * full + 40 * 3
    assert found.schedule_cycles == 2 + 9 * 12 + 7 * 2 + 40 * 3
    assert found.mxu_cycles == 7 * 16 / 4
    assert found.slot_share("MXU") == 7 / found.cycles / 4


def test_two_cores_share_the_work_unless_told_otherwise(tmp_path):
    """Red if attribute ignores "critical"."""
    kernel, chip = _kernel(tmp_path), topology.CHIPS["v4"]
    even = cost.attribute(kernel, COUNTS, chip)
    alone = cost.attribute(kernel, COUNTS | {"critical": 1.0}, chip)
    assert alone.cycles == 2 * even.cycles
    assert even.regions[0].executed == 2  # the prologue, once a core


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"grid": 10, "full": 7}, "loop at 0x9 .* has no name: put its body in jax.named_scope"),
        ({"full": 7, "head": 40}, "counts must give 'grid'"),
        ({"grid": 10, "a/full": 7, "b/full": 1, "head": 4}, "'full' at 0x4 has no count"),
    ],
)
def test_what_cannot_be_counted_is_an_error(tmp_path, counts, message):
    """Red if an unnamed loop runs once, or an ambiguous name takes the first count."""
    with pytest.raises(ValueError, match=message):
        cost.attribute(_kernel(tmp_path), counts, topology.CHIPS["v4"])


def test_a_name_without_region_is_reported(tmp_path):
    """Red if not_found is dropped: a kind the compiler folded into its parent would go unseen."""
    found = cost.attribute(_kernel(tmp_path), COUNTS | {"tiny": 3}, topology.CHIPS["v4"])
    assert found.not_found == ["tiny"]


NESTED = """
     0   :  { %s1 = smov 0 } /* Start region 0 */
   0x1 LB: > { %s2 = sphi %s1 } /* Start region 9 */
   0x2 LB: >> { %v1 = vadd.f32 %v0, %v0 /* loc("[strip]":0:0) */ } /* Start region 8 */
   0x3 LB: >>> { %s3 = sphi %s1 } /* Start region 7 */
   0x4 LB: >>>> { %v2 = vadd.f32 %v1, %v1 /* loc("[square]":0:0) */ } /* Start region 6 */
   0x5   : >>>> { %11 = sbr.rel (!%p3) target = $region6 }
   0x6   :  {} /* End region 6 */
   0x7 PF: >>> { %12 = sbr.rel (!%p4) target = $region7 } /* Start region 20 */
   0x8   :  {}
   0x9 PF: >> { %13 = sbr.rel (!%p5) target = $region8 } /* Start region 21 */
   0xa   :  {}
   0xb PF: > { %14 = sbr.rel (!%p6) target = $region9 } /* Start region 22 */
   0xc   :  {}
   0xd PF:  {} /* Start region 10 */
"""


@pytest.mark.parametrize("merged", [False, True])
def test_loops_within_loops(tmp_path, merged):
    """Red if _implied is gone (a loop that holds only a loop has no instructions to name it), or if
    _key keeps to the parent's whole path (merged: a body whose loop has one round lies in the
    strips' loop and gives it its name)."""
    counts = {"grid": 5, "strip": 2, "strip/squares": 30, "strip/squares/square": 400}
    if merged:
        counts["strip/body"] = 2
    schedule = NESTED.replace("[strip]", "[body]" if merged else "[strip]")
    found = cost.attribute(_kernel(tmp_path, schedule), counts, topology.CHIPS["v5e"])
    assert [(r.bundles, r.executed) for r in found.regions] == [
        (2, 1),
        (3, 7),
        (3, 2),
        (3, 30),
        (3, 400),
    ]


def test_an_unknown_product_is_an_error(tmp_path):
    """Red if bundles._rows takes unknown operand types for bf16."""
    with pytest.raises(ValueError, match="vmatmul.f4.gmra: operand type"):
        _kernel(tmp_path, SCHEDULE.replace("mubr.bf16.gmra.mxu0", "f4.gmra"))


def test_a_branch_to_nowhere_in_a_loop_is_an_error(tmp_path):
    """Red if lost branch targets are skipped everywhere."""
    with pytest.raises(ValueError, match="branch at 0x2 to region 77, which is nowhere"):
        _kernel(tmp_path, SCHEDULE.replace("$region3", "$region77"))


HLO = """HloModule m

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  ROOT %twice = f32[8,128]{1,0} add(%x, %x)
}

%c (q: f32[8,128]) -> f32[8,8] {
  ROOT %o = f32[8,8]{1,0} convolution(%q, %q), dim_labels=bf_oi->bf
}

ENTRY %main (a: bf16[4,256]) -> f32[8,128] {
  %a = bf16[4,256]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,256]{1,0} bitcast(%a)
  %k = (f32[8,128]{1,0}, u8[16]{0}) custom-call(%b), custom_call_target="tpu_custom_call", m={
}}
  %y = f32[8,128]{1,0} get-tuple-element(%k), index=0
  %f = f32[8,128]{1,0} fusion(%y, %a), kind=kLoop, calls=%e
  %d = f32[8,8]{1,0} fusion(%f), calls=%c, backend_config={"estimated_cycles":"7000000"}
  %s = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]) copy-start(%f)
  %w = (s32[], f32[8,128]{1,0}) while(%f), body=%body, config={"known_trip_count":{"n":"5"}}
  ROOT %z = f32[8,128]{1,0} get-tuple-element(%w), index=1
}
"""


def test_operations_outside_the_kernels():
    """Red if outside charges the Pallas call, a loop's body once, or a product by bytes alone."""
    array, chip = 8 * 128 * 4, topology.CHIPS["v5e"]
    a_byte = chip.clock_hz / chip.hbm_bytes_per_s
    expected = {"f": (2 * array + 4 * 256 * 2) * a_byte, "w": 5 * 3 * array * a_byte, "d": 7e6}
    assert outside.outside(HLO, chip) == pytest.approx(expected)


def test_a_loop_of_unknown_length_is_an_error():
    """Red if a while without known_trip_count counts once."""
    with pytest.raises(ValueError, match="%w outside the kernels loops an unknown number"):
        outside.outside(HLO.replace("known_trip_count", "trips"), topology.CHIPS["v4"])


@pytest.mark.parametrize(
    ("chip", "floor"), [("v4", 1.08), ("v5e", 2.16), ("v5p", 1.08), ("v6e", 0.84)]
)
def test_the_floor_of_the_design_study(chip, floor):
    """Red if the diagonal blocks count whole (1.18 on v4)."""
    assert cases.floor_cycles(cases.Case(chip=chip)) / 1e6 == pytest.approx(floor, abs=0.006)


def test_the_floor_of_documents_is_the_sum_of_theirs():
    """Red if blocks between documents count."""
    one = cases.floor_cycles(cases.Case(seq=512, lengths=(512,)))
    eight = cases.floor_cycles(cases.Case(seq=4096, lengths=(512,) * 8))
    assert eight == pytest.approx(8 * one)
    with pytest.raises(ValueError, match="lengths sum to 600, more than seq=512"):
        cases.segment_ids(cases.Case(seq=512, lengths=(300, 300)))


def test_a_case_survives_json():
    """Red if case_of leaves lists where tuples were (the case is a dictionary's key)."""
    case = cases.Case(blocks=(("heads", 2),), lengths=(5, 6))
    again = cases.case_of(json.loads(json.dumps(dataclasses.asdict(case))))
    assert again == case and again.key() == case.key() and hash(again) == hash(case)


def _measured(chip: str, builder: str = "toy_kernel:build") -> dict:
    worker = Worker((HERE,))
    try:
        return worker.ask({"builder": builder, "case": dataclasses.asdict(cases.Case(chip=chip))})
    finally:
        worker.stop()


def _check_toy(chip: str) -> None:
    result = _measured(chip)
    assert result["ok"], result
    regions = result["kernels"][0]["regions"]
    named = {r["path"]: r for r in regions if r["how"] == "named"}
    c = topology.CHIPS[chip]
    # 512 x 128 x 512 products: 512 rows through 512 / mxu_size columns of the units, twice in
    # "full"; head_dim 128 half fills a 256 wide unit.
    passes = 512 * (512 / c.mxu_size) / (c.mxus * c.mxu_rows_per_cycle)
    assert {path: r["mxu_cycles"] for path, r in named.items()} == {
        "start": 0,
        "full": 2 * passes,
        "head": passes,
        "finish": 0,
    }
    assert {path: r["executed"] for path, r in named.items()} == {
        "start": 16,
        "full": 56,
        "head": 32,
        "finish": 16,
    }
    assert result["kernels"][0]["not_found"] == []
    total = sum(r["cycles"] * r["executed"] for r in regions) / c.cores
    assert result["cycles"] == round(total) and result["mxu_cycles"] == round(
        (56 * 2 * passes + 32 * passes) / c.cores
    )
    unnamed = sum(r["cycles"] * r["executed"] for r in regions if r["how"] != "named") / c.cores
    assert unnamed < 0.35 * total  # a toy: short steps
    assert 4 < result["vmem_bytes"] / 2**20 < 6  # 2 MiB of scratch, two buffers of each block
    moved = 2 * 2 * 4096 * 512 * 2  # the sum outside reads and writes the result once
    assert result["outside_cycles"] >= int(moved / c.hbm_bytes_per_s * c.clock_hz)


@needs_libtpu
def test_a_kernel_by_its_names():
    """Red if scopes.install lets equal operations share a lowering (never_shared): "head" then
    carries "full"'s name."""
    _check_toy("v5e")


@needs_libtpu
@pytest.mark.slow
def test_a_grid_that_one_core_runs_alone_is_reported():
    """Red if one_core looks for "arbitrary" instead: every grid has one."""
    assert _measured("v4", "toy_kernel:alone")["one_core"] == ["toy.1"]
    assert _measured("v4")["one_core"] == []


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4", "v5p", "v6e", "v7x"])
def test_a_kernel_by_its_names_on_every_chip(chip):
    """Red if topology.CHIPS has a wrong rate or delay for the chip."""
    _check_toy(chip)


@needs_libtpu
def test_a_dead_process_is_a_result_and_the_next_question_is_answered():
    """Red if Worker.ask does not start a new process after a death."""
    worker = Worker((HERE,))
    question = {"case": dataclasses.asdict(cases.Case(chip="v5e"))}
    try:
        died = worker.ask(question | {"builder": "toy_kernel:dies"})
        assert (died["ok"], died["why"]) == (False, "crashed")
        unread = worker.ask(question | {"builder": "toy_kernel:unnamed"})
        assert unread["why"] == "unread" and "has no name" in unread["error"]
    finally:
        worker.stop()


_SCHEDULES = """
import hashlib, os, sys, tempfile
from pathlib import Path
named, chip, flag = sys.argv[1] == "named", sys.argv[2], sys.argv[3] == "flag"
from tpu_compiler import compiling, scopes
if not flag:
    scopes.LIBTPU_FLAG, scopes.install = "", lambda: None
folder = Path(tempfile.mkdtemp())
compiling.start(folder)
import toy_kernel
from tpu_compiler.cases import Case
built = toy_kernel.build(Case(chip=chip), named)
compiling.compile_for(chip, built.fn, *built.args)
table = next(folder.glob("*toy*utilization.txt"))
print(hashlib.sha256(table.read_bytes()).hexdigest())
"""


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", topology.CHIPS)
def test_names_cost_nothing(chip):
    """The schedule with names is the schedule without: same slots in every bundle.

    Red if _named in toy_kernel.py also stores a constant, as a marker would.
    """
    digests = {
        subprocess.run(
            [sys.executable, "-c", _SCHEDULES, named, chip, flag],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": f"{TOOLS}:{HERE}"},
        ).stdout
        for named, flag in (("named", "flag"), ("bare", "plain"))
    }
    assert len(digests) == 1 and len(digests.pop()) > 60
