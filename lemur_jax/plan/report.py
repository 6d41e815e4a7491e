"""What `lemur plan` says about one compiled program: a page for people, JSON for programs."""

import collections
import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from lemur_jax.plan import cost as cost_model
from lemur_jax.plan.analysis import Analysis

GIB = 2**30
DAY = 86400.0
SHOWN_FINDINGS = 8
SMALL = 5e-4  # of the HBM: owners below it share a row
ACCIDENTAL = 0.05  # of the model's FLOPs: worth a line
WINDOWED = (
    "the partitioner may have split products into windows; TrainConfig.compiler_options "
    "'xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000' turns that off"
)
NOTE = "compiler-predicted (libtpu's own schedule and buffer assignment); times are a model's"


def show(console: Console, found: Analysis) -> None:
    """Prints the page."""
    console.print(f"[bold]{found.compiled.name}[/bold]: {verdict(found)}", highlight=False)
    for table in (_memory(found), _collectives(found), _flops(found), _time(found), _knobs(found)):
        if table is not None:
            console.print(table)
    _show_findings(console, found)
    if found.flops.accidental > ACCIDENTAL * found.flops.model:
        console.print(
            f"{100 * found.flops.accidental / found.flops.model:.0f} % of the model's FLOPs are "
            f"computed by accident: {WINDOWED}",
            markup=False,
        )
    for line in found.cost.unknown:
        console.print(f"Not known to the time model: {line}", markup=False)
    console.print(f"Assumptions: {NOTE}.")
    for line in cost_model.ASSUMPTIONS:
        console.print(f"  {line}", markup=False)


def _show_findings(console: Console, found: Analysis) -> None:
    alike = collections.Counter((f.text, f.op_name or f.name) for f in found.findings)
    if alike:
        console.print("Worth a look, most bytes first:")
    for (text, where), count in list(alike.items())[:SHOWN_FINDINGS]:
        times = f"{count} x " if count > 1 else ""
        console.print(f"  {times}{text} ({where})", markup=False, highlight=False)
    if len(alike) > SHOWN_FINDINGS:
        console.print(f"  and {len(alike) - SHOWN_FINDINGS} more kinds (all of them: --json)")


def verdict(found: Analysis) -> str:
    """`fits: ...`, with the HBM that is used and spare."""
    usable = found.compiled.where.chip.hbm_bytes
    return (
        f"fits (the compiler's verdict): {found.needed_bytes / GIB:.2f} of {usable / GIB:.2f} GiB "
        f"HBM, {found.spare_bytes / GIB:.2f} to spare"
    )


def _memory(found: Analysis) -> Table:
    memory, rows = found.memory, Table("HBM owner, at the peak", "GiB a device", "share")
    rows.title = f"{100 * memory.attributed:.1f} % attributed"
    small = {owner: n for owner, n in memory.owners.items() if n < SMALL * memory.total}
    for owner, size in memory.owners.items():
        if owner not in small:
            rows.add_row(owner, f"{size / GIB:.3f}", f"{100 * size / memory.total:.1f} %")
    if small:
        size = sum(small.values())
        name = f"{len(small)} others (all of them: --json)"
        rows.add_row(name, f"{size / GIB:.3f}", f"{100 * size / memory.total:.1f} %")
    rows.add_row("program code", f"{found.compiled.code_bytes / GIB:.3f}", "")
    rows.add_row("sum", f"{found.needed_bytes / GIB:.3f}", "", style="bold")
    # Larger than what the compiler assigned, and programs fit above the limit by it: no verdict.
    held = found.compiled.argument_bytes + found.compiled.temp_bytes
    rows.add_row("arguments + temp of memory_analysis()", f"{held / GIB:.3f}", "", style="dim")
    if memory.host_bytes:
        rows.add_row("host memory, a device", f"{memory.host_bytes / GIB:.3f}", "")
    return rows


def _collectives(found: Analysis) -> Table | None:
    if not found.cost.collectives:
        return None
    rows = Table("collective", "mesh axes", "dtype", "async", "times", "GiB", "s, 3 axes", "s, 1")
    rows.title = f"collectives of one {_unit(found)}, a device"
    for t in found.cost.collectives:
        rows.add_row(
            t.opcode,
            t.axes,
            t.dtype,
            "yes" if t.asynchronous else "no",
            f"{t.times:,.0f}",
            f"{t.payload_bytes / GIB:.2f}",
            f"{t.seconds[3]:.3f}",
            f"{t.seconds[1]:.3f}",
        )
    return rows


def _flops(found: Analysis) -> Table:
    flops, rows = found.flops, Table("FLOPs, a device", "TFLOP", "of the model's")
    for name in ("hardware", "model", "recomputed", "accidental"):
        value = getattr(flops, name)
        rows.add_row(name, f"{value / 1e12:,.1f}", f"{100 * value / flops.model:.1f} %")
    return rows


def _time(found: Analysis) -> Table:
    rows = Table("predicted", "best", "worst")
    rows.title = "best: async hidden, 3 axes; worst: exposed, 1 axis"
    best, worst = found.interval
    corners = found.cost.corners
    for axes in (3, 1):
        hidden, exposed = (corners[axes, how] for how in ("hidden", "exposed"))
        rows.add_row(
            f"s a {_unit(found)}, torus axes {axes}: hidden, exposed",
            f"{_seconds(hidden)}",
            _seconds(exposed),
        )
    chips = found.compiled.where.chips
    for name, per in (("tokens/s", 1), ("tokens/s a chip", chips)):
        rows.add_row(name, *(f"{found.tokens / s / per:,.0f}" for s in (best, worst)))
    if found.compiled.name == "train":
        low, high = found.mfu
        rows.add_row("MFU (bf16 peak)", f"{100 * high:.1f} %", f"{100 * low:.1f} %")
        steps = found.compiled.config.steps
        days = (f"{steps * s / DAY:,.1f}" for s in (best, worst))
        rows.add_row(f"days for {steps:,} steps", *days)
    for kind, seconds in found.cost.kinds.items():
        if seconds > 0:
            at_one = found.cost.seconds_of(kind, 1)
            rows.add_row(f"  {kind}: s at 3 axes, 1 axis", _seconds(seconds), _seconds(at_one))
    return rows


def _knobs(found: Analysis) -> Table | None:
    if not found.knobs:
        return None
    rows = Table("knob", "change", "HBM, GiB", "host, GiB", "s a step", "why")
    rows.title = "what a setting would buy: a model; only compiling says what fits"
    for k in found.knobs:
        low, high = sorted(k.seconds)
        rows.add_row(
            k.setting,
            k.change,
            f"{k.hbm_bytes / GIB:+.1f}",
            f"{k.host_bytes / GIB:+.1f}" if k.host_bytes else "",
            f"{low:+.1f} .. {high:+.1f}",
            k.why,
        )
    return rows


def _unit(found: Analysis) -> str:
    return {"train": "step", "evaluate": "batch", "prefill": "prefill", "decode": "token"}[
        found.compiled.name
    ]


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def as_json(found: Analysis) -> dict[str, Any]:
    """The page's figures: bytes, seconds, FLOPs, of one device unless the name says otherwise."""
    compiled, where = found.compiled, found.compiled.where
    best, worst = found.interval
    result = {
        "program": compiled.name,
        "topology": where.name,
        "fits": True,
        "predicted_by": NOTE,
        "chips": where.chips,
        "devices": where.devices,
        "mesh": compiled.mesh,
        "attention": compiled.config.model.attention,
        "loss": compiled.config.loss.implementation,
        "options": list(compiled.config.compiler_options),
        "hbm_bytes": {
            "usable": where.chip.hbm_bytes,
            "needed": found.needed_bytes,
            "spare": found.spare_bytes,
            "arguments": compiled.argument_bytes,
            "temporary": compiled.temp_bytes,
            "code": compiled.code_bytes,
            "compiler_peak": compiled.peak_bytes,
            "host": found.memory.host_bytes,
            "owners": dict(found.memory.owners),
            "attributed": found.memory.attributed,
        },
        "collectives": [
            dataclasses.asdict(t) | {"seconds": {str(k): v for k, v in t.seconds.items()}}
            for t in found.cost.collectives
        ],
        "flops": {
            name: getattr(found.flops, name)
            for name in ("hardware", "model", "recomputed", "accidental")
        },
        "seconds": {
            "best": best,
            "worst": worst,
            "corners": {f"{axes} {how}": s for (axes, how), s in found.cost.corners.items()},
            "kinds": found.cost.kinds,
        },
        "tokens": found.tokens,
        "tokens_per_s": {"best": found.tokens / best, "worst": found.tokens / worst},
        "assumptions": list(cost_model.ASSUMPTIONS),
        "unknown": list(found.cost.unknown),
        "knobs": [dataclasses.asdict(k) for k in found.knobs],
        "findings": [dataclasses.asdict(f) for f in found.findings],
        "compile_seconds": compiled.seconds,
    }
    if compiled.name == "train":
        result["mfu"] = dict(zip(("worst", "best"), found.mfu))
        days = (compiled.config.steps * s / DAY for s in (best, worst))
        result["days"] = dict(zip(("best", "worst"), days))
    return result
