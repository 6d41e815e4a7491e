"""Budgets of the shipped recipes: what the compiler made of each, and what may not grow unnoticed.

A budget holds HBM, host memory, FLOPs and collectives of one program on one slice, of one device.
All of it is compiler-predicted, with the versions that predicted it.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lemur_jax.plan.analysis import Analysis

GROWTH = 0.02  # of HBM, host memory and a collective's bytes
MORE_FLOPS = 0.005


@dataclasses.dataclass(frozen=True)
class Budget:
    """Of one program, on one device.

    Attributes:
      hbm_bytes, host_bytes: needed.
      usable_bytes: HBM of a device.
      hardware_flops: of one run of the program; model_flops: what the mathematics needs.
      collectives: "all-gather bf16 over fsdp, async" -> {"times", "bytes"}.
      seconds: "3 hidden", "3 exposed", "1 hidden", "1 exposed" -> the time model's.
      tokens: that the program works on, over all devices.
    """

    hbm_bytes: int
    host_bytes: int
    usable_bytes: int
    hardware_flops: float
    model_flops: float
    collectives: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]
    tokens: int


def budget_of(found: Analysis) -> Budget:
    """What a compiled program takes now."""
    collectives: dict[str, dict[str, float]] = {}
    for t in found.cost.collectives:
        how = "async" if t.asynchronous else "sync"
        entry = collectives.setdefault(
            f"{t.opcode} {t.dtype} over {t.axes}, {how}", {"times": 0.0, "bytes": 0.0}
        )
        entry["times"] += t.times
        entry["bytes"] += t.payload_bytes
    return Budget(
        hbm_bytes=int(found.needed_bytes),
        host_bytes=int(found.memory.host_bytes),
        usable_bytes=int(found.compiled.where.chip.hbm_bytes),
        hardware_flops=found.flops.hardware,
        model_flops=found.flops.model,
        collectives=collectives,
        seconds={f"{axes} {how}": s for (axes, how), s in found.cost.corners.items()},
        tokens=found.tokens,
    )


def excesses(now: Budget, allowed: Budget) -> Iterator[str]:
    """One line for each way in which a program outgrew its budget."""
    gib = 2**30
    for field in ("hbm_bytes", "host_bytes"):
        a, b = getattr(now, field), getattr(allowed, field)
        if a > b * (1 + GROWTH):
            more = f"{100 * (a / b - 1):.1f} % more" if b else "none was allowed"
            yield f"{field}: {a / gib:.2f} GiB, the budget is {b / gib:.2f} GiB ({more})"
    if now.hardware_flops > allowed.hardware_flops * (1 + MORE_FLOPS):
        yield (
            f"hardware_flops: {now.hardware_flops / 1e12:,.1f} TFLOP, the budget is "
            f"{allowed.hardware_flops / 1e12:,.1f}"
        )
    for name, is_now in now.collectives.items():
        was = allowed.collectives.get(name)
        if was is None:
            yield f"a new collective: {name}, {is_now['times']:.0f} times"
            continue
        if is_now["times"] > was["times"]:
            yield f"{name}: {is_now['times']:.0f} times, the budget is {was['times']:.0f}"
        if is_now["bytes"] > was["bytes"] * (1 + GROWTH):
            yield (
                f"{name}: {is_now['bytes'] / gib:.2f} GiB, the budget is {was['bytes'] / gib:.2f}"
            )


def read(path: Path) -> dict[str, Budget]:
    """Budgets by recipe; empty where there is no file."""
    if not path.exists():
        return {}
    stored: dict[str, Any] = json.loads(path.read_text())
    return {name: Budget(**fields) for name, fields in stored["budgets"].items()}


def write(path: Path, budgets: Mapping[str, Budget], made_with: Mapping[str, str]) -> None:
    """One file for all recipes, in order of their names."""
    fields = {name: dataclasses.asdict(budgets[name]) for name in sorted(budgets)}
    text = json.dumps({"compiler_predicted_by": dict(made_with), "budgets": fields}, indent=1)
    path.write_text(text + "\n")
