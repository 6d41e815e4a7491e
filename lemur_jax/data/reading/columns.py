"""Columnar formats through pyarrow: parquet, and the arrow files of a `save_to_disk` directory."""

from collections.abc import Iterator, Sequence
from typing import Any

from lemur_jax.config import ConfigError
from lemur_jax.data.reading import storage
from lemur_jax.data.reading.rows import Problem, Row, unreadable

_ROWS_PER_BATCH = 256  # of documents that can have megabytes
_ARROW_MAGIC = b"ARROW1"


def _pyarrow(path: str, field: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet

        return pyarrow
    except ImportError as error:
        raise ConfigError(
            [f"{field}={path!r} needs pyarrow ({error}): pip install pyarrow"]
        ) from error


def row_group_bytes(path: str, field: str) -> list[int]:
    """Stored bytes of each row group of a parquet file; [] when its footer cannot be read."""
    pyarrow = _pyarrow(path, field)
    try:
        with storage.open_binary(path, field) as file:
            footer = pyarrow.parquet.read_metadata(file)
            groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
            return [
                sum(group.column(c).total_compressed_size for c in range(group.num_columns))
                for group in groups
            ]
    except (OSError, pyarrow.ArrowException):
        return []  # reading it says what is wrong


def read_parquet(
    path: str, field: str, units: tuple[int, int] | None, columns: Sequence[str] | None
) -> Iterator[Row | Problem]:
    """Rows of the row groups [units) of a parquet file; place counts from 1 in the whole file.

    Args:
      columns: names (dotted names inside) to read; None reads all of them.
    """
    pyarrow = _pyarrow(path, field)
    number = 0
    try:
        with storage.open_binary(path, field) as source:
            file = pyarrow.parquet.ParquetFile(
                source, pre_buffer=False, page_checksum_verification=True
            )
            names = _chosen(file.schema_arrow.names, columns)
            if isinstance(names, Problem):
                yield names
                return
            first, last = units or (0, file.num_row_groups)
            number = sum(file.metadata.row_group(g).num_rows for g in range(first))
            for group in range(first, last):  # one by one: what precedes a damaged one is read
                for batch in file.iter_batches(_ROWS_PER_BATCH, [group], names):
                    yield from _rows(batch, number)
                    number += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        yield unreadable(error, f"record {number}" if number else "")


def read_arrow(path: str, field: str, columns: Sequence[str] | None) -> Iterator[Row | Problem]:
    """Rows of an arrow file: the stream format, which `datasets` writes, or the file format."""
    pyarrow = _pyarrow(path, field)
    number = 0
    try:
        with storage.open_binary(path, field) as source:
            file_format = source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
            source.seek(0)
            reader = (pyarrow.ipc.open_file if file_format else pyarrow.ipc.open_stream)(source)
            names = _chosen(reader.schema.names, columns)
            if isinstance(names, Problem):
                yield names
                return
            if file_format:
                batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
            else:
                batches = reader
            for batch in batches:
                for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
                    part = batch.slice(start, _ROWS_PER_BATCH).select(names)
                    yield from _rows(part, number)
                    number += part.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        yield unreadable(error, f"record {number}" if number else "")


def _chosen(present: Sequence[str], wanted: Sequence[str] | None) -> list[str] | Problem:
    if wanted is None:
        return list(present)
    chosen = {name if name in present else name.split(".")[0]: name for name in wanted}
    missing = [name for root, name in chosen.items() if root not in present]
    if missing:
        return Problem(
            f"has no column {', '.join(map(repr, missing))} (found {sorted(present)}): set "
            "SourceConfig.text_key, split_key, where or meta_keys to columns that exist",
            True,
        )
    return list(chosen)


def _rows(batch: Any, before: int) -> Iterator[Row | Problem]:
    names = batch.schema.names
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except UnicodeDecodeError:
        yield from _rows_one_by_one(batch, before)
        return
    for offset, values in enumerate(zip(*columns)):
        number = before + offset + 1
        yield Row(f"record {number}", number, dict(zip(names, values)))


def _rows_one_by_one(batch: Any, before: int) -> Iterator[Row | Problem]:
    """As `_rows`, for a batch in which some string is not UTF-8: finds which."""
    for offset in range(batch.num_rows):
        number, fields = before + offset + 1, {}
        try:
            for name, column in zip(batch.schema.names, batch.columns):
                fields[name] = column[offset].as_py()
        except UnicodeDecodeError as error:
            yield Problem(
                f"is not text: record {number} has byte 0x{error.object[error.start]:02x} at "
                f"offset {error.start} of {name!r}, which is not UTF-8; drop that record"
            )
            continue
        yield Row(f"record {number}", number, fields)
