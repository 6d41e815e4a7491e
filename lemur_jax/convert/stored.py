"""A tensor that lies in a file, row by row: any region of it, without the rest of the file."""

import dataclasses
import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from lemur_jax import checkpoint
from lemur_jax.convert.disk import DiskFile, aligned_empty
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.record import Record

_RWF_DONTCACHE = 0x80  # of linux/fs.h; Python has no name for it
Shape = tuple[int, ...]
Region = tuple[slice, ...]  # one slice with start and stop for each axis, step 1

_RUN_BYTES = 256 << 10  # shorter pieces of rows are cut out of whole rows, which are read together
_PIECE_BYTES = 2 << 20  # of an array that is turned: what stays in a core's cache
_BAND_BYTES = 4 << 20  # of such rows at a time


def whole(shape: Shape) -> Region:
    """The region that is everything."""
    return tuple(slice(0, size) for size in shape)


def shape_of(region: Region) -> Shape:
    """How many elements a region has along each axis."""
    return tuple(part.stop - part.start for part in region)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, in C order.

    Attributes:
      path: the file.
      name: as stored; for messages.
      shape, dtype: of the tensor.
      extents: (first byte in the file, bytes) of each piece; almost always one.
      record: what of the file has a checksum; compared when the tensor's first element is read,
        so that of many processes that read parts of it one does it.
    """

    path: Path
    name: str
    shape: Shape
    dtype: np.dtype
    extents: tuple[tuple[int, int], ...]
    record: Record | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, region: Region | None = None) -> np.ndarray:
        """A region in a fresh array; never holds more than it and 4 MiB.

        Raises:
          ConversionError: the file ends before the tensor does, or its checksum is wrong.
        """
        region = whole(self.shape) if region is None else region
        if self.record is not None and not any(part.start for part in region):
            self.record.check(self.name)
        out = aligned_empty(shape_of(region), self.dtype)
        if not out.size:
            return out
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            if self._in_short_runs(region):
                self._read_columns(descriptor, region, out)
            else:
                view = _bytes_of(out)
                for at, start, size in self._runs(region):
                    self._pread(descriptor, view[at : at + size], start)
        finally:
            os.close(descriptor)
        return out

    def write(self, file: DiskFile, region: Region, array: np.ndarray) -> None:
        """Puts `array` in its place in the file."""
        view = _bytes_of(contiguous(array))
        for at, start, size in self._runs(region):
            for offset, done, length in self._pieces(start, size):
                file.write(view[at + done : at + done + length], offset)

    def _in_short_runs(self, region: Region) -> bool:
        cut = len(self.shape) == 2 and shape_of(region)[1] != self.shape[1]
        return cut and shape_of(region)[1] * self.dtype.itemsize < _RUN_BYTES

    def _read_columns(self, descriptor: int, region: Region, out: np.ndarray) -> None:
        rows, columns = region
        row_bytes = self.shape[1] * self.dtype.itemsize
        step = max(1, _BAND_BYTES // row_bytes)
        for first in range(rows.start, rows.stop, step):
            count = min(step, rows.stop - first)
            band = np.empty((count, self.shape[1]), self.dtype)
            self._pread(descriptor, _bytes_of(band), first * row_bytes)
            at = first - rows.start
            out[at : at + count] = band[:, columns]

    def _runs(self, region: Region) -> Iterator[tuple[int, int, int]]:
        """(first byte in the region, first byte in the tensor, bytes) of each contiguous run."""
        sizes = shape_of(region)
        cut = [axis for axis, size in enumerate(sizes) if size != self.shape[axis]]
        last = cut[-1] if cut else 0
        strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(sizes))]
        size = math.prod(sizes[last:]) * self.dtype.itemsize
        base = sum(part.start * stride for part, stride in zip(region, strides))
        for number, index in enumerate(np.ndindex(sizes[:last])):
            first = base + sum(i * stride for i, stride in zip(index, strides))
            yield number * size, first * self.dtype.itemsize, size

    def _pieces(self, start: int, size: int) -> Iterator[tuple[int, int, int]]:
        """(byte in the file, bytes before it in the run, bytes) of a run of the tensor."""
        begin = 0
        for offset, length in self.extents:
            low, high = max(start, begin), min(start + size, begin + length)
            if low < high:
                yield offset + low - begin, low - start, high - low
            begin += length

    def _pread(self, descriptor: int, view: memoryview, start: int) -> None:
        for offset, done, length in self._pieces(start, len(view)):
            part = view[done : done + length]
            while len(part):
                count = _read_uncached(descriptor, part, offset)
                if not count:
                    raise ConversionError(
                        [
                            f"{self.path} is damaged: truncated: {self.name} needs byte "
                            f"{offset + len(part)}, the file ends at {offset}. Download or copy "
                            "it again"
                        ]
                    )
                part, offset = part[count:], offset + count


def _read_uncached(descriptor: int, view: memoryview, offset: int) -> int:
    """As preadv, without filling the page cache where the kernel can do that (Linux 6.14)."""
    try:
        return os.preadv(descriptor, [view], offset, _RWF_DONTCACHE)
    except NotImplementedError:  # macOS has no flags
        pass
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    return os.preadv(descriptor, [view], offset)


def contiguous(array: np.ndarray) -> np.ndarray:
    """The same array in C order; itself if it is. JAX's way to the CPU device turns an array in
    blocks that suit the cache, without the GIL; numpy's own copy does neither."""
    if array.flags.c_contiguous:
        return array
    out = aligned_empty(array.shape, array.dtype)
    host = checkpoint.host_device()
    if array.strides[-1] == array.itemsize or host is None:  # numpy copies whole rows well
        out[...] = array
        return out
    axis = next(axis for axis, size in enumerate(array.shape) if size > 1)
    step = max(1, _PIECE_BYTES * array.shape[axis] // array.nbytes)
    for first in range(0, array.shape[axis], step):
        piece = (slice(None),) * axis + (slice(first, first + step),)
        out[piece] = np.asarray(jax.device_put(array[piece], host))
    return out


def _bytes_of(array: np.ndarray) -> memoryview:
    if not array.size:
        return memoryview(b"")
    return memoryview(array.reshape(-1).view(np.uint8))


@dataclasses.dataclass(frozen=True)
class JoinedTensor:
    """Parts of one tensor that lie in several files, put together along one axis.

    Attributes:
      name: of the whole; for messages.
      parts: in order.
      axis: along which they follow one another.
    """

    name: str
    parts: tuple[StoredTensor, ...]
    axis: int

    @property
    def path(self) -> Path:
        """Of the first part; for messages."""
        return self.parts[0].path

    @property
    def dtype(self) -> np.dtype:
        """The parts' common dtype."""
        return self.parts[0].dtype

    @property
    def shape(self) -> Shape:
        """Of the whole."""
        sizes = list(self.parts[0].shape)
        sizes[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return sum(part.nbytes for part in self.parts)

    def read(self, region: Region | None = None) -> np.ndarray:
        """As StoredTensor.read, of the whole."""
        region = whole(self.shape) if region is None else region
        out = np.empty(shape_of(region), self.dtype)
        wanted, begin = region[self.axis], 0
        before, after = region[: self.axis], region[self.axis + 1 :]
        for part in self.parts:
            size = part.shape[self.axis]
            low, high = max(wanted.start, begin), min(wanted.stop, begin + size)
            if low < high:
                place = slice(low - wanted.start, high - wanted.start)
                out[(slice(None),) * self.axis + (place,)] = part.read(
                    (*before, slice(low - begin, high - begin), *after)
                )
            begin += size
        return out
