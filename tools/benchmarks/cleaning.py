"""Speed of readers and cleaning steps, in MB of text a second on one core.

    python tools/benchmarks/cleaning.py CODE.jsonl EVALUATION.jsonl [--megabytes=20]

Writes the documents of CODE.jsonl (`lemur data corpus`) in every format, then reads each and runs
each step over them: the median of three passes. Nothing else should run on the machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lemur_jax.data.cleaning.decontaminate import Decontaminate
from lemur_jax.data.cleaning.duplicates import ExactDuplicates, NearDuplicates
from lemur_jax.data.cleaning.redact import RedactAddresses, RedactSecrets
from lemur_jax.data.cleaning.steps import (
    AlphanumericFilter,
    LanguageFilter,
    LengthFilter,
    LicenceFilter,
    LineFilter,
)
from lemur_jax.data.files import Document
from lemur_jax.data.sources import SourceConfig, documents


def main() -> None:
    """Measures and prints two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("code")
    parser.add_argument("evaluation")
    parser.add_argument("--megabytes", type=float, default=20)
    options = parser.parse_args()
    held, size = [], 0
    for document in documents(_source(options.code)):
        held.append(document)
        size += len(document.text.encode())
        if size >= options.megabytes * 1e6:
            break
    print(f"{len(held):,} documents, {size / 1e6:.1f} MB of text; one core, median of 3")
    with tempfile.TemporaryDirectory() as directory:
        passes = {name: _reading(path) for name, path in _write(held, Path(directory)).items()}
        _show("reading", passes, size)
    steps = {
        type(step).__name__: _step(step, held)
        for step in (
            LengthFilter(),
            LineFilter(),
            AlphanumericFilter(),
            LicenceFilter(unknown="keep"),
            RedactSecrets(),
            RedactAddresses(),
            Decontaminate(files=options.evaluation),
        )
    }
    steps["LanguageFilter (a tenth)"] = _step(LanguageFilter(), held[::10])
    for step in (ExactDuplicates(), NearDuplicates()):
        steps[f"{type(step).__name__} (signing)"] = _signing(step, held)
    _show("cleaning steps", steps, size)


def _source(path: str, **fields: object) -> SourceConfig:
    return SourceConfig(name="x", rate=1.0, train_files=path, validation_fraction=1e-9, **fields)


def _write(held: list[Document], directory: Path) -> dict[str, str]:
    """{format: path} of the documents in every format."""
    import pyarrow
    import pyarrow.parquet as parquet
    import tensorflow as tf
    import zstandard
    from array_record.python.array_record_module import ArrayRecordWriter

    records = [{"text": d.text, "path": d.path} for d in held]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (directory / "x.jsonl").write_bytes(lines)
    (directory / "x.jsonl.zst").write_bytes(zstandard.compress(lines))
    import gzip

    (directory / "x.jsonl.gz").write_bytes(gzip.compress(lines))
    table = pyarrow.Table.from_pylist(records)
    parquet.write_table(table, directory / "x.parquet", row_group_size=1000, compression="zstd")
    with pyarrow.ipc.new_stream(directory / "x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    with tf.io.TFRecordWriter(str(directory / "x.tfrecord")) as writer:
        for record in records:
            writer.write(_example(tf, record))
    array_record = ArrayRecordWriter(str(directory / "x.array_record"), "group_size:1")
    for record in records:
        array_record.write(json.dumps(record).encode())
    array_record.close()
    tree = directory / "tree"
    tree.mkdir()
    for number, record in enumerate(records):
        (tree / f"{number}.py").write_text(record["text"], newline="")
    names = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "tfrecord", "array_record")
    return {name: str(directory / f"x.{name}") for name in names} | {"plain": f"{tree}/*.py"}


def _example(tf: object, record: dict[str, str]) -> bytes:
    train = tf.train
    feature = {
        name: train.Feature(bytes_list=train.BytesList(value=[value.encode()]))
        for name, value in record.items()
    }
    return train.Example(features=train.Features(feature=feature)).SerializeToString()


def _reading(path: str) -> Callable[[], int]:
    def once() -> int:
        return sum(len(document.text.encode()) for document in documents(_source(path)))

    return once


def _step(step: object, held: list[Document]) -> Callable[[], int]:
    apply = step.start()

    def once() -> int:
        counts: Counter = Counter()
        for document in held:
            apply(document, counts)
        return sum(len(document.text.encode()) for document in held)

    return once


def _signing(step: object, held: list[Document]) -> Callable[[], int]:
    sign = step.signer()

    def once() -> int:
        for document in held:
            sign(document.text)
        return sum(len(document.text.encode()) for document in held)

    return once


def _show(title: str, passes: dict[str, Callable[[], int]], size: int) -> None:
    table = Table("what", "MB/s", title=title, title_justify="left")
    for name, once in passes.items():
        speeds = []
        for _ in range(3):
            started = time.perf_counter()
            done = once()
            speeds.append(done / (time.perf_counter() - started) / 1e6)
        table.add_row(name, f"{statistics.median(speeds):.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
