"""Text formats, streamed: .jsonl, .jsonl.gz, .jsonl.zst, and plain files as documents."""

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from lemur_jax.config import ConfigError
from lemur_jax.data.reading import storage
from lemur_jax.data.reading.rows import Problem, Row, unreadable

_CHUNK = 1 << 20
# Damage shows where a code makes no sense or a checksum fails, which is later than where it is.
_DOUBT = "the stream is damaged, and what it gave before may be wrong"
DAMAGE = (OSError, EOFError)  # what a broken file raises


def read_jsonl(
    path: str, field: str, units: tuple[int, int] | None = None
) -> Iterator[Row | Problem]:
    """Records of a .jsonl file, compressed or not; blank lines are no records.

    Args:
      units: of an uncompressed file: [first, last + 1) bytes; lines that begin there are read, and
        are numbered by the byte at which they begin, since nobody has counted those before.
    """
    if units is not None:
        yield from _read_bytes(path, field, *units)
        return
    number = 0
    try:
        for line in _lines(_chunks(path, field)):
            number += 1
            if line.strip():
                yield _record(line, number, f"line {number}")
    except DAMAGE as error:
        yield unreadable(error, f"line {number}" if number else "")


def _read_bytes(path: str, field: str, start: int, stop: int) -> Iterator[Row | Problem]:
    offset = start
    try:
        with storage.open_binary(path, field) as file:
            # From one byte before: a line that begins at `start` is then not the first.
            file.seek(max(start - 1, 0))
            lines = _lines(iter(lambda: file.read(_CHUNK), b""))
            if start:
                offset += len(next(lines, b""))  # the end of a line of the shard before
            for line in lines:
                if offset >= stop:
                    return
                if line.strip():
                    yield _record(line, offset, f"the line at byte {offset}")
                offset += len(line) + 1
    except DAMAGE as error:
        yield unreadable(error, f"byte {offset}")


def read_text(
    path: str, field: str, lines_per_document: int | None = None
) -> Iterator[Row | Problem]:
    """A plain file as one document, or as one for every `lines_per_document` lines."""
    try:
        if lines_per_document is None:
            yield _text(b"".join(_chunks(path, field)), None, "line 1")
            return
        held, first = [], 1
        for number, line in enumerate(_lines(_chunks(path, field)), 1):
            held.append(line)
            if len(held) == lines_per_document:
                yield _text(b"\n".join(held), first, f"line {first}")
                held, first = [], number + 1
        if held and held != [b""]:
            yield _text(b"\n".join(held), first, f"line {first}")
    except DAMAGE as error:
        yield unreadable(error)


def _text(data: bytes, number: int | None, place: str) -> Row | Problem:
    decoded = _decode(data, place)
    return decoded if isinstance(decoded, Problem) else Row(place, number, {"text": decoded})


def _record(line: bytes, number: int, place: str) -> Row | Problem:
    text = _decode(line, place)
    if isinstance(text, Problem):
        return text
    try:
        fields = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        why = getattr(error, "msg", "nested too deep")
        return Problem(f"{place} is not JSON ({why}): every line must be one JSON object")
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        return Problem(f"{place} is JSON but a {kind}: every line must be one JSON object")
    return Row(place, number, fields)


def _decode(data: bytes, place: str) -> str | Problem:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem(
            f"is not text: {place} has byte 0x{data[error.start]:02x} at offset {error.start}, "
            "which is not UTF-8; convert the file or remove it"
        )
    if "\0" in text:
        return Problem(f"is not text: {place} has a NUL byte; remove the file")
    return text


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends, from chunks; only \\n ends a line, as JSON lines have it."""
    held: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        held.append(first)
        if rest:
            yield b"".join(held)
            yield from rest[:-1]
            held = [rest[-1]]
    last = b"".join(held)
    if last:
        yield last


def _chunks(path: str, field: str) -> Iterator[bytes]:
    with storage.open_binary(path, field) as file:
        if path.endswith(".gz"):
            yield from _gzip(file)
        elif path.endswith(".zst"):
            yield from _zstd(file, zstandard_for(path, field))
        else:
            yield from iter(lambda: file.read(_CHUNK), b"")


def zstandard_for(path: str, field: str) -> Any:
    """The module zstandard. Raises ConfigError with how to install it when it is not there."""
    try:
        import zstandard

        return zstandard
    except ImportError as error:
        raise ConfigError(
            [f"{field}={path!r} needs zstandard ({error}): pip install zstandard"]
        ) from error


def _gzip(file: BinaryIO) -> Iterator[bytes]:
    try:
        yield from _frames(file, lambda: zlib.decompressobj(wbits=31))
    except zlib.error as error:
        raise OSError(f"gzip: {error}; {_DOUBT}") from error


def _zstd(file: BinaryIO, zstandard: Any) -> Iterator[bytes]:
    try:
        yield from _frames(file, lambda: zstandard.ZstdDecompressor().decompressobj())
    except zstandard.ZstdError as error:
        raise OSError(f"zstd: {error}; {_DOUBT}") from error


def _frames(file: BinaryIO, new_frame: Callable[[], Any]) -> Iterator[bytes]:
    """Decompressed chunks of all frames (gzip: members) of a file.

    zstandard's stream_reader takes a truncated file for a complete one, and gzip's read loses what
    came before the damage; here what came before the chunk that fails is given, then an error.
    """
    frame = None
    for chunk in iter(lambda: file.read(_CHUNK // 8), b""):
        while chunk:
            if frame is None and not chunk.strip(b"\0"):
                break  # tape padding, which gzip allows between members
            frame = frame or new_frame()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the compressed stream has no end: the file was truncated")
