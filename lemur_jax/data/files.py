"""Files of the data package: what a document is, and directories that appear complete or not.

How files of all formats are read is the package `reading`.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lemur_jax.config import ConfigError
from lemur_jax.data.reading.patterns import expand, format_of
from lemur_jax.data.reading.storage import size


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


def texts(patterns: Sequence[str], field: str = "files", text_key: str = "text") -> Iterator[str]:
    """Texts of files, interleaved by file size, so that any prefix is a fair sample of them all.

    A file whose first record has a "split" gives its training documents only: a tokenizer must not
    learn from held-out text.
    """
    names = expand(patterns, field)
    streams = {name: _training_texts(name, field, text_key) for name in names}
    sizes = {name: max(size(name, field), 1) for name in names}
    used = dict.fromkeys(names, 0)
    while streams:
        name = min(streams, key=lambda name: used[name] / sizes[name])
        text = next(streams[name], None)
        if text is None:
            del streams[name]
        else:
            used[name] += len(text.encode("utf-8"))
            yield text


def _training_texts(name: str, field: str, text_key: str) -> Iterator[str]:
    # They import Document from here.
    from lemur_jax.data.reading import formats, records
    from lemur_jax.data.reading.rows import Row

    rows = formats.read(name, field)
    first = next(rows, None)
    if first is None:
        return
    has_split = isinstance(first, Row) and "split" in first.fields
    key = "text" if format_of(name) == "text" else text_key
    rules = records.Rules(key, "split" if has_split else None, meta_keys=())
    rows = itertools.chain([first], rows)
    report = records.ReadReport()
    for document in records.documents(rows, name, os.path.basename(name), field, rules, report):
        if document.split != "validation":
            yield document.text


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
