"""A process that compiles and measures one job after the other; `Worker` talks to it.

libtpu reads its flags once and may abort on a shape it cannot do, so every measurement runs in a
process that its owner can lose. A job and its result are one line of JSON each.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tpu_compiler import compiling, cost, outside
from tpu_compiler.cases import Case, case_of
from tpu_compiler.topology import chip_named

TOOLS = Path(__file__).resolve().parent.parent


def measure(
    builder: str,
    case: Case,
    options: dict | None = None,
    variants: dict[str, dict] | None = None,
) -> dict:
    """Compiles a case and attributes its cycles, in this process (compiling.start came before).

    Args:
      builder: "module:function"; called as function(case, **options) it returns cases.Built.
      variants: {name: {field of the case: value}} of further rows for the same program (other
        documents, another window): only their counts differ, so they are not compiled again.

    Returns:
      A JSON-able dict. "ok" False: "why" is "unsupported" (the builder says so), "refused" (the
      compiler says so) or "unread" (a region without name or count), with "error". "ok" True:
      cycles per TensorCore of the kernels ("cycles", "schedule_cycles", "mxu_cycles"), of
      everything else ("outside_cycles"), shares, spills, bytes, seconds, each kernel, the
      cycles of each variant, and which kernels one core would run alone ("one_core"; "cycles"
      charges half of them to each core all the same, see counts "critical").
    """
    chip = chip_named(case.chip)
    module, function = builder.split(":")
    build = functools.partial(getattr(importlib.import_module(module), function), **(options or {}))
    try:
        built = build(case)
    except NotImplementedError as error:
        return {"ok": False, "why": "unsupported", "error": str(error)}
    try:
        compiled = compiling.compile_for(
            case.chip, built.fn, *built.args, compiler_options=built.compiler_options
        )
    except compiling.CompileError as error:
        return {"ok": False, "why": "refused", "error": str(error)}

    def attributed(counts: dict[str, dict[str, float]]) -> list[cost.KernelCost]:
        return [cost.attribute(k, _counts(k.name, counts), chip) for k in compiled.kernels]

    try:
        kernels = attributed(built.counts)
        rows = {
            name: attributed(build(case_of(dataclasses.asdict(case) | fields)).counts)
            for name, fields in (variants or {}).items()
        }
        elsewhere = outside.outside(compiled.hlo, chip, built.trips)
    except ValueError as error:
        return {"ok": False, "why": "unread", "error": str(error)}
    cycles = sum(kernel.cycles for kernel in kernels)

    def share(slot: str) -> float:
        weighted = sum(k.cycles * k.slot_share(slot) for k in kernels)
        return round(weighted / cycles, 4) if cycles else 0.0

    return {
        "ok": True,
        **_sums(kernels),
        "variants": {name: _sums(kernels) for name, kernels in rows.items()},
        "outside_cycles": round(sum(elsewhere.values())),
        "outside": {name: round(n) for name, n in elsewhere.items() if n >= 1000},
        "shares": {slot: share(slot) for slot in ("VALU", "VLOAD", "VSTORE", "EUP", "XLU")},
        "spill_stores": sum(k.static("VSTORE:SPILL") for k in kernels),
        "spill_fills": sum(k.static("VLOAD:FILL") for k in kernels),
        "vmem_bytes": compiled.vmem_bytes,
        "temp_bytes": compiled.temp_bytes,
        "code_bundles": sum(k.code_bundles for k in kernels),
        "compile_seconds": round(compiled.seconds, 2),
        "one_core": compiled.one_core if chip.cores > 1 else [],
        "kernels": [_described(kernel) for kernel in kernels],
    }


def _sums(kernels: list[cost.KernelCost]) -> dict[str, int]:
    return {
        name: round(sum(getattr(kernel, name) for kernel in kernels))
        for name in ("cycles", "schedule_cycles", "mxu_cycles")
    }


def _counts(name: str, counts: dict[str, dict[str, float]]) -> dict[str, float]:
    fits = [key for key in counts if key in name]
    if not fits:
        raise ValueError(f"kernel {name!r} is in none of the counts for {sorted(counts)}")
    return counts[max(fits, key=len)]


def _described(kernel: cost.KernelCost) -> dict:
    regions = [dataclasses.asdict(region) | {"cycles": region.cycles} for region in kernel.regions]
    return {
        "name": kernel.name,
        **_sums([kernel]),
        "code_bundles": kernel.code_bundles,
        "not_found": kernel.not_found,
        "regions": regions,
    }


class Worker:
    """A measuring process; restarted after it dies or takes too long.

    paths: further directories to import builders from.
    """

    def __init__(self, paths: tuple[str, ...] = ()) -> None:
        self.paths = paths
        self.process: subprocess.Popen | None = None

    def ask(self, job: dict, timeout_s: float = 600.0) -> dict:
        """The result of measure(**job); a process that dies is a result too."""
        if self.process is None:
            self._start()
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        until = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            while waiting.select(max(0.0, until - time.monotonic())):
                line = self.process.stdout.readline()
                if line.startswith("{"):
                    return json.loads(line)
                if not line:
                    error = f"process ended with {self.process.wait()}: {self._last_words()}"
                    self.stop()
                    return {"ok": False, "why": "crashed", "error": error}
        self.stop()
        return {"ok": False, "why": "slow", "error": f"no result in {timeout_s:.0f} s"}

    def _start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="tpu_dump_")
        paths = [str(TOOLS), *self.paths, os.environ.get("PYTHONPATH", "")]
        with Path(self.folder.name, "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tpu_compiler.worker", f"{self.folder.name}/dump"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
            )

    def _last_words(self) -> str:
        lines = Path(self.folder.name, "stderr").read_text(errors="replace").split("\n")
        return " | ".join([line.strip() for line in lines if line.strip()][-2:])[:400]

    def stop(self) -> None:
        """Ends the process; the next question starts another."""
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError), self.process:  # waits, closes the pipes
                pass
            self.folder.cleanup()
            self.process = None


def _serve(folder: Path) -> None:
    compiling.start(folder)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            case = case_of(job["case"])
            result = measure(job["builder"], case, job.get("options"), job.get("variants"))
        except Exception as error:  # a builder's own bug is this job's result, not the end
            result = {"ok": False, "why": "failed", "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
