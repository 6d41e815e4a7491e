"""Files of the data package: documents in, directories out.

Reading: one generator over .jsonl, .jsonl.gz and .txt files, which names file, line and fix when
something is not a document. Writing: a directory appears complete or not at all.
"""

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lemur_jax.config import ConfigError

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: what the model reads, where it came from and which split it asks for.

    Attributes:
      text: what the model reads.
      path: where it came from: the record's "path", else "file:record".
      split: "train", "validation", or None when its source decides.
      meta: the record's other fields, which filters look at: licence, language, url...
    """

    text: str
    path: str
    split: str | None = None
    meta: Mapping[str, object] = dataclasses.field(default_factory=dict)


def expand(patterns: Sequence[str], field: str) -> list[str]:
    """Files that `patterns` (paths or globs) name, sorted and without repetition.

    Raises ConfigError naming `field` when a pattern names nothing or a suffix is unknown.
    """
    if not patterns:
        raise ConfigError([f"{field}={patterns!r} is empty: give paths or globs of {SUFFIXES}"])
    problems, found = [], set()
    for pattern in patterns:
        matches = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        if not matches:
            problems.append(
                f"{field}={pattern!r} matches no file: check the path, or write the corpus there "
                "first (`lemur data corpus`)"
            )
        found.update(matches)
    for name in sorted(found):
        if not name.endswith(SUFFIXES):
            problems.append(f"{field}={name!r} has an unknown suffix: use one of {SUFFIXES}")
    if problems:
        raise ConfigError(problems)
    return sorted(found)


def read_documents(
    names: Sequence[str], field: str, text_key: str = "text", split_key: str | None = None
) -> Iterator[Document]:
    """Documents of `names` in order. A .txt file is one document, a .jsonl line is one document.

    Args:
      names: files, as `expand` returns them.
      field: the setting that named them, for messages.
      text_key: key of the text in a .jsonl record.
      split_key: key that says "train" or "validation"; None ignores it.

    Raises ConfigError with file, line, what is wrong and the fix.
    """
    for name in names:
        if name.endswith(".txt"):
            data = Path(name).read_bytes()
            yield Document(_decode(data, name, field, 1), os.path.basename(name))
            continue
        opener = gzip.open if name.endswith(".gz") else open
        with opener(name, "rb") as lines:
            for number, line in enumerate(_lines(lines, name, field), 1):
                if line.strip():
                    yield _record(line, name, number, field, text_key, split_key)


def texts(patterns: Sequence[str], field: str = "files", text_key: str = "text") -> Iterator[str]:
    """Texts of files, interleaved by file size, so that any prefix is a fair sample of them all.

    A .jsonl file whose first record has a "split" gives its training documents only: a tokenizer
    must not learn from held-out text.
    """
    names = expand(patterns, field)
    streams = {n: read_documents([n], field, text_key, _split_key(n)) for n in names}
    sizes = {name: max(os.path.getsize(name), 1) for name in names}
    used = dict.fromkeys(names, 0)
    while streams:
        name = min(streams, key=lambda name: used[name] / sizes[name])
        document = next((d for d in streams[name] if d.split != "validation"), None)
        if document is None:
            del streams[name]
        else:
            used[name] += len(document.text.encode("utf-8"))
            yield document.text


def _split_key(name: str) -> str | None:
    if name.endswith(".txt"):
        return None
    try:
        with gzip.open(name) if name.endswith(".gz") else open(name, "rb") as lines:
            record = json.loads(next(lines, b"null"))
    except (OSError, ValueError):
        return None  # `read_documents` says what is wrong with the file
    return "split" if isinstance(record, dict) and "split" in record else None


def _lines(lines, name: str, field: str) -> Iterator[bytes]:
    try:
        yield from lines
    except (OSError, EOFError) as error:
        raise ConfigError(
            [f"{field}={name!r} cannot be read ({error}): replace the file or remove it"]
        ) from error


def _decode(data: bytes, name: str, field: str, number: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            [
                f"{field}={name!r} is not text: line {number} has byte 0x{data[error.start]:02x} "
                f"at offset {error.start}, which is not UTF-8; convert the file or remove it"
            ]
        ) from error
    if "\0" in text:
        raise ConfigError(
            [f"{field}={name!r} is not text: line {number} has a NUL byte; remove the file"]
        )
    return text


def _record(
    line: bytes, name: str, number: int, field: str, text_key: str, split_key: str | None
) -> Document:
    where = f"{field}={name!r} line {number}"
    try:
        record = json.loads(_decode(line, name, field, number))
    except json.JSONDecodeError as error:
        raise ConfigError(
            [f"{where} is not JSON ({error.msg}): every line must be one JSON object"]
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ConfigError(
            [f"{where} has no string {text_key!r} (found {keys}): set SourceConfig.text_key"]
        )
    text = record[text_key]
    if "\0" in text or not _is_unicode(text):
        raise ConfigError(
            [f"{where}: {text_key!r} holds a NUL or a lone surrogate: not text; drop that record"]
        )
    split = None
    if split_key is not None:
        split = record.get(split_key)
        if split not in ("train", "validation"):
            raise ConfigError(
                [
                    f"{where} has {split_key}={split!r}: write 'train' or 'validation', or set "
                    "SourceConfig.validation_fraction instead of split_key"
                ]
            )
    return Document(text, str(record.get("path", f"{os.path.basename(name)}:{number}")), split)


def _is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogate, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def sha256(data: bytes | str) -> str:
    """Hexadecimal SHA-256; text is hashed as UTF-8."""
    return hashlib.sha256(data.encode("utf-8") if isinstance(data, str) else data).hexdigest()


def fraction_of(key: str) -> float:
    """A number in [0, 1) that depends on `key` only: the same on every machine."""
    return int(hashlib.sha256(key.encode("utf-8")).hexdigest()[:13], 16) / 16.0**13


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` that becomes `path` when the block ends without an error.

    A crash leaves `path` as it was: absent, or with its old content.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            # Two renames, so that at every moment the old or the new content is there whole.
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / path.name)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(path: str | Path, field: str, marker: str) -> None:
    """Raises ConfigError when `path` holds something that is not ours (no `marker` file)."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError([f"{field}={str(path)!r} is a file: give a directory"])
    if path.is_dir() and any(path.iterdir()) and not (path / marker).is_file():
        raise ConfigError(
            [
                f"{field}={str(path)!r} is not empty and has no {marker}: nothing was touched; "
                "give a new directory or empty this one"
            ]
        )
