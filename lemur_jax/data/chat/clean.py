"""Cleaning of conversations, as steps that are counted: what Lemur-Chat's paper names (A.2.1).

A step is a frozen dataclass; `keep` says of each conversation whether it stays. Steps run in the
order of ChatBuildConfig.steps, each on what those before it left, training before held-out: a copy
of a training conversation leaves the held-out split and never the other way round.

The paper found near-duplicates by cosine > 0.95 of INSTRUCTOR embeddings. That needs a model, so it
is not here: `DropNearDuplicates` compares word shingles (MinHash), which finds copies and light
edits and not paraphrases.
"""

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import re
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from lemur_jax.config import ConfigError
from lemur_jax.data.chat.conversation import Conversation
from lemur_jax.data.cleaning.duplicates import NearDuplicates
from lemur_jax.data.cleaning.language import language_detector

_CODE = re.compile(r"```.*?(```|$)", re.DOTALL)
_MEMORY_BYTES = 256 << 20  # of sorting the signatures' bands
_TEXTS_A_TASK = 2000  # a process takes a second to start
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepLanguages:
    """Keeps conversations in some languages, as langdetect (fixed seed) or their record says.

    Attributes:
      languages: ISO 639-1 codes, as langdetect's.
      field: of the record that holds the language ("lang" of OpenAssistant); None detects it.
      characters: of the text that are looked at, fenced code left out.
      processes: that detect; 0: one for each core. One detects about 200 texts a second.
      sources: names of the sources that it applies to; () is all of them.

    A text in which nothing can be detected (numbers, code alone) stays.
    """

    name: ClassVar[str] = "language"
    languages: tuple[str, ...] = ("en",)
    field: str | None = None
    characters: int = 2000
    processes: int = 1
    sources: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "languages", tuple(self.languages))
        problems = [] if self.languages else ["KeepLanguages.languages=() keeps nothing"]
        if self.characters < 1:
            problems.append(f"KeepLanguages.characters={self.characters} must be positive")
        if self.processes < 0:
            problems.append(
                f"KeepLanguages.processes={self.processes} must be >= 0 (0: every core)"
            )
        _raise_if(problems)

    def keep(self, conversations: Sequence[Conversation]) -> list[bool]:
        """Whether each stays. Raises ConfigError for a record without `field`."""
        if self.field is None:
            return [found in (None, *self.languages) for found in self._detect(conversations)]
        _raise_if(
            [
                f"KeepLanguages.field={self.field!r}: {c.path} has none; set field=None to detect "
                "the language, or name the sources that have it in `sources`"
                for c in conversations
                if self.field not in c.meta
            ][:5]
        )
        return [c.meta[self.field] in self.languages for c in conversations]

    def _detect(self, conversations: Sequence[Conversation]) -> list[str | None]:
        texts = [_CODE.sub(" ", c.text())[: self.characters] for c in conversations]
        chunks = [texts[at : at + _TEXTS_A_TASK] for at in range(0, len(texts), _TEXTS_A_TASK)]
        processes = min(self.processes or os.cpu_count() or 1, len(chunks))
        if processes < 2:
            return languages_of(texts)
        # Not forked: jax and TensorFlow may have threads in this process.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
            return [found for part in pool.map(languages_of, chunks) for found in part]


def languages_of(texts: Sequence[str]) -> list[str | None]:
    """The language of each text by langdetect, always the same; None where there is none."""
    return [*map(language_detector(), texts)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropNonEnglishRuns:
    """Drops conversations with a run of non-English characters, 3 in the paper.

    A non-English character is a letter or mark (Unicode categories L and M) outside of ASCII;
    anything else ends a run: "naïve" has a run of 1, "你好吗" of 3, "—" and "😀😀😀" of none. The
    paper speaks of dropping sentences; here the conversation goes, whose answers may depend on it.

    Attributes:
      length: of the shortest run that is too long.
      sources: as of KeepLanguages.
    """

    name: ClassVar[str] = "non-English characters"
    length: int = 3
    sources: tuple[str, ...] = ()

    def __post_init__(self):
        if self.length < 1:
            raise ConfigError([f"DropNonEnglishRuns.length={self.length} must be positive"])

    def keep(self, conversations: Sequence[Conversation]) -> list[bool]:
        """Whether each stays."""
        return [longest_foreign_run(c.text()) < self.length for c in conversations]


def longest_foreign_run(text: str) -> int:
    """Characters of the longest run of non-English ones, as DropNonEnglishRuns defines them."""
    longest = 0
    for candidate in _NOT_ASCII.findall(text):
        run = 0
        for character in candidate:
            run = run + 1 if unicodedata.category(character)[0] in "LM" else 0
            longest = max(longest, run)
    return longest


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropExactDuplicates:
    """Drops conversations whose turns, whitespace apart, were there before.

    Attributes:
      sources: as of KeepLanguages; the same conversation in two sources is a duplicate.
    """

    name: ClassVar[str] = "exact duplicates"
    sources: tuple[str, ...] = ()

    def keep(self, conversations: Sequence[Conversation]) -> list[bool]:
        """Whether each stays: the first of equals does."""
        seen: set[bytes] = set()
        return [_is_new(_digest(c), seen) for c in conversations]


def _digest(conversation: Conversation) -> bytes:
    turns = [(m.role, " ".join(m.content.split())) for m in conversation.messages]
    return hashlib.sha256(repr(turns).encode("utf-8", "surrogatepass")).digest()


def _is_new(key: bytes, seen: set[bytes]) -> bool:
    if key in seen:
        return False
    seen.add(key)
    return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropNearDuplicates(NearDuplicates):
    """Drops conversations whose text is like an earlier one's, as NearDuplicates does documents.

    Attributes:
      sources: as of KeepLanguages.
    """

    name: ClassVar[str] = "near duplicates"
    sources: tuple[str, ...] = ()

    def keep(self, conversations: Sequence[Conversation]) -> list[bool]:
        """Whether each stays: the first of a cluster does."""
        stays = [True] * len(conversations)
        if not conversations:
            return stays
        sign = self.signer()
        signatures = np.stack([sign(c.text()) for c in conversations])
        with tempfile.TemporaryDirectory() as directory:
            for removed, _ in self.redundant(signatures, Path(directory), _MEMORY_BYTES):
                for number in removed:
                    stays[number] = False
        return stays


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


Step = KeepLanguages | DropNonEnglishRuns | DropExactDuplicates | DropNearDuplicates
STEPS = (KeepLanguages, DropNonEnglishRuns, DropExactDuplicates, DropNearDuplicates)


@dataclasses.dataclass(frozen=True)
class Removed:
    """What one step removed: how many of how many, bytes of text, and the first few by place."""

    step: str
    seen: int
    conversations: int
    bytes: int
    first: tuple[str, ...]


def clean(
    conversations: Sequence[Conversation], steps: Sequence[Step]
) -> tuple[list[Conversation], list[Removed]]:
    """What is left after all steps, and what each removed."""
    left, removed = list(conversations), []
    for step in steps:
        asked = [c for c in left if not step.sources or c.source in step.sources]
        stays = dict(zip(map(id, asked), step.keep(asked)))
        gone = [c for c in asked if not stays[id(c)]]
        left = [c for c in left if stays.get(id(c), True)]
        size = sum(len(c.text().encode("utf-8", "surrogatepass")) for c in gone)
        first = tuple(c.path for c in gone[:5])
        removed.append(Removed(step.name, len(asked), len(gone), size, first))
    return left, removed
