"""Where tensors lie in safetensors files, those that are and those to be.

A file is: 8 bytes, little endian, the length N of the header; N bytes of JSON, {name: {"dtype",
"shape", "data_offsets": [start, stop]}, "__metadata__": {str: str}}; then the data, without holes.
(https://github.com/huggingface/safetensors#format). The safetensors package is not used: its
`save_file` wants all tensors of a file in memory.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lemur_jax.convert.disk import PAGE
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.file_kind import check_file
from lemur_jax.convert.json_file import json_text
from lemur_jax.convert.stored import StoredTensor

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


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, by name. Reads the header only, and checks it against the file size.

    Raises:
      ConversionError: truncated or damaged; names the file, what was expected and what is there.
    """
    check_file(path)
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
    except (ValueError, RecursionError) as error:  # lists in lists in lists
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    tensors = [_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    _check_layout(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


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


def _entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
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
    extents = ((data_start + start, stop - start),)
    tensor = StoredTensor(path, name, tuple(shape), DTYPES[dtype], extents)
    if stop - start != tensor.nbytes:
        raise _damaged(
            path,
            f"{name!r} is {dtype} {shape}, {tensor.nbytes} bytes, but its offsets span "
            f"{stop - start}",
        )
    return tensor


def _check_layout(path: Path, tensors: Sequence[StoredTensor], data_start: int, size: int) -> None:
    end, before = data_start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.extents[0][0], t.nbytes)):
        start = tensor.extents[0][0]
        if start != end:
            how = "overlaps" if start < end else "leaves a hole after"
            raise _damaged(path, f"{tensor.name!r} starts at byte {start} and {how} {before}")
        end, before = start + tensor.nbytes, repr(tensor.name)
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


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A file to be: its header, and where each tensor goes.

    Attributes:
      path: where it will lie.
      header: its first bytes.
      tensors: in the order of the file.
      size: of the whole file, bytes.
    """

    path: Path
    header: bytes
    tensors: tuple[StoredTensor, ...]
    size: int


def layout(
    directory: Path, tensors: Sequence[Planned], max_shard_bytes: int
) -> tuple[list[ShardFile], str | None]:
    """One or more files that hold `tensors`, known in advance, in their order.

    Args:
      directory: where the files will lie.
      tensors: everything that will be written.
      max_shard_bytes: of one file's data, if no single tensor is larger.

    Returns:
      The files, and the text of their index; None: a single file needs none.
    """
    shards = list(_shards(tensors, max_shard_bytes))
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        return [_shard_file(directory / SINGLE, shards[0])], None
    weight_map = {t.name: name for name, shard in zip(names, shards) for t in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files = [_shard_file(directory / name, shard) for name, shard in zip(names, shards)]
    return files, json_text(index)


def _shards(tensors: Sequence[Planned], max_shard_bytes: int) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    used = 0
    for tensor in tensors:
        if shard and used + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, used = [], 0
        shard.append(tensor)
        used += tensor.nbytes
    yield shard


def _shard_file(path: Path, shard: Sequence[Planned]) -> ShardFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    offsets = [0]
    for tensor in shard:
        offsets.append(offsets[-1] + tensor.nbytes)
        header[tensor.name] = {
            "dtype": _NAME_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets[-2:],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)  # data starts at a page: it is written directly
    start = 8 + len(text)
    placed = tuple(
        StoredTensor(path, t.name, t.shape, t.dtype, ((start + at, t.nbytes),))
        for t, at in zip(shard, offsets)
    )
    return ShardFile(path, len(text).to_bytes(8, "little") + text, placed, start + offsets[-1])
