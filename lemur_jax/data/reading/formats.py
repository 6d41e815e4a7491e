"""The table of formats: how a file is cut into shards, and which reader reads one."""

import itertools
from collections.abc import Iterator, Sequence

from lemur_jax.data.reading import columns as _columns
from lemur_jax.data.reading import examples, hub, lines, patterns, storage
from lemur_jax.data.reading.rows import Problem, Row

BYTES_PER_SHARD = 128 << 20


def units(
    path: str, field: str, format: str | None = None, bytes_per_shard: int = BYTES_PER_SHARD
) -> list[tuple[int, tuple[int, int] | None]]:
    """[(bytes, units)] of the shards of a file or data set; units None means all of it.

    Parquet is cut between row groups, ArrayRecord and TFDS between records, a stream between its
    own shards; other formats must be read from their beginning.
    """
    format = format or patterns.format_of(path)
    if format == "tfds":
        return [(n, (a, b)) for n, a, b in examples.tfds_slices(path, field, bytes_per_shard)]
    if format == "hf":
        return [(0, (n, n + 1)) for n in range(hub.count_shards(path, field))]
    total = storage.size(path, field)
    if total <= bytes_per_shard:
        return [(total, None)]
    if format == "parquet":
        return _groups(_columns.row_group_bytes(path, field), bytes_per_shard) or [(total, None)]
    if format == "array_record" and (records := examples.count_array_records(path, field)):
        parts = min(records, -(-total // bytes_per_shard))
        cuts = [records * part // parts for part in range(parts + 1)]
        return [(total // parts, cut) for cut in itertools.pairwise(cuts)]
    return [(total, None)]


def _groups(sizes: Sequence[int], bytes_per_shard: int) -> list[tuple[int, tuple[int, int]]]:
    found, start, held = [], 0, 0
    for number, size in enumerate(sizes):
        held += size
        if held >= bytes_per_shard or number + 1 == len(sizes):
            found.append((held, (start, number + 1)))
            start, held = number + 1, 0
    return found


def read(
    path: str,
    field: str,
    format: str | None = None,
    units: tuple[int, int] | None = None,
    columns: Sequence[str] | None = None,
    lines_per_document: int | None = None,
) -> Iterator[Row | Problem]:
    """Rows of a shard as `units` cut it. `columns` spares columnar formats the others' bytes."""
    match format or patterns.format_of(path):
        case "jsonl":
            return lines.read_jsonl(path, field)
        case "text":
            return lines.read_text(path, field, lines_per_document)
        case "parquet":
            return _columns.read_parquet(path, field, units, columns)
        case "arrow":
            return _columns.read_arrow(path, field, columns)
        case "tfrecord":
            return examples.read_tfrecord(path, field)
        case "array_record":
            return examples.read_array_record(path, field, units)
        case "tfds":
            return examples.read_tfds(path, field, units)
        case "hf":
            return hub.read_stream(path, field, units[0] if units else None)
        case other:
            raise AssertionError(f"{path}: format {other!r} was not checked")
