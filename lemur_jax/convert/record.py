"""The checksum of a stretch of a file, compared once, when the first of its bytes are wanted."""

import os
import threading
import zlib
from pathlib import Path

from lemur_jax.convert.errors import ConversionError

_PIECE_BYTES = 4 << 20


class Record:
    """Bytes of a file that have a CRC-32, read in order beside whatever else reads them."""

    def __init__(self, path: Path, name: str, start: int, nbytes: int, crc: int):
        """Reads nothing yet.

        Args:
          path: the file. name: of the record in it; for messages.
          start, nbytes: where it lies.
          crc: as zlib.crc32 counts.
        """
        self._path, self._name = path, name
        self._start, self._nbytes, self._crc = start, nbytes, crc
        self._lock, self._sound = threading.Lock(), False

    def check(self, tensor: str) -> None:
        """Reads the record, the first time only; `tensor` is what lies in it, for the message.

        Raises:
          ConversionError: its bytes are not those that were written, or the file ends before.
        """
        with self._lock:
            if not self._sound and self._sum() != self._crc:
                raise ConversionError(
                    [
                        f"{self._path} is damaged: the bytes of {tensor!r} do not have the CRC-32 "
                        f"that its record {self._name!r} states ({self._crc:08x}). Download or "
                        "copy it again"
                    ]
                )
            self._sound = True

    def _sum(self) -> int:
        buffer, total, done = bytearray(_PIECE_BYTES), 0, 0
        with open(self._path, "rb", buffering=0) as file:
            file.seek(self._start)
            while done < self._nbytes:
                view = memoryview(buffer)[: self._nbytes - done]
                count = os.readv(file.fileno(), [view])
                if not count:
                    break
                total = zlib.crc32(view[:count], total)
                done += count
        return total
