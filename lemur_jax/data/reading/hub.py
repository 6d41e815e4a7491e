"""Hugging Face streams: `datasets` reads, over the network, what it knows by name."""

from collections.abc import Iterator
from typing import Any

from lemur_jax.config import ConfigError
from lemur_jax.data.reading.rows import Problem, Row, unreadable


def count_shards(spec: str, field: str) -> int:
    """Number of shards of a stream `name[:config]@split`."""
    return max(1, int(_stream(spec, field).num_shards))


def read_stream(spec: str, field: str, unit: int | None) -> Iterator[Row | Problem]:
    """Rows of one shard of a stream, in its order; None reads all of them."""
    stream = _stream(spec, field)
    if unit is not None:
        stream = stream.shard(num_shards=stream.num_shards, index=unit)
    number = 0
    try:
        for fields in stream:
            number += 1
            yield Row(f"record {number}", number, fields)
    except Exception as error:  # of the network, a file's format, or a loading script
        yield unreadable(error, f"record {number}" if number else "")


def _stream(spec: str, field: str) -> Any:
    name, _, split = spec.rpartition("@")
    name, _, config = name.partition(":")
    if not name or not split:
        raise ConfigError([f"{field}={spec!r} must be 'owner/name[:config]@split'"])
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            [
                f"{field}={spec!r} needs Hugging Face datasets ({error}): pip install datasets; or "
                "download the files and read them without it (parquet, jsonl, save_to_disk)"
            ]
        ) from error
    try:
        return datasets.load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:  # its errors come from many libraries
        what = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConfigError(
            [f"{field}={spec!r} cannot be opened ({what}): check name, config, split, network"]
        ) from error
