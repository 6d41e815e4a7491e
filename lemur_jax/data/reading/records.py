"""Rows -> Documents: the text column, the filters, the split, and what happens to bad records."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lemur_jax.config import ConfigError
from lemur_jax.data.files import Document
from lemur_jax.data.reading.rows import Problem, Row
from lemur_jax.data.reading.where import Clause, FieldError, look_up

_FIRST = 5  # bad records that are named
_LOST = "; what follows in the file is lost, and in no count"


@dataclasses.dataclass
class ReadReport:
    """What reading met; the sum over shards is the report of a source.

    Attributes:
      documents: that were yielded.
      filtered: records that SourceConfig.where left out.
      bad: records that cannot be documents, counted with bad_records="count".
      first: messages of the first bad ones; those of files whose rest is lost come before others.
    """

    documents: int = 0
    filtered: int = 0
    bad: int = 0
    first: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "ReadReport") -> None:
        """Adds another shard's counts."""
        self.documents += other.documents
        self.filtered += other.filtered
        self.bad += other.bad
        self.first = _name_some(self.first + other.first)

    def count_bad(self, message: str, limit: int | None) -> None:
        """Counts one bad record; raises ConfigError when there are more than `limit`."""
        self.bad += 1
        self.first = _name_some([*self.first, message])
        self.check(limit)

    def check(self, limit: int | None) -> None:
        """Raises ConfigError when more than `limit` records are bad."""
        if limit is not None and self.bad > limit:
            raise ConfigError(
                [
                    f"{self.bad} bad records, SourceConfig.max_bad_records={limit}: repair them or "
                    "allow more; the first are:",
                    *self.first,
                ]
            )

    def show(self, name: str) -> None:
        """Prints to stderr what did not become a document; nothing when all did."""
        if self.bad or self.filtered:
            print(
                f"source {name}: {self.documents:,} documents; {self.filtered:,} records left out "
                f"by where, {self.bad:,} bad records{':' if self.bad else ''}",
                *self.first,
                sep="\n  ",
                file=sys.stderr,
            )


def _name_some(messages: list[str]) -> list[str]:
    """The first few; a stream that is damaged may give many bad lines before its end is noticed."""
    return sorted(messages, key=lambda message: not message.endswith(_LOST))[:_FIRST]


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a source's rows become documents: see SourceConfig, whose fields these are."""

    text_key: str = "text"
    split_key: str | None = None
    where: tuple[Clause, ...] = ()
    meta_keys: tuple[str, ...] | None = None
    raise_bad: bool = True
    max_bad: int | None = None

    def columns(self) -> list[str] | None:
        """Names of the fields that are needed; None when all of them are."""
        if self.meta_keys is None:
            return None
        split = [self.split_key] if self.split_key else []
        needed = [self.text_key, *split, *(clause.field for clause in self.where), *self.meta_keys]
        return list(dict.fromkeys(needed))


def documents(
    rows: Iterable[Row | Problem],
    path: str,
    label: str,
    field: str,
    rules: Rules,
    report: ReadReport,
) -> Iterator[Document]:
    """Documents of one file's rows, counted in `report`.

    Args:
      path: of the file, for messages.
      label: its name in Document.path of records that have no "path" of their own.
      field: the setting that named the file, for messages.

    Raises ConfigError with file, place, what is wrong and the fix at the first bad record, or past
    `rules.max_bad` of them.
    """
    for row in rows:
        found = row if isinstance(row, Problem) else _document(row, label, rules)
        if found is None:
            report.filtered += 1
        elif isinstance(found, Document):
            report.documents += 1
            yield found
        else:
            lost = _LOST if found.ends_file else ""
            message = f"{field}={path!r} {found.what}"
            if rules.raise_bad:
                raise ConfigError([message])
            report.count_bad(message + lost, rules.max_bad)


def _document(row: Row, label: str, rules: Rules) -> Document | Problem | None:
    fields = row.fields
    try:
        if not all(clause.holds(fields) for clause in rules.where):
            return None
    except FieldError as error:
        return Problem(f"{row.place} {error}: correct SourceConfig.where or drop that record")
    text = _text(row, rules.text_key)
    if isinstance(text, Problem):
        return text
    split = None
    if rules.split_key is not None:
        split = _text(row, rules.split_key) if rules.split_key in fields else None
        if split not in ("train", "validation"):
            return Problem(
                f"{row.place} has {rules.split_key}={fields.get(rules.split_key)!r}: write 'train' "
                "or 'validation', or set SourceConfig.validation_fraction instead of split_key"
            )
    name = fields.get("path")
    name = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    place = label if row.number is None else f"{label}:{row.number}"
    return Document(text, str(name) if name else place, split, _meta(fields, rules))


def _text(row: Row, key: str) -> str | Problem:
    try:
        text = look_up(row.fields, key)
    except FieldError:
        text = None
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            return Problem(
                f"is not text: {row.place} has byte 0x{text[error.start]:02x} at offset "
                f"{error.start} of {key!r}, which is not UTF-8; drop that record"
            )
    if not isinstance(text, str):
        return Problem(
            f"{row.place} has no string {key!r} (found {sorted(row.fields)}"
            f"{'' if key not in row.fields else ', of type ' + type(row.fields[key]).__name__}): "
            "set SourceConfig.text_key"
        )
    if "\0" in text or not _is_unicode(text):
        return Problem(
            f"{row.place}: {key!r} holds a NUL or a lone surrogate: not text; drop that record"
        )
    return text


def _meta(fields: Mapping[str, Any], rules: Rules) -> Mapping[str, Any]:
    if rules.meta_keys is None:
        return {name: value for name, value in fields.items() if name != rules.text_key}
    return _present(rules.meta_keys, fields)


def _is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogate, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _present(names: Sequence[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields among `names`, dotted names looked up; absent ones are left out."""
    found = {}
    for name in names:
        try:
            found[name] = look_up(fields, name)
        except FieldError:
            continue
    return found
