"""TFRecord, ArrayRecord and TFDS: tf.train.Example. TensorFlow is imported when one is read."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from lemur_jax.config import ConfigError
from lemur_jax.data.reading import storage
from lemur_jax.data.reading.rows import Problem, Row, unreadable

_RECORDS_PER_READ = 256


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it greets on stderr otherwise
    import tensorflow

    return tensorflow


def read_tfrecord(path: str, field: str) -> Iterator[Row | Problem]:
    """Records of a TFRecord file, gzipped or not; every checksum is verified by TensorFlow."""
    tf = _tensorflow()
    number = 0
    with storage.local_copy(path, field) as local:
        kind = "GZIP" if path.endswith(".gz") else ""
        try:
            for data in tf.data.TFRecordDataset(local, kind).as_numpy_iterator():
                number += 1
                yield _example(tf, data, number)
        except (tf.errors.OpError, OSError) as error:
            what = str(error).split("{{")[0].strip() or type(error).__name__
            yield unreadable(OSError(what), f"record {number}" if number else "")


def count_array_records(path: str, field: str) -> int:
    """Records of a local ArrayRecord file; 0 for a URL or when it cannot be read."""
    if storage.is_remote(path) or not os.path.getsize(path):
        return 0
    try:
        reader = _array_record(path, field).ArrayRecordReader(path)
        with _closing(reader):
            return reader.num_records()
    except (RuntimeError, ValueError, IndexError):
        return 0  # reading it says what is wrong


def read_array_record(
    path: str, field: str, units: tuple[int, int] | None
) -> Iterator[Row | Problem]:
    """Records [units) of an ArrayRecord file: each a tf.train.Example or a JSON object."""
    module = _array_record(path, field)
    tf, number = None, units[0] if units else 0
    with storage.local_copy(path, field) as local:
        try:
            reader = module.ArrayRecordReader(local)
            with _closing(reader):
                if not reader.ok():
                    raise OSError("it is not an ArrayRecord file")
                stop = units[1] if units else reader.num_records()
                while number < stop:
                    last = min(number + _RECORDS_PER_READ, stop)
                    for data in _read_each(reader, number, last):
                        number += 1
                        if isinstance(data, Exception):
                            yield _unreadable_record(data, number)
                        elif data[:1] == b"{":  # no Example begins so: its first byte is 0x0a
                            yield _json(data, number)
                        else:
                            tf = tf or _tensorflow()
                            yield _example(tf, data, number)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            yield unreadable(error, f"record {number}" if number else "")


def _read_each(reader: Any, first: int, last: int) -> list[bytes | Exception]:
    """Records [first, last); where one cannot be read, its error: an index leads to those after."""
    try:
        return list(reader.read(first, last))
    except RuntimeError as error:  # of all of them, whichever is damaged
        if last - first == 1:
            return [error]
    return [_read_each(reader, number, number + 1)[0] for number in range(first, last)]


def _unreadable_record(error: Exception, number: int) -> Problem:
    return Problem(f"cannot be read at record {number} ({error}): replace the file or remove it")


def tfds_slices(spec: str, field: str, bytes_per_shard: int) -> list[tuple[int, int, int]]:
    """(bytes, first, last + 1) examples of the shards of a TFDS data set `name[/config]@split`."""
    builder, split = _tfds(spec, field)
    info = builder.info.splits[split]
    examples, total = info.num_examples, info.num_bytes or 0
    parts = max(1, min(examples, -(-total // bytes_per_shard)))
    cuts = [examples * part // parts for part in range(parts + 1)]
    return [(total // parts, first, last) for first, last in itertools.pairwise(cuts)]


def read_tfds(spec: str, field: str, units: tuple[int, int]) -> Iterator[Row | Problem]:
    """Examples [units) of a TFDS data set that is prepared on this machine."""
    builder, split = _tfds(spec, field)
    tf = _tensorflow()
    number = units[0]
    try:
        import tensorflow_datasets as tfds

        read_config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        dataset = builder.as_dataset(
            split=f"{split}[{units[0]}:{units[1]}]", shuffle_files=False, read_config=read_config
        )
        for example in dataset.as_numpy_iterator():
            number += 1
            yield Row(f"record {number}", number, {k: _plain(v) for k, v in example.items()})
    except (tf.errors.OpError, OSError) as error:
        yield unreadable(error, f"record {number}")


def _tfds(spec: str, field: str) -> tuple[Any, str]:
    name, _, split = spec.rpartition("@")
    _tensorflow()
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ConfigError(
            [f"{field}={spec!r} needs tensorflow-datasets: pip install tensorflow-datasets"]
        ) from error
    try:
        if storage.is_directory(name, field):
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name)
        splits = sorted(builder.info.splits)
    except Exception as error:  # every builder has its own
        what = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConfigError(
            [
                f"{field}={spec!r} is no TFDS data set ({what}): write "
                "'name[/config][:version]@split', or a prepared directory '/path/name/1.0.0@split'"
            ]
        ) from error
    if split not in splits:
        raise ConfigError(
            [
                f"{field}={spec!r} has splits {splits or 'none: it is not prepared here'}: "
                "write 'name@split'; `tfds build` or download_and_prepare prepares it"
            ]
        )
    return builder, split


def _array_record(path: str, field: str) -> Any:
    try:
        from array_record.python import array_record_module

        return array_record_module
    except ImportError as error:
        raise ConfigError(
            [f"{field}={path!r} needs array_record ({error}): pip install array_record"]
        ) from error


class _closing:
    """Closes an ArrayRecordReader, whose close raises again what reading has raised."""

    def __init__(self, reader: Any):
        self._reader = reader

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self._reader.close()
        except RuntimeError:
            if kind is None:
                raise


def _example(tf: Any, data: bytes, number: int) -> Row | Problem:
    try:
        features = tf.train.Example.FromString(data).features.feature
    except Exception as error:  # protobuf's DecodeError has moved between its versions
        return Problem(
            f"record {number} is not a tf.train.Example ({error}): write Examples with a bytes "
            "feature that holds the text"
        )
    return Row(f"record {number}", number, {name: _value(f) for name, f in features.items()})


def _value(feature: Any) -> Any:
    """A feature as a Python value: None when empty, the item when there is one, else a list."""
    kind = feature.WhichOneof("kind")
    items = list(getattr(feature, kind).value) if kind else []
    return None if not items else items[0] if len(items) == 1 else items


def _json(data: bytes, number: int) -> Row | Problem:
    try:
        fields = json.loads(data)
    except ValueError as error:
        return Problem(f"record {number} is not JSON ({error}): write JSON objects or Examples")
    return Row(f"record {number}", number, fields)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value
