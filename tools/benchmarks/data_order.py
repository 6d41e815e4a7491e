# ruff: noqa: E402  (a clone that is not installed must find the packages first)
"""What exact order costs at the size of Lemur's pretraining: 22M rows of 4,096 tokens, 16 sources.

    python tools/benchmarks/data_order.py

Row stores are stood in for by ones that return constant rows (rows/s of the real store is in
tools/benchmarks/data.py): this measures the order, the ledger's hashes, seeks and the audit.
Medians of repeats. The mixture is Table 8 of arXiv:2310.06830; 1,024 rows a step, 64 hosts.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("", "kernels")]

import numpy as np

from lemur_jax.config import DataConfig
from lemur_jax.data import audit, ledger, pipeline
from lemur_jax.data.events import Exclusion
from lemur_jax.data.reads import hash_rows
from lemur_jax.data.store import Piece, Rows

T, B, HOSTS, STEPS, STEPS_PER_SAVE, TOTAL_ROWS = 4096, 1024, 64, 21_458, 100, 22_000_000
TABLE_8 = {
    **{"python": 72.73, "sql": 5.15, "java": 1.82, "shell": 1.82, "notebook": 1.71},
    **{"javascript": 1.69, "c": 1.61, "php": 1.33, "cpp": 1.21, "others": 1.73},
    **{"refinedweb": 6.82, "wikipedia": 0.64, "books": 0.41, "arxiv": 0.41},
    **{"stackexchange": 0.41, "dm_mathematics": 0.41},
}


class ConstantStore:
    """A row store of the right size without a disk: one document fills each row."""

    def __init__(self, directory, parts=None):
        self.rows = self.documents = int(TOTAL_ROWS * TABLE_8[Path(directory).parent.name] / 100)
        self.columns, self.has_loss = T + 1, False

    def read(self, rows) -> Rows:
        shape = len(rows), self.columns
        return Rows(np.ones(shape, np.uint16), np.ones(shape, np.uint16), None)

    def documents_of(self, row) -> range:
        return range(row, row + 1)

    def pieces(self, row) -> list[Piece]:
        return [Piece(row, f"{row}", 0, 0, self.columns)]


class AnyTokenizer:
    """Its fingerprint is all that a pipeline asks of a tokenizer."""

    fingerprint = "0"

    @classmethod
    def load(cls, _):
        return cls()


def make_data_set(root: Path) -> str:
    rows = {name: int(TOTAL_ROWS * rate / 100) for name, rate in TABLE_8.items()}
    sources = {
        name: {"rate": TABLE_8[name], "splits": {"train": {"rows": n}}} for name, n in rows.items()
    }
    about = {"format_version": pipeline.FORMAT_VERSION, "sequence_length": T, "vocab_size": 32000}
    (root / "manifest.json").write_text(
        json.dumps(about | {"tokenizer_fingerprint": "0", "sources": sources})
    )
    return str(root)


def write_ledger(run: Path, read: pipeline.Pipeline) -> None:
    """Of a run of STEPS steps that was resumed once; the sums of its rows are not true."""
    facts = {"path": read.config.path, "processes": HOSTS, "rows": B, "micro_batches": 1}
    facts["ranges"] = [[n * B // HOSTS, (n + 1) * B // HOSTS] for n in range(HOSTS)]
    saves = [*range(STEPS_PER_SAVE, STEPS, STEPS_PER_SAVE), STEPS]
    for since, step in zip([0, *saves], saves):
        if since in (0, saves[len(saves) // 2]):
            event = "resumed" if since else "begun"
            ledger.append(run / ledger.LEDGER, event, **read.position(since), **facts)
        ledger.append(run / ledger.LEDGER, "saved", step=step, since=since, reads="0")


def show(what: str, call: Callable, repeats: int = 21) -> None:
    """Prints the median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    print(f"{statistics.median(times) * 1e3:8.2f} ms  {what}", flush=True)


def main() -> None:
    import grain  # noqa: F401  (2.5 s of imports, which a training process has made already)

    pipeline.RowStore, pipeline.Tokenizer = ConstantStore, AnyTokenizer
    with tempfile.TemporaryDirectory() as root:
        config = DataConfig(path=make_data_set(Path(root)), batch_size=B, sequence_length=T)
        last, share = STEPS - 1, B // HOSTS
        read = pipeline.Pipeline(config)
        show(
            f"open and seek to step {STEPS:,} (90B tokens)",
            lambda: pipeline.Pipeline(config).places(last, 0, 1),
        )
        show(f"places of a step, one host ({share} rows)", lambda: read.places(last, 0, share))
        show(f"places of a step, all {B} rows", lambda: read.places(last))
        changes = tuple((step, "sql", 5.0 + step) for step in range(100, 2100, 100))
        changed = pipeline.Pipeline(dataclasses.replace(config, weight_changes=changes))
        show("the same after 20 changes of rates", lambda: changed.places(last))
        size = len(json.dumps(read.position(last)))
        show(f"position in a checkpoint, {size} bytes of JSON", lambda: read.position(last))
        show("a host's rows as a batch", lambda: read.rows(last, 0, share))
        without = read.excluding([Exclusion(0, {"python": tuple(range(100_000))})])
        show("the same with 100,000 documents excluded", lambda: without.rows(last, 0, share))
        batch = read.rows(last, 0, share)
        show("their hashes for the ledger", lambda: hash_rows(last, 0, batch))
        time_audit(Path(root) / "run", read)


def time_audit(run: Path, read: pipeline.Pipeline) -> None:
    run.mkdir()
    write_ledger(run, read)
    lines = len((run / ledger.LEDGER).read_text().splitlines())
    audit.READ_AGAIN_ROWS = 0
    result = audit.audit(run, {STEPS: read.position(STEPS)})
    assert not result.violations, result.violations
    counted = sum(use.used for use in result.sources.values() if use.repeated is not None)
    print(
        f"{result.seconds:8.1f} s   audit of {STEPS:,} steps, {lines} lines of ledger, {counted:,} "
        f"rows enumerated (--full: {STEPS * B:,}, and every row read)"
    )


if __name__ == "__main__":
    main()
