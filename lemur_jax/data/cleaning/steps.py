"""What a cleaning step is, and the filters that look at one document alone.

A step is a frozen dataclass that gin can set. `start` makes its function once for each process:

    apply(document, counts) -> the document (changed or not), or a Removal that says why

`counts` is a Counter for what the report should tell besides (how many e-mails were redacted...).
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lemur_jax.config import ConfigError
from lemur_jax.data.cleaning.language import language_detector
from lemur_jax.data.files import Document
from lemur_jax.data.reading.where import FieldError, look_up


@dataclasses.dataclass(frozen=True)
class Removal:
    """Why a step removes a document; `evidence` goes into the report as it is."""

    reason: str
    evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Apply = Callable[[Document, Counter], Document | Removal]


class DocumentStep(Protocol):
    """A step that needs to see one document at a time."""

    def start(self) -> Apply:
        """The step's function, with whatever it must load."""
        ...


def check(step: Any, problems: list[str]) -> None:
    """Raises ConfigError with all `problems` of a step, each naming its class."""
    if problems:
        raise ConfigError([f"{type(step).__name__}.{problem}" for problem in problems])


def as_tuples(step: Any, *fields: str) -> None:
    """Makes tuples of what gin binds as lists or single strings."""
    for field in fields:
        value = getattr(step, field)
        object.__setattr__(step, field, (value,) if isinstance(value, str) else tuple(value))


_ASCII_SIGNS = bytes(code for code in range(128) if not chr(code).isalnum())
PERMISSIVE = ("MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Unlicense", "CC0-1.0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LicenceFilter:
    """Keeps documents all of whose licences are allowed.

    Attributes:
      field: of the record: a licence or a list of them; dotted names look inside.
      allow: licences that are kept, compared without case.
      unknown: "remove" or "keep" documents whose field is absent, null or empty.
    """

    field: str = "max_stars_repo_licenses"
    allow: tuple[str, ...] = PERMISSIVE
    unknown: str = "remove"

    def __post_init__(self):
        as_tuples(self, "allow")
        problems = [] if self.allow else ["allow=() is empty: list the licences to keep"]
        if self.unknown not in ("remove", "keep"):
            problems.append(f"unknown={self.unknown!r} must be 'remove' or 'keep'")
        check(self, problems)

    def start(self) -> Apply:
        allowed = {licence.lower() for licence in self.allow}

        def apply(document: Document, counts: Counter) -> Document | Removal:
            try:
                value = look_up(document.meta, self.field)
            except FieldError:
                value = None
            found = value if isinstance(value, (list, tuple)) else [value] if value else []
            if not found:
                if self.unknown != "keep":
                    return Removal("no licence")
                counts["no licence"] += 1
                return document
            other = [str(one) for one in found if str(one).lower() not in allowed]
            return Removal(f"licence {other[0]}") if other else document

        return apply


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageFilter:
    """Keeps documents in the languages given: of a field, or as langdetect finds them.

    Attributes:
      languages: to keep: ISO 639-1 codes, or the field's own words.
      field: of the record that names the language; None detects it.
      characters: of a document's beginning that are looked at.
      seed: of langdetect, which samples: the same seed gives the same answer.
      unknown: "remove" or "keep" documents whose language cannot be told.
    """

    languages: tuple[str, ...] = ("en",)
    field: str | None = None
    characters: int = 2000
    seed: int = 0
    unknown: str = "remove"

    def __post_init__(self):
        as_tuples(self, "languages")
        problems = [] if self.languages else ["languages=() is empty: list those to keep"]
        if self.characters < 1:
            problems.append(f"characters={self.characters} must be >= 1")
        if self.unknown not in ("remove", "keep"):
            problems.append(f"unknown={self.unknown!r} must be 'remove' or 'keep'")
        check(self, problems)

    def start(self) -> Apply:
        tell = self._detect() if self.field is None else self._look_up

        def apply(document: Document, counts: Counter) -> Document | Removal:
            language = tell(document)
            if language is None:
                counts["unknown language"] += 1
                return document if self.unknown == "keep" else Removal("unknown language")
            return document if language in self.languages else Removal(f"language {language}")

        return apply

    def _look_up(self, document: Document) -> str | None:
        try:
            value = look_up(document.meta, self.field or "")
        except FieldError:
            return None
        return str(value) if value else None

    def _detect(self) -> Callable[[Document], str | None]:
        detect = language_detector(self.seed)
        return lambda document: detect(document.text[: self.characters])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthFilter:
    """Keeps documents of min_characters to max_characters; None does not limit."""

    min_characters: int = 1
    max_characters: int | None = None

    def __post_init__(self):
        least, most = self.min_characters, self.max_characters
        wrong = most is not None and most < least
        check(self, [f"max_characters={most} must be >= min_characters={least}"] if wrong else [])

    def start(self) -> Apply:
        def apply(document: Document, counts: Counter) -> Document | Removal:
            length = len(document.text)
            if length < self.min_characters:
                return Removal("too short")
            if self.max_characters is not None and length > self.max_characters:
                return Removal("too long")
            return document

        return apply


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineFilter:
    """Keeps documents with lines as people write them; the defaults are StarCoder's.

    Attributes:
      max_line: characters of the longest line (arXiv:2305.06161, section 3).
      max_mean_line: characters of a line on average.
    """

    max_line: int = 1000
    max_mean_line: float = 100.0

    def __post_init__(self):
        fields = {"max_line": self.max_line, "max_mean_line": self.max_mean_line}
        check(self, [f"{name}={n} must be > 0" for name, n in fields.items() if not n > 0])

    def start(self) -> Apply:
        def apply(document: Document, counts: Counter) -> Document | Removal:
            lengths = [len(line) for line in document.text.splitlines()] or [0]
            if max(lengths) > self.max_line:
                return Removal("a line is too long")
            if sum(lengths) > self.max_mean_line * len(lengths):
                return Removal("lines are too long")
            return document

        return apply


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlphanumericFilter:
    """Keeps documents of whose characters at least `min_fraction` are letters or digits."""

    min_fraction: float = 0.25

    def __post_init__(self):
        wrong = not 0 <= self.min_fraction <= 1
        check(self, [f"min_fraction={self.min_fraction} must be in [0, 1]"] if wrong else [])

    def start(self) -> Apply:
        def apply(document: Document, counts: Counter) -> Document | Removal:
            text = document.text
            if text.isascii():  # 40 times as fast
                found = len(text.encode("ascii").translate(None, _ASCII_SIGNS))
            else:
                found = sum(map(str.isalnum, text))
            return document if found >= self.min_fraction * len(text) else Removal("few letters")

        return apply
