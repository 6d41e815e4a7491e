"""Compiles every shipped recipe for its TPU slices and holds it against its budget.

    python tools/golden_pods.py                      # all of them; fails where a budget is exceeded
    python tools/golden_pods.py --only v4-512        # those whose name has this text
    python tools/golden_pods.py --update             # writes what the compiler says now
    python tools/golden_pods.py --table              # the budgets as a Markdown table

A program that needs 2 % more HBM, or a collective more, fails until its budget is changed on
purpose (--update, and the change to configs/budgets.json reviewed). Needs no TPU: libtpu compiles.
"""

import argparse
import concurrent.futures
import sys
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = ROOT / "configs" / "budgets.json"
PRETRAIN, SFT = "pretrain_lemur", "sft_lemur"
# run, hardware file, slice, programs
RECIPES = (
    (f"{PRETRAIN}_70b", "70b_v4-512", "v4-512", ("train", "evaluate")),
    (f"{PRETRAIN}_70b", "70b_v4-512_no_offload", "v4-512", ("train",)),
    (f"{PRETRAIN}_70b", "70b_v4-128", "v4-128", ("train", "evaluate")),
    (f"{PRETRAIN}_70b", "70b_v5p-128", "v5p-128", ("train", "evaluate")),
    (f"{PRETRAIN}_70b", "70b_v5p-512", "v5p-512", ("train",)),
    (f"{PRETRAIN}_70b", "70b_v5p-1024", "v5p-1024", ("train", "evaluate")),
    (f"{PRETRAIN}_70b", "70b_v5e-256", "v5e-256", ("train", "evaluate")),
    (f"{PRETRAIN}_70b", "70b_v6e-256", "v6e-256", ("train", "evaluate")),
    (f"{PRETRAIN}_13b", "13b_v4-32", "v4-32", ("train",)),
    (f"{PRETRAIN}_13b", "13b_v5e-16", "v5e-16", ("train",)),
    (f"{PRETRAIN}_7b", "7b_v4-8", "v4-8", ("train", "evaluate")),
    (f"{PRETRAIN}_7b", "7b_v4-32", "v4-32", ("train",)),
    (f"{PRETRAIN}_7b", "7b_v5e-16", "v5e-16", ("train", "evaluate")),
    (f"{SFT}_70b", "70b_sft_v4-128", "v4-128", ("train",)),
    (f"{SFT}_70b", "70b_sft_v5p-128", "v5p-128", ("train",)),
    (f"{PRETRAIN}_70b", "70b_serve_v4-16", "v4-16", ("prefill", "decode")),
)


def cases() -> dict[str, tuple[str, str, str, str]]:
    """Name -> (run, hardware, slice, program)."""
    return {
        f"{run} on {hardware}: {program}": (run, hardware, place, program)
        for run, hardware, place, programs in RECIPES
        for program in programs
    }


def compiled_budget(case: tuple[str, str, str, str]):
    """What one case takes now; called in a process of its own."""
    from lemur_jax import cli, settings
    from lemur_jax.config import TrainConfig
    from lemur_jax.plan import cache, command, libtpu, programs
    from lemur_jax.plan.analysis import analyse
    from lemur_jax.plan.budgets import budget_of
    from lemur_jax.plan.serving import default_serving
    from lemur_jax.plan.slices import slice_named

    run, hardware, place, program = case
    libtpu.prepare()
    files = [f"runs/{run}.gin", f"hardware/{hardware}.gin"]
    bindings = ["STEPS=1000"] if run.startswith(SFT) else []
    config, _ = settings.load(TrainConfig, files, bindings, cli.config_classes(), command.UNUSED)
    where = slice_named(place)
    config = programs.resolve(config, where)
    serving = default_serving(config) if program in ("prefill", "decode") else None
    return budget_of(analyse(cache.compile_cached(config, where, program, serving), serving))


def table(budgets) -> str:
    """Markdown: HBM, host, seconds, tokens a second."""
    gib = 2**30
    lines = [
        "| recipe | HBM, GiB (usable) | host, GiB | FLOPs of the model's "
        "| s, 3 axes: hidden / exposed | s, 1 axis | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, b in budgets.items():
        s = b.seconds
        lines.append(
            f"| {name} | {b.hbm_bytes / gib:.2f} ({b.usable_bytes / gib:.2f}) "
            f"| {b.host_bytes / gib:.1f} | {b.hardware_flops / b.model_flops:.2f} "
            f"| {s['3 hidden']:.3g} / {s['3 exposed']:.3g} | {s['1 hidden']:.3g} / "
            f"{s['1 exposed']:.3g} | {b.tokens / s['1 exposed']:,.0f} .. "
            f"{b.tokens / s['3 hidden']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """0: every program is inside its budget."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", default="", help="recipes whose name has this text")
    parser.add_argument("--update", action="store_true", help="write the budgets")
    parser.add_argument("--table", action="store_true", help="print the budgets and stop")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time, 3 GiB each")
    options = parser.parse_args()
    from lemur_jax.plan import budgets
    from lemur_jax.plan.apart import apart
    from lemur_jax.train import ahead

    console = Console(width=max(Console().width, 100))
    allowed = budgets.read(BUDGETS)
    if options.table:
        print(table(allowed))
        return 0
    chosen = {name: case for name, case in cases().items() if options.only in name}
    if not chosen:
        console.print(f"--only={options.only!r} matches none of: {', '.join(cases())}")
        return 2
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        waiting = {pool.submit(apart, compiled_budget, case): name for name, case in chosen.items()}
        for done in concurrent.futures.as_completed(waiting):
            name = waiting[done]
            if done.exception() is not None:
                console.print(f"{name}: {done.exception()}", markup=False, highlight=False)
                failed += 1
                continue
            now = done.result()
            if options.update:
                allowed[name] = now
                budgets.write(BUDGETS, allowed, ahead.versions())
                problems = []
            elif name not in allowed:
                problems = ["has no budget: run with --update"]
            else:
                problems = list(budgets.excesses(now, allowed[name]))
            failed += bool(problems)
            held = f"{now.hbm_bytes / 2**30:.2f} GiB"
            fine = f"{held}, written" if options.update else f"{held}, in its budget"
            verdict = "; ".join(problems) or fine
            console.print(f"{name}: {verdict}", markup=False, highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
