"""EasyLM's streaming checkpoints: where each tensor lies, and the bytes between tensors.

Such a file is a sequence of msgpack arrays [key, value]: `key` the path of the parameter as an
array of strings, `value` a binary with flax's encoding of one array, itself msgpack: an extension
of type 1 holding [shape, dtype name, C-order bytes]. Arrays above 1 GiB are a map: their shape and
flat pieces of 1 GiB, each encoded so. All lengths are known in advance, so tensors can be read and
written in place. (https://github.com/msgpack/msgpack/blob/master/spec.md)
"""

import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lemur_jax.convert import safetensors
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.stored import Shape, StoredTensor

PIECE_BYTES = 2**30  # flax splits larger arrays
_NDARRAY = 1
_CHUNKED = "__msgpack_chunked_array__"
_LONGEST_TEXT = 4096


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[tuple[str, ...], StoredTensor | None]:
    """Every entry of a stream, by its key; None for what is no array (a step count).

    Reads the headers only, and seeks over the data.

    Raises:
      ConversionError: damaged or no such stream; says at which byte.
    """
    size = os.path.getsize(path)
    found: dict[tuple[str, ...], StoredTensor | None] = {}
    with open(path, "rb") as file:
        reader = _Reader(file, path, size)
        while file.tell() < size:
            if reader.length("array") != 2:
                raise reader.damaged("an entry is not [key, value]")
            key = tuple(reader.text() for _ in range(reader.length("array")))
            if key in found:
                raise reader.damaged(f"{'/'.join(key)!r} appears twice")
            nbytes = reader.length("bin")
            end = file.tell() + nbytes
            if end > size:
                raise reader.damaged(f"{'/'.join(key)!r} ends at byte {end}, the file has {size}")
            found[key] = reader.value("/".join(key))
            if found[key] is None:
                file.seek(end)
            if file.tell() != end:
                raise reader.damaged(f"{'/'.join(key)!r} is not one array")
    return found


class _Reader:
    """Reads what EasyLM writes of msgpack: lengths, texts, arrays."""

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.file, self.path, self.size = file, path, size

    def damaged(self, what: str) -> ConversionError:
        return ConversionError(
            [f"{self.path} is damaged or no EasyLM stream, near byte {self.file.tell()}: {what}"]
        )

    def take(self, count: int) -> bytes:
        if count > _LONGEST_TEXT:
            raise self.damaged(f"a name of {count} bytes")
        data = self.file.read(count)
        if len(data) < count:
            raise self.damaged(f"truncated: the file has {self.size} bytes")
        return data

    def length(self, kind: str) -> int:
        """The length of the next object, which must be of this kind; for "int" its value."""
        byte = self.take(1)[0]
        for low, high, fixed in _FIXED[kind]:
            if low <= byte <= high:
                return byte - fixed
        if byte not in _SIZED[kind]:
            raise self.damaged(f"byte {byte:#x} begins no {kind}")
        form = _SIZED[kind][byte]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        try:
            return self.take(self.length("str")).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a name is not text ({error})") from error

    def value(self, name: str) -> StoredTensor | None:
        """A flax array; leaves the file behind it. None, anywhere behind, if it is no array."""
        byte = self.take(1)[0]
        self.file.seek(-1, os.SEEK_CUR)
        if byte >> 4 == 0x8 or byte in _SIZED["map"]:
            return self.chunked(name)
        if byte in _EXT_FIXED or byte in _SIZED["ext"]:
            return self.ndarray(name)
        return None

    def ndarray(self, name: str) -> StoredTensor:
        byte = self.take(1)[0]
        nbytes = _EXT_FIXED.get(byte)
        if nbytes is None:
            nbytes = struct.unpack(
                _SIZED["ext"][byte], self.take(struct.calcsize(_SIZED["ext"][byte]))
            )[0]
        kind, end = self.take(1)[0], self.file.tell() + nbytes
        if kind != _NDARRAY:
            self.file.seek(end)
            raise self.damaged(f"{name!r} is a msgpack extension of type {kind}, not an array")
        if self.length("array") != 3:
            raise self.damaged(f"{name!r} is not [shape, dtype, bytes]")
        shape = tuple(self.length("int") for _ in range(self.length("array")))
        dtype = self.text()
        if dtype not in {known.name for known in safetensors.DTYPES.values()}:
            raise self.damaged(f"{name!r} has the unknown dtype {dtype!r}")
        count = self.length("bin")
        start = self.file.tell()
        extents = ((start, count),)
        tensor = StoredTensor(self.path, name, shape, safetensors.numpy_dtype(dtype), extents)
        if tensor.nbytes != count or start + count != end or end > self.size:
            raise self.damaged(
                f"{name!r} {dtype} {list(shape)} needs {tensor.nbytes} bytes, {count} are stated"
            )
        self.file.seek(end)
        return tensor

    def chunked(self, name: str) -> StoredTensor:
        shape: Shape = ()
        pieces: list[StoredTensor] = []
        for _ in range(self.length("map")):
            key = self.text()
            if key == _CHUNKED:
                self.take(1)  # true
            elif key == "shape":
                shape = tuple(self.numbered("int"))
            elif key == "chunks":
                pieces = self.numbered("array")
            else:
                raise self.damaged(f"{name!r} is a map with {key!r}, not an array")
        extents = tuple(piece.extents[0] for piece in pieces)
        if not pieces or len({piece.dtype for piece in pieces}) != 1:
            raise self.damaged(f"{name!r} has no pieces, or pieces of several dtypes")
        tensor = StoredTensor(self.path, name, shape, pieces[0].dtype, extents)
        if tensor.nbytes != sum(piece.nbytes for piece in pieces):
            raise self.damaged(f"the pieces of {name!r} do not make {list(shape)}")
        return tensor

    def numbered(self, kind: str) -> list[Any]:
        """A map {"0": ..., "1": ...} as a list."""
        found = []
        for number in range(self.length("map")):
            if self.text() != str(number):
                raise self.damaged("pieces are out of order")
            found.append(self.length("int") if kind == "int" else self.ndarray(f"piece {number}"))
        return found


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def layout(
    path: Path, tensors: Sequence[tuple[tuple[str, ...], Shape, np.dtype]]
) -> tuple[list[tuple[int, bytes]], list[StoredTensor], int]:
    """Where everything of a stream goes, byte for byte as EasyLM and flax write it.

    Args:
      path: of the file to be.
      tensors: key, shape and dtype of each, in order.

    Returns:
      (offset, bytes) of everything between the tensors, the tensors, and the size of the file.
    """
    between, placed, at = [], [], 0
    for key, shape, dtype in tensors:
        pieces = list(_encoded(shape, dtype))
        inner = sum(len(part) if isinstance(part, bytes) else part for part in pieces)
        head = b"\x92" + _array(len(key)) + b"".join(map(_text, key)) + _bin(inner)
        extents = []
        for part in (head, *pieces):
            if isinstance(part, bytes):
                between.append((at, part))
                at += len(part)
            else:
                extents.append((at, part))
                at += part
        placed.append(StoredTensor(path, "/".join(key), shape, dtype, tuple(extents)))
    return between, placed, at


def _encoded(shape: Shape, dtype: np.dtype) -> Iterator[bytes | int]:
    """flax's encoding: bytes, and how many bytes of data come between them."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes <= PIECE_BYTES:
        yield from _ndarray(shape, dtype)
        return
    per_piece = PIECE_BYTES // dtype.itemsize
    sizes = [min(per_piece, math.prod(shape) - at) for at in range(0, math.prod(shape), per_piece)]
    yield b"\x83" + _text(_CHUNKED) + b"\xc3" + _text("shape") + _map(len(shape))
    yield b"".join(_text(str(i)) + _int(n) for i, n in enumerate(shape))
    yield _text("chunks") + _map(len(sizes))
    for number, elements in enumerate(sizes):
        yield _text(str(number))
        yield from _ndarray((elements,), dtype)


def _ndarray(shape: Shape, dtype: np.dtype) -> Iterator[bytes | int]:
    nbytes = math.prod(shape) * dtype.itemsize
    inner = b"\x93" + _array(len(shape)) + b"".join(map(_int, shape)) + _text(dtype.name)
    inner += _bin(nbytes)
    yield _ext(len(inner) + nbytes) + inner
    yield nbytes


def _sized(value: int, forms: Sequence[tuple[int, int, str]]) -> bytes:
    """The shortest form that holds `value`: (first byte, limit, struct format)."""
    for byte, limit, form in forms:
        if value < limit:
            return bytes([byte]) + struct.pack(form, value)
    raise ConversionError([f"{value} is too large for msgpack: a tensor above 4 GiB in one piece"])


def _int(n: int) -> bytes:
    forms = [(0xCC, 2**8, ">B"), (0xCD, 2**16, ">H"), (0xCE, 2**32, ">I"), (0xCF, 2**64, ">Q")]
    return bytes([n]) if n < 128 else _sized(n, forms)


def _text(text: str) -> bytes:
    data = text.encode()
    forms = [(0xD9, 2**8, ">B"), (0xDA, 2**16, ">H"), (0xDB, 2**32, ">I")]
    return (bytes([0xA0 | len(data)]) if len(data) < 32 else _sized(len(data), forms)) + data


def _array(n: int) -> bytes:
    return bytes([0x90 | n]) if n < 16 else _sized(n, [(0xDC, 2**16, ">H"), (0xDD, 2**32, ">I")])


def _map(n: int) -> bytes:
    return bytes([0x80 | n]) if n < 16 else _sized(n, [(0xDE, 2**16, ">H"), (0xDF, 2**32, ">I")])


def _bin(n: int) -> bytes:
    return _sized(n, [(0xC4, 2**8, ">B"), (0xC5, 2**16, ">H"), (0xC6, 2**32, ">I")])


def _ext(n: int) -> bytes:
    fixed = {size: byte for byte, size in _EXT_FIXED.items()}
    forms = [(0xC7, 2**8, ">B"), (0xC8, 2**16, ">H"), (0xC9, 2**32, ">I")]
    return (bytes([fixed[n]]) if n in fixed else _sized(n, forms)) + bytes([_NDARRAY])


_EXT_FIXED = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_FIXED = {
    "int": [(0x00, 0x7F, 0)],
    "str": [(0xA0, 0xBF, 0xA0)],
    "array": [(0x90, 0x9F, 0x90)],
    "map": [(0x80, 0x8F, 0x80)],
    "bin": [],
}
_SIZED = {
    "int": {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"},
    "str": {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"},
    "array": {0xDC: ">H", 0xDD: ">I"},
    "map": {0xDE: ">H", 0xDF: ">I"},
    "bin": {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"},
    "ext": {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"},
}
