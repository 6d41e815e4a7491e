"""Compiles our TPU kernels over the matrix of chips and shapes, and writes the table that ships.

    python tools/certify_kernels.py --jobs 4     # all of it: hours, resumable
    python tools/certify_kernels.py --chip v4 --head-dim 128 --seq 4096 --heads 64/8
    python tools/certify_kernels.py --check 5    # compile 5 lines again and compare
    python tools/certify_kernels.py --summary    # what --out holds; compiles nothing

A shape is compiled with the candidates of kernel_cases.candidates in their order, until the
compiler accepted one of each of --accept block sizes; the one with the fewest predicted cycles, all
masks together, is certified. 4096 tokens come first, and the other lengths begin with what was best
there (below 4096 they also try their own first one, for which 4096 may have had no room): the best
block of one length is not that of another. Every result is kept as a line of
--journal, so a second run compiles only what is missing: what was compiled from other kernel code
(kernel_cases.fingerprint) or by another compiler is not taken from there, and never stays in a
table under a stamp that is not its own: such lines are left out by --drop_old alone.
"""

import argparse
import collections
import dataclasses
import datetime
import importlib
import importlib.metadata
import itertools
import json
import queue
import random
import sys
import threading
from pathlib import Path

from kernel_cases import HEAD_DIMS
from lemur_kernels.attention import shapes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tpu_compiler import arguments, compiling
from tpu_compiler.cases import Case
from tpu_compiler.topology import CHIPS
from tpu_compiler.worker import Worker

SEQUENCES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
HEADS = ("8/1", "32/32", "64/8")
DTYPES = ("bfloat16", "float32")
DIRECTIONS = ("forward", "backward")
MATRIX = {
    "chip": tuple(CHIPS),
    "head_dim": HEAD_DIMS,
    "seq": SEQUENCES,
    "heads": HEADS,
    "dtype": DTYPES,
    "direction": DIRECTIONS,
}
REFERENCE = 4096  # the length that comes first
BUILDER = "kernel_cases:build"


def groups(options: argparse.Namespace) -> list[list[Case]]:
    """The matrix by chip, direction, dtype, head_dim and heads; each group holds its lengths. One
    program serves all masks of a shape: what differs is how often its regions run."""
    matrix = itertools.product(
        options.head_dim, options.dtype, options.heads, options.direction, options.chip
    )
    found = []
    for head_dim, dtype, heads, direction, chip in matrix:
        H, K = map(int, heads.split("/"))
        case = Case(
            chip=chip,
            direction=direction,
            heads=H,
            kv_heads=K,
            head_dim=head_dim,
            dtype=dtype,
            mask="causal",
        )
        found.append([dataclasses.replace(case, seq=n, lengths=(n,)) for n in options.seq])
    # nearest to everyday training first
    return sorted(found, key=lambda g: (g[0].head_dim != 128, g[0].dtype != "bfloat16"))


def variants(case: Case) -> dict[str, dict]:
    """The other masks of a certificate: eight equal documents; a window of a quarter of the row."""
    return {
        "segments": {"mask": "segments", "lengths": [case.seq // 8] * 8},
        "window": {"mask": "window", "window": case.seq // 4},
    }


def key_of(job: Case, options: argparse.Namespace) -> str:
    """Name of a job in the journal."""
    return "-".join([job.key(), *options.made_with.values()])


def journal_of(path: Path) -> dict[str, dict]:
    """{job key: result} of earlier runs; a line cut off by a kill is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["key"]] = entry
    return found


def run(matrix: list[list[Case]], builder, options, console: Console) -> dict[Case, list]:
    """{case: [(blocks, result)]} of every attempt; new ones are appended to the journal."""
    done = journal_of(options.journal)
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for group in matrix:
        waiting.put(group)
    attempts: dict[Case, list] = {}
    lock = threading.Lock()
    options.journal.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        options.journal.open("a") as journal,
    ):
        task = progress.add_task("shapes", total=sum(map(len, matrix)))

        def work() -> None:
            worker = Worker(tuple(options.path))

            def ask(case: Case, blocks: dict[str, int]) -> dict:
                job = dataclasses.replace(case, blocks=tuple(sorted(blocks.items())))
                key = key_of(job, options)
                if key not in done:
                    question = {"builder": options.builder, "case": dataclasses.asdict(job)}
                    question["variants"] = variants(job)
                    result = worker.ask(question, options.timeout)
                    result.pop("kernels", None)
                    entry = {"key": key, "case": question["case"], "result": result}
                    with lock:
                        done[key] = entry
                        journal.write(json.dumps(entry) + "\n")
                        journal.flush()
                return done[key]["result"]

            try:
                while True:
                    try:
                        group = waiting.get_nowait()
                    except queue.Empty:
                        return
                    for case, tried in certify_group(
                        group, builder.candidates, ask, options.accept
                    ):
                        attempts[case] = tried
                        progress.advance(task)
            finally:
                worker.stop()

        threads = [threading.Thread(target=work) for _ in range(options.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return attempts


def certify_group(group: list[Case], candidates, ask, accept: int):
    """Yields (case, [(blocks, result)]) of one program at several lengths; see the module."""

    def compare(case: Case, order: list[dict], wanted: int) -> list[tuple[dict, dict]]:
        """Attempts until `wanted` block sizes were accepted, one program of each."""
        tried, sizes = [], set()
        for blocks in order:
            if blocks.get("block") not in sizes and len(sizes) < wanted:
                tried.append((blocks, ask(case, blocks)))
                sizes |= {blocks.get("block")} if tried[-1][1]["ok"] else set()
        return tried

    def size(blocks: dict) -> tuple:
        return blocks.get("block"), blocks.get("heads")

    reference = min(group, key=lambda case: abs(case.seq - REFERENCE))
    tried = compare(reference, candidates(reference), accept)
    yield reference, tried
    accepted = sorted((pair for pair in tried if pair[1]["ok"]), key=lambda pair: total(pair[1]))
    rank = {size(blocks): place for place, (blocks, _) in reversed([*enumerate(accepted)])}
    for case in sorted(group, key=lambda case: case.seq):
        if case is reference:
            continue
        own = candidates(case)
        ranked = sorted(own, key=lambda blocks: rank.get(size(blocks), len(rank)))
        tried = compare(case, ranked, accept)
        if case.seq < reference.seq:  # what the reference had no room for may fit here
            tried += compare(case, own, 1)
        yield case, tried


def total(result: dict) -> float:
    """Predicted cycles of a TensorCore on a row of each mask, everything outside the kernels
    included: the largest blocks win on one document and lose on packed rows."""
    rows = [result, *result["variants"].values()]
    return sum(row["cycles"] + result["outside_cycles"] for row in rows)


def certificate(case: Case, tried: list[tuple[dict, dict]]) -> shapes.Certificate | None:
    """The fastest accepted candidate; `tried` holds (blocks, result)."""
    accepted = [(blocks, result) for blocks, result in tried if result["ok"]]
    if not accepted:
        return None
    blocks, best = min(accepted, key=lambda pair: total(pair[1]))
    masks = {"causal": best, **best["variants"]}
    return shapes.Certificate(
        shape=_shape(case),
        blocks=blocks,
        vmem_kib=best["vmem_bytes"] // 1024,
        spills=best["spill_stores"],
        kcycles={
            mask: round((result["cycles"] + best["outside_cycles"]) / 1e3, 1)
            for mask, result in masks.items()
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    one = arguments.positive
    parser.add_argument("--chip", nargs="+", choices=CHIPS)
    parser.add_argument("--head-dim", nargs="+", type=one)
    parser.add_argument("--seq", nargs="+", type=one)
    parser.add_argument("--heads", nargs="+", type=arguments.heads, metavar="H/K")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS)
    parser.add_argument("--jobs", type=one, default=1, help="compilers at a time")
    parser.add_argument("--accept", type=one, default=3, help="block sizes to compare")
    parser.add_argument("--timeout", type=one, default=900, help="seconds of one compilation")
    parser.add_argument("--journal", type=Path, default=Path("build/certify.jsonl"))
    parser.add_argument("--check", type=one, metavar="N", help="compile N lines of --out again")
    parser.add_argument("--seed", type=int, help="draws the lines of --check; of today when None")
    parser.add_argument("--summary", action="store_true", help="print what --out holds")
    parser.add_argument("--drop_old", action="store_true", help="leave lines of other code out")
    parser.add_argument("--out", type=Path, default=shapes.TABLE)
    parser.add_argument("--path", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--builder", default=BUILDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    console = Console()
    reads = options.summary or options.check is not None
    if reads and not options.out.is_file():
        parser.error(f"--out {options.out} is no table: certify without --check and --summary")
    if not reads and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: no directory {options.out.parent}: make it")
    lines = [c for c in shapes.certificates(options.out) if chosen(c, options)] if reads else []
    if reads and not lines:
        parser.error(f"no line of {options.out} has all of the given --chip, --seq, ...")
    if options.summary:
        print("\n".join(summary(lines)))
        return 0
    if reason := compiling.missing():
        console.print(reason)
        return 1
    sys.path[:0] = options.path
    builder = importlib.import_module(options.builder.split(":")[0])
    made_with = {"kernels": builder.fingerprint()}
    made_with |= {n: importlib.metadata.version(n) for n in ("jax", "libtpu")}
    options.made_with = made_with
    if options.check is not None:
        return check(lines, options, console)
    for name, values in MATRIX.items():
        setattr(options, name, getattr(options, name) or values)
    matrix = groups(options)
    table = shapes.certificates(options.out) if options.out.exists() else ()
    left = {c.shape for c in table} - {_shape(case) for group in matrix for case in group}
    same = options.out.exists() and shapes.stamp(options.out) == shapes.comment(made_with)
    if left and not same and not options.drop_old:
        parser.error(
            f"{len(left)} lines of {options.out} that this run does not compile are of another "
            f"make ({shapes.stamp(options.out)}; now {shapes.comment(made_with)}): compile all of "
            "the table, write to another --out, or leave them out with --drop_old"
        )
    attempts = run(matrix, builder, options, console)
    found, refused = [], []
    for case, tried in attempts.items():
        certified = certificate(case, tried)
        if certified:
            found.append(certified)
        elif tried:
            refused.append((case, tried))
    if same:  # lines of other shapes stay
        inside = {c.shape for c in found} | {_shape(case) for case, _ in refused}
        found += [c for c in table if c.shape not in inside]
    options.out.write_text(shapes.table_text(found, made_with))
    console.print(f"{len(found)} certificates in {options.out}; {len(refused)} shapes refused")
    for case, tried in refused[:20]:
        reason = tried[-1][1]
        console.print(f"  {_shape(case)}: {reason['why']}: {reason['error'][:160]}")
    return 0


def chosen(c: shapes.Certificate, options: argparse.Namespace) -> bool:
    """Whether a line passes the filters that were given."""
    s = c.shape
    values = {name: getattr(s, name) for name in MATRIX} | {"heads": f"{s.heads}/{s.kv_heads}"}
    return all(values[n] in (getattr(options, n) or [values[n]]) for n in MATRIX)


def summary(lines: list[shapes.Certificate]) -> list[str]:
    """What a table holds, a line for each head_dim, dtype and seq."""
    parts = collections.defaultdict(list)
    for c in lines:
        parts[c.shape.head_dim, c.shape.dtype, c.shape.seq].append(c.shape)
    found = []
    for (head_dim, dtype, seq), inside in sorted(parts.items()):
        heads = dict.fromkeys(f"{s.heads}/{s.kv_heads}" for s in inside)
        chips = dict.fromkeys(s.chip for s in inside)
        directions = dict.fromkeys(s.direction for s in inside)
        full = len(heads) * len(chips) * len(directions)
        found.append(
            f"head_dim {head_dim} {dtype} seq {seq}: {len(inside)} of {full} = {', '.join(chips)} "
            f"x heads {', '.join(heads)} x {', '.join(directions)}"
        )
    return found


def check(lines: list[shapes.Certificate], options, console: Console) -> int:
    """Compiles some of these programs again; 0 if each comes out as certified."""
    seed = options.seed
    if seed is None:
        seed = int(datetime.date.today().strftime("%Y%m%d"))
    sample = random.Random(seed).sample(lines, min(options.check, len(lines)))
    console.print(f"{len(sample)} of {len(lines)} lines, --seed {seed}")
    worker, different = Worker(tuple(options.path)), 0
    try:
        for c in sample:
            s = c.shape
            case = Case(
                chip=s.chip,
                direction=s.direction,
                seq=s.seq,
                heads=s.heads,
                kv_heads=s.kv_heads,
                head_dim=s.head_dim,
                dtype=s.dtype,
                mask="causal",
                lengths=(s.seq,),
                blocks=tuple(sorted(c.blocks.items())),
            )
            question = {"builder": options.builder, "case": dataclasses.asdict(case)}
            result = worker.ask(question | {"variants": variants(case)}, options.timeout)
            now = certificate(case, [(c.blocks, result)])
            verdict = "as certified" if now == c else f"DIFFERS: table {c}, now {now or result}"
            different += now != c
            console.print(f"{s}: {verdict}")
    finally:
        worker.stop()
    return int(different > 0)


def _shape(case: Case) -> shapes.Shape:
    return shapes.Shape(
        case.chip,
        case.direction,
        case.dtype,
        case.head_dim,
        case.heads,
        case.kv_heads,
        case.seq,
    )


if __name__ == "__main__":
    sys.exit(main())
