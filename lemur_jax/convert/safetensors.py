"""Reads and writes safetensors, one tensor at a time.

A file is: 8 bytes, little endian, the length N of the header; N bytes of JSON, {name: {"dtype",
"shape", "data_offsets": [start, stop]}, "__metadata__": {str: str}}; then the data, without holes.
(https://github.com/huggingface/safetensors#format). The safetensors package is not used: its
`save_file` wants all tensors of a file in memory.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lemur_jax.convert.errors import ConversionError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def numpy_dtype(name: str) -> np.dtype:
    """The dtype of a name such as "bfloat16", which numpy alone does not know."""
    return next(dtype for dtype in DTYPES.values() if dtype.name == name)


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
      name, shape, dtype: of the tensor.
      start: first byte, counted from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, by name. Reads the header only, and checks it against the file size.

    Raises:
      ConversionError: truncated or damaged; names the file, what was expected and what is there.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + length > size:
            raise _damaged(
                path,
                f"truncated: the header needs {8 + length if len(prefix) == 8 else 8} bytes, the "
                f"file has {size}",
            )
        if length > _MAX_HEADER_BYTES:
            raise _damaged(path, f"its header would be {length} bytes long")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    tensors = [_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    _check_layout(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def read(path: Path, tensor: Tensor) -> np.ndarray:
    """One tensor, in a fresh array."""
    array = np.empty(tensor.shape, tensor.dtype)
    view = memoryview(array.reshape(-1).view(np.uint8)) if array.size else memoryview(b"")
    with open(path, "rb", buffering=0) as file:
        file.seek(tensor.start)
        done = 0
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise _damaged(
                    path,
                    f"truncated: {tensor.name} needs bytes up to {tensor.start + tensor.nbytes}, "
                    f"the file ends at {tensor.start + done}",
                )
            done += got
    return array


def _damaged(path: Path, what: str) -> ConversionError:
    return ConversionError([f"{path} is damaged: {what}. Download or copy it again"])


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} appears twice")
        found[key] = value
    return found


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, entry: Any, data_start: int) -> Tensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = isinstance(shape, list) and all(_is_size(n) for n in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        raise _damaged(path, f"the entry of {name!r} in its header is malformed: {entry!r}")
    if dtype not in DTYPES:
        raise ConversionError(
            [f"{path}: {name!r} has dtype {dtype!r}, which is unknown; known: {', '.join(DTYPES)}"]
        )
    tensor = Tensor(name, tuple(shape), DTYPES[dtype], data_start + start)
    if stop - start != tensor.nbytes:
        raise _damaged(
            path,
            f"{name!r} is {dtype} {shape}, {tensor.nbytes} bytes, but its offsets span "
            f"{stop - start}",
        )
    return tensor


def _check_layout(path: Path, tensors: Sequence[Tensor], data_start: int, size: int) -> None:
    end, before = data_start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.start, t.nbytes)):
        if tensor.start != end:
            how = "overlaps" if tensor.start < end else "leaves a hole after"
            raise _damaged(
                path, f"{tensor.name!r} starts at byte {tensor.start} and {how} {before}"
            )
        end, before = tensor.start + tensor.nbytes, repr(tensor.name)
    if size < end:
        raise _damaged(path, f"truncated: expected {end} bytes, found {size}")
    if size > end:
        raise _damaged(path, f"expected {end} bytes, found {size}: {size - end} too many")


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _shards(tensors: Sequence[Planned], max_shard_bytes: int) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    for tensor in tensors:
        if shard and sum(t.nbytes for t in shard) + tensor.nbytes > max_shard_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


class ShardedWriter:
    """Writes a set of tensors, known in advance, to one or more files, in any order.

    Headers are written first; each tensor then goes to its place as it comes, and is not held.
    Use as a context manager: leaving it without an error checks that every tensor has come.
    """

    def __init__(self, directory: Path, tensors: Sequence[Planned], max_shard_bytes: int):
        """Creates the files (and the index, if there are several) in an existing directory.

        Args:
          directory: must not hold files of these names.
          tensors: everything that will be written, in the order of the files.
          max_shard_bytes: of one file's data, if no single tensor is larger.
        """
        shards = list(_shards(tensors, max_shard_bytes))
        count = len(shards)
        self._waiting: dict[str, tuple[Any, Tensor]] = {}
        self._files = []
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            # Held open for many writes; closed by __exit__.
            file = open(directory / name, "xb", buffering=0)  # noqa: SIM115
            self._files.append(file)
            for tensor in _start_file(file, shard):
                self._waiting[tensor.name] = (file, tensor)
                weight_map[tensor.name] = name
        if count > 1:
            total = sum(t.nbytes for t in tensors)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (directory / INDEX).write_text(text)

    def write(self, name: str, array: np.ndarray) -> None:
        """Puts one tensor in its place.

        Raises:
          ValueError: not planned, already written, or of another shape or dtype than planned.
        """
        if name not in self._waiting:
            raise ValueError(f"{name!r} was not planned or has been written already")
        file, tensor = self._waiting[name]
        if array.shape != tensor.shape or array.dtype != tensor.dtype:
            raise ValueError(
                f"{name!r}: planned {tensor.dtype} {tensor.shape}, got {array.dtype} {array.shape}"
            )
        flat = np.ascontiguousarray(array).reshape(-1)
        view = memoryview(flat.view(np.uint8)) if flat.size else memoryview(b"")
        file.seek(tensor.start)
        done = 0
        while done < len(view):
            done += file.write(view[done:])
        del self._waiting[name]

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for file in self._files:
            if error is None:
                os.fsync(file.fileno())
            file.close()
        if error is None and self._waiting:
            raise ValueError(f"never written: {', '.join(self._waiting)}")


def _start_file(file, shard: Sequence[Planned]) -> list[Tensor]:
    """Writes the header and gives the file its final size; returns where each tensor goes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    offset = 0
    for tensor in shard:
        header[tensor.name] = {
            "dtype": _NAME_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + offset)
    start = 8 + len(text)
    return [
        Tensor(t.name, t.shape, t.dtype, start + header[t.name]["data_offsets"][0]) for t in shard
    ]
