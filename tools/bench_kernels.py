"""Our TPU kernels against the public ones, by the TPU compiler's own final schedule.

    python tools/bench_kernels.py --chip v4 v5e v5p v6e [--only ours splash] [--regions]
    python tools/bench_kernels.py --chip v5e --case "8 x 512" demo --direction forward

Every figure is compiler-predicted (cycles per TensorCore, in millions), nothing ran on a TPU; see
tools/tpu_compiler/cost.py for what is counted. tokamax is compared when it can be imported (from
--path; the README of lemur_kernels/attention installs it).
The exit status is 1 when a compilation failed, 2 for what cannot be compiled.
decode_attention: python tests/kernels/decode_compile_table.py.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import kernel_cases
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tpu_compiler import arguments, compiling, crosscheck
from tpu_compiler.cases import Case, floor_cycles
from tpu_compiler.topology import CHIPS
from tpu_compiler.worker import Worker

DEMO = Path(__file__).with_name("demo_packings.json")
MILLION = 1e6
LEGEND = """compiler-predicted; x floor counts the row passes of needed 512-blocks only.
x documents apart: our kernels on the packed row over our kernels on a batch of its documents, each
in a row of its own that is padded to whole blocks: one call, the same tiling and program. Above 1
is what packing costs; below 1 is what sharing a block saves documents shorter than one."""
# kernel -> {name: (builder, its options)}; blocks are the best of design/tpu.md, section 3
BASELINES = "tpu_compiler.baselines"
OURS = ("kernel_cases:build", {})
KERNELS = {
    "attention": {
        "ours": OURS,
        "splash": (f"{BASELINES}:splash", {}),
        "splash fused": (f"{BASELINES}:splash_fused", {}),
        "flash": (f"{BASELINES}:flash", {}),
        "tokamax": (f"{BASELINES}:tokamax", {}),
        "tokamax kv 256": (f"{BASELINES}:tokamax", {"blocks": [1024, 1024, 256]}),
    },
    "cross_entropy": {
        "ours": OURS,
        "XLA, whole logits": ("kernel_cases:cross_entropy", {"implementation": "reference"}),
        "XLA, our chunks": ("kernel_cases:cross_entropy", {"implementation": "chunked"}),
    },
}
DIRECTIONS = ("forward", "forward+backward")


def packings(seq: int) -> dict[str, list[int]]:
    """{case name: document lengths} of one row of `seq` tokens."""
    shares = (0.34, 0.21, 0.15, 0.11, 0.08, 0.05, 0.04, 0.02)
    unequal = [round(share * seq) for share in shares]
    unequal[-1] += seq - sum(unequal)
    cases = {
        "one document": [seq],
        "8 x 512": [512] * (seq // 512),
        "16 x 256": [256] * (seq // 256),
        "8 unequal": unequal,
    }
    if seq == 4096:
        demo = json.loads(DEMO.read_text())
        for name in ("code", "text"):
            cases |= {f"demo {name} {i}": row for i, row in enumerate(demo[name])}
    return cases


def measure_chip(chip: str, options: argparse.Namespace, step) -> dict:
    """{(direction, implementation): result} of one chip, in a process of its own."""
    worker, results = Worker(tuple(options.path)), {}
    rows = {}
    if options.kernel == "attention":
        for name, lengths in packings(options.seq).items():
            rows[name] = {"lengths": lengths}
            rows[_apart(name)] = {"lengths": lengths, "mask": "apart"}
    try:
        for direction in options.direction:
            case = _case(chip, direction, options, [options.seq])
            for name in options.only:
                builder, extra = KERNELS[options.kernel][name]
                blocks = tuple(options.blocks) if name == "ours" else ()
                asked = dataclasses.replace(case, blocks=blocks)
                job = {"case": dataclasses.asdict(asked), "builder": builder}
                job |= {"options": extra, "variants": rows if name == "ours" else {}}
                results[direction, name] = worker.ask(job)
                step()
    finally:
        worker.stop()
    return results


def tables(chip: str, results: dict, options: argparse.Namespace) -> list[Table | str]:
    """One table per direction: implementations; then ours on each packing."""
    found = []
    for direction in options.direction:
        mine = {n: r for (d, n), r in results.items() if d == direction}
        floor = floor_cycles(_case(chip, direction, options, [options.seq]))
        totals = {n: _total(r) for n, r in mine.items() if r["ok"]}
        others = [total for name, total in totals.items() if name != "ours"]
        best = min(others, default=math.nan)
        table = Table(
            title=f"{chip} {direction}, one document of {options.seq}", title_justify="left"
        )
        for column in (
            *("kernel", "Mcycles", "in kernels", "outside", "unclamped", "MXU", "VALU"),
            *("spill st/ld", "VMEM MiB", "temp MiB", "bundles", "compile s", "x best", "x floor"),
        ):
            name = column in ("kernel", "spill st/ld")
            table.add_column(column, justify="left" if name else "right", no_wrap=name)
        for name, result in mine.items():
            if result["ok"]:
                table.add_row(name, *_row(result, best, floor))
        found.append(table)
        for name, result in mine.items():
            if not result["ok"]:
                found.append(f"  {name}: {result['why']}: {result['error']}")
            elif options.regions:
                found += [regions(kernel) for kernel in result["kernels"]]
            if alone := result.get("one_core"):
                more = sum(k["cycles"] for k in result["kernels"] if k["name"] in alone)
                found.append(
                    f"  {name}: no parallel dimension in {', '.join(alone)}: one of the two cores "
                    f"would run it alone, {(_total(result) + more) / MILLION:.3f} Mcycles in all"
                )
        if options.kernel == "attention" and mine.get("ours", {}).get("ok"):
            found.append(_packed(chip, direction, mine["ours"], best, options))
    return found


def _row(result: dict, best: float, floor: float) -> list[str]:
    total = _total(result)
    return [
        f"{total / MILLION:.3f}",
        f"{result['cycles'] / MILLION:.3f}",
        f"{result['outside_cycles'] / MILLION:.3f}",
        f"{result['schedule_cycles'] / MILLION:.3f}",
        f"{result['mxu_cycles'] / max(1, result['cycles']):.0%}",
        f"{result['shares']['VALU']:.0%}",
        f"{result['spill_stores']}/{result['spill_fills']}",
        f"{result['vmem_bytes'] / 2**20:.1f}",
        f"{result['temp_bytes'] / 2**20:.0f}",
        str(result["code_bundles"]),
        f"{result['compile_seconds']:.1f}",
        f"{total / best:.2f}",
        f"{total / floor:.2f}",
    ]


def regions(kernel: dict) -> Table:
    """Where a kernel's cycles go."""
    title = f"{kernel['name']}: {kernel['cycles'] / MILLION:.3f} Mcycles/core"
    if kernel["not_found"]:
        title += f"; no region of their own: {', '.join(kernel['not_found'])}"
    table = Table(title=title, title_justify="left")
    for column in ("region", "kind", "bundles", "row passes", "runs", "counted by", "share"):
        table.add_column(column, justify="right" if column != "region" else "left")
    total = sum(r["cycles"] * r["executed"] for r in kernel["regions"]) or 1
    for r in (r for r in kernel["regions"] if r["bundles"]):
        share = f"{r['cycles'] * r['executed'] / total:.1%}"
        numbers = (str(r["bundles"]), f"{r['mxu_cycles']:.0f}", f"{r['executed']:.0f}")
        table.add_row(r["path"] or "-", r["kind"], *numbers, r["how"], share)
    return table


def _packed(chip: str, direction: str, ours: dict, best: float, options) -> Table:
    table = Table(title=f"{chip} {direction}, ours by packing", title_justify="left")
    for column in (
        *("row", "Mcycles", "x best other", "x floor of its own blocks"),
        *("in kernels", "documents apart", "x documents apart"),
    ):
        table.add_column(column, justify="left" if column == "row" else "right")
    groups: dict[str, list[tuple[float, ...]]] = {}
    for name, lengths in packings(options.seq).items():
        if options.case and not any(name.startswith(case) for case in options.case):
            continue
        inside, apart = (ours["variants"][n]["cycles"] for n in (name, _apart(name)))
        total = inside + ours["outside_cycles"]
        floor = floor_cycles(_case(chip, direction, options, lengths))
        group = name.rsplit(" ", 1)[0] + ", mean of rows" if name.startswith("demo") else name
        groups.setdefault(group, []).append((total, floor, inside, apart))
    for name, rows in groups.items():
        total, floor, inside, apart = (sum(column) / len(rows) for column in zip(*rows))
        cells = (f"{total / MILLION:.3f}", f"{total / best:.3f}", f"{total / floor:.2f}")
        alone = (f"{inside / MILLION:.3f}", f"{apart / MILLION:.3f}", f"{inside / apart:.2f}")
        table.add_row(name, *cells, *alone)
    return table


def _apart(name: str) -> str:
    return f"{name}, documents apart"


def _total(result: dict) -> float:
    return result["cycles"] + result["outside_cycles"]


def _case(chip: str, direction: str, options: argparse.Namespace, lengths: list[int]) -> Case:
    return Case(
        chip=chip,
        kernel=options.kernel,
        direction=direction,
        seq=options.seq,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        dtype=options.dtype,
        lengths=tuple(lengths),
        sizes=(("embed", options.embed), ("vocab", options.vocab)),
    )


def _block(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    legal = kernel_cases.block_names()
    if name not in legal:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(legal)}")
    return name, arguments.positive(value)


def _kernel(name: str) -> str:
    if name == "decode_attention":
        fix = "its compilations: python tests/kernels/decode_compile_table.py"
        raise argparse.ArgumentTypeError(f"decode_attention is not compared here; {fix}")
    if name not in KERNELS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(KERNELS)}")
    return name


def wrong(options: argparse.Namespace) -> str | None:
    """What of the command line cannot be compiled or shown, in words; None: nothing."""
    names = list(KERNELS[options.kernel])
    if unknown := set(options.only) - set(names):
        return f"--only {', '.join(sorted(unknown))}: choose from {', '.join(names)}"
    if options.kernel != "attention" and (options.blocks or options.case):
        return f"--blocks and --case are for attention, not --kernel {options.kernel}"
    if options.heads % options.kv_heads:
        return f"--kv-heads {options.kv_heads} must divide --heads {options.heads}"
    rows = packings(options.seq)
    for case in options.case or ():
        if not any(name.startswith(case) for name in rows):
            return f"--case {case!r} begins none of {', '.join(rows)}"
    if "ours" in options.only:
        for chip in options.chip:
            reason = kernel_cases.refused(_case(chip, "forward", options, [options.seq]))
            if reason:
                return f"{chip}: {reason}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=LEGEND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=["v4", "v5e", "v5p", "v6e"])
    parser.add_argument(
        "--kernel", type=_kernel, default="attention", help="or cross_entropy", metavar="K"
    )
    one = arguments.positive
    parser.add_argument("--seq", type=one, default=4096)
    parser.add_argument("--heads", type=one, default=64)
    parser.add_argument("--kv-heads", type=one, default=8)
    parser.add_argument("--head-dim", type=one, default=128)
    parser.add_argument("--embed", type=one, default=8192, help="of cross_entropy")
    parser.add_argument("--vocab", type=one, default=32128, help="of cross_entropy")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--path", nargs="*", default=[], help="folders to import tokamax from")
    parser.add_argument(
        "--blocks",
        nargs="*",
        type=_block,
        default=[],
        help="ours, as backward_heads=2",
        metavar="N=V",
    )
    parser.add_argument("--json", type=Path, help="also write every figure and region here")
    parser.add_argument("--only", nargs="+", help="of the kernel's rows, as ours splash")
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--case", nargs="+", help='packings to show, as "8 x 512" or demo')
    parser.add_argument("--regions", action="store_true", help="show where the cycles go")
    parser.add_argument("--no-crosscheck", action="store_true")
    options = parser.parse_args()
    options.only = options.only or list(KERNELS[options.kernel])
    if reason := wrong(options):
        parser.error(reason)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    if reason := compiling.missing():
        console.print(reason)
        return 1
    everything = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(
            "compiling", total=len(options.chip) * len(options.direction) * len(options.only)
        )
        for chip in options.chip:
            results = measure_chip(chip, options, lambda: progress.advance(task))
            everything[chip] = {f"{d}/{n}": r for (d, n), r in results.items()}
            for table in tables(chip, results, options):
                progress.console.print(table)
            if options.kernel == "attention" and not options.no_crosscheck:
                progress.console.print(crosscheck.compare(chip, results, options.seq))
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))
    console.print(LEGEND)
    compiled = [result for results in everything.values() for result in results.values()]
    # A row that is not for the case (tokamax not installed) was not compiled.
    failed = [r for r in compiled if not r["ok"] and r["why"] != "unsupported"]
    if failed:
        console.print(f"{len(failed)} of {len(compiled)} compilations failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
