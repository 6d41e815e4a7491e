"""Tensors of a PyTorch file (.bin, .pth): where each lies. Neither torch nor pickle is imported.

Since 1.6 such a file is a zip archive of uncompressed members: NAME/data.pkl, the table of
contents, and NAME/data/<key>, one for each storage. Before, it was a sequence of pickles and the
storages behind them, each after its number of elements.
"""

import io
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from lemur_jax.convert import torch_pickle
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.file_kind import check_file
from lemur_jax.convert.record import Record
from lemur_jax.convert.stored import StoredTensor
from lemur_jax.convert.torch_pickle import View

_LOCAL_HEADER = 30  # bytes; then the name and the extra field
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# Of a storage: its first byte, its bytes, and its checksum if the file has one.
_Place = tuple[int, int, Record | None]


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, by name. Reads the table of contents only.

    Raises:
      ConversionError: damaged, compressed, or holds anything but tensors.
    """
    check_file(path)
    if zipfile.is_zipfile(path):
        try:
            contents, starts = _zip(path)
        except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
            raise _damaged(path, f"not a readable zip archive ({error})") from error
    elif is_cut_zip(path):
        raise _damaged(
            path,
            f"the zip archive is cut short at byte {path.stat().st_size}: its end, which "
            "says where everything lies, is missing",
        )
    else:
        contents, starts = _legacy(path)
    if not isinstance(contents, dict):
        raise ConversionError(
            [f"{path} holds a {type(contents).__name__}, not a dictionary of tensors"]
        )
    problems = [
        f"{path}: {name!r} is a {type(value).__name__}: only tensors are read; save the model's "
        "state_dict alone"
        for name, value in contents.items()
        if not isinstance(value, View) or not isinstance(name, str)
    ]
    if problems:
        raise ConversionError(problems[:8])
    return {name: _tensor(path, name, view, starts) for name, view in contents.items()}


def is_cut_zip(path: Path) -> bool:
    """Whether a file begins as a zip archive and does not end as one."""
    with open(path, "rb") as file:
        return file.read(4) == _ZIP_MAGIC and not zipfile.is_zipfile(path)


def _tensor(path: Path, name: str, view: View, starts: dict[str, _Place]) -> StoredTensor:
    storage, stride = view.storage, 1
    for size, found in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size > 1 and found != stride:
            raise ConversionError(
                [
                    f"{path}: {name!r} {list(view.shape)} is stored with strides "
                    f"{list(view.strides)}: call .contiguous() on it and save again"
                ]
            )
        stride *= size
    if storage.key not in starts:
        raise _damaged(path, f"it has no data for {name!r} (storage {storage.key!r})")
    start, nbytes, record = starts[storage.key]
    first = view.offset * storage.dtype.itemsize
    extent = (start + first, stride * storage.dtype.itemsize)
    tensor = StoredTensor(path, name, view.shape, storage.dtype, (extent,), record)
    if first + tensor.nbytes > nbytes:
        raise _damaged(
            path,
            f"{name!r} {list(view.shape)} needs {first + tensor.nbytes} bytes of its storage, "
            f"which has {nbytes}",
        )
    return tensor


def _zip(path: Path) -> tuple[Any, dict[str, _Place]]:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
    tables = [name for name in members if name.split("/")[-1] == "data.pkl"]
    if len(tables) != 1:
        raise ConversionError([f"{path} has {len(tables)} data.pkl: no PyTorch checkpoint"])
    prefix = tables[0].removesuffix("data.pkl")
    with open(path, "rb") as file:
        places = {name: _place(path, file, info) for name, info in members.items()}
        order = places.get(f"{prefix}byteorder")
        if order is not None and _read(file, order, "byteorder") != b"little":
            raise ConversionError([f"{path} was written on a big-endian machine: unsupported"])
        if members[tables[0]].file_size > torch_pickle.MAX_PICKLE_BYTES:
            raise _damaged(path, f"its data.pkl has {members[tables[0]].file_size} bytes")
        table = _read(file, places[tables[0]], "the table of contents")
    contents = torch_pickle.load(io.BytesIO(table), path)
    data = f"{prefix}data/"
    return contents, {
        name.removeprefix(data): place for name, place in places.items() if name.startswith(data)
    }


def _place(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> _Place:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ConversionError([f"{path}: {info.filename!r} is compressed: save it with torch.save"])
    size = path.stat().st_size
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != _ZIP_MAGIC:
        raise _damaged(path, f"{info.filename!r} is not at byte {info.header_offset}")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    start = info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
    if start + info.file_size > size:
        raise _damaged(path, f"{info.filename!r} ends at {start + info.file_size} of {size} bytes")
    record = None
    if info.CRC:  # 0 where torch.serialization.set_crc32_options(False) left it out
        record = Record(path, info.filename, start, info.file_size, info.CRC)
    return start, info.file_size, record


def _read(file: BinaryIO, place: _Place, what: str) -> bytes:
    start, nbytes, record = place
    if record is not None:
        record.check(what)
    file.seek(start)
    return file.read(nbytes)


def _legacy(path: Path) -> tuple[Any, dict[str, _Place]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = [torch_pickle.load(file, path) for _ in range(2)]
        if head != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
            raise ConversionError([f"{path} is no PyTorch file: it begins with {head!r}"])
        if torch_pickle.load(file, path).get("little_endian") is not True:
            raise ConversionError([f"{path} was written on a big-endian machine: unsupported"])
        contents = torch_pickle.load(file, path)
        keys = torch_pickle.load(file, path)
        views = contents.items() if isinstance(contents, dict) else ()
        owners = {view.storage.key: (name, view) for name, view in views if isinstance(view, View)}
        starts = {}
        for key in keys:
            if key not in owners:
                raise _damaged(path, f"storage {key!r} belongs to no tensor")
            name, view = owners[key]
            raw = file.read(8)
            nbytes = int.from_bytes(raw, "little") * view.storage.dtype.itemsize
            start = file.tell()
            if len(raw) < 8 or start + nbytes > size:
                raise _damaged(
                    path, f"{name!r} (storage {key!r}) ends at {start + nbytes} of {size} bytes"
                )
            starts[key] = (start, nbytes, None)
            file.seek(nbytes, io.SEEK_CUR)
    return contents, starts


def _damaged(path: Path, what: str) -> ConversionError:
    return ConversionError([f"{path} is damaged: {what}. Download or copy it again"])
