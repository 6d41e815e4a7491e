"""Cleaning of conversations, as steps that are counted: what Lemur-Chat's paper names (A.2.1).

A step is a frozen dataclass; `keep` says of each conversation whether it stays. Steps run in the
order of ChatBuildConfig.steps, each on what those before it left, training before held-out: a copy
of a training conversation leaves the held-out split and never the other way round.

The paper found near-duplicates by cosine > 0.95 of INSTRUCTOR embeddings. That needs a model, so it
is not here: `DropNearDuplicates` compares word shingles (MinHash), which finds copies and light
edits and not paraphrases.
"""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import ClassVar

from lemur_jax.config import ConfigError
from lemur_jax.data.chat.conversation import Conversation

_WORD = re.compile(r"\w+")
_CODE = re.compile(r"```.*?(```|$)", re.DOTALL)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepLanguages:
    """Keeps conversations in some languages, as langdetect (fixed seed) or their record says.

    Attributes:
      languages: ISO 639-1 codes, as langdetect's.
      field: of the record that holds the language ("lang" of OpenAssistant); None detects it.
      characters: of the text that are looked at, fenced code left out.
      sources: names of the sources that it applies to; () is all of them.

    A text in which nothing can be detected (numbers, code alone) stays.
    """

    name: ClassVar[str] = "language"
    languages: tuple[str, ...] = ("en",)
    field: str | None = None
    characters: int = 2000
    sources: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "languages", tuple(self.languages))
        problems = [] if self.languages else ["KeepLanguages.languages=() keeps nothing"]
        if self.characters < 1:
            problems.append(f"KeepLanguages.characters={self.characters} must be positive")
        _raise_if(problems)

    def keep(self, conversations: Sequence[Conversation]) -> list[bool]:
        """Whether each stays. Raises ConfigError for a record without `field`."""
        if self.field is None:
            return [self._detected(c.text()) in (None, *self.languages) for c in conversations]
        _raise_if(
            [
                f"KeepLanguages.field={self.field!r}: {c.path} has none; set field=None to detect "
                "the language, or name the sources that have it in `sources`"
                for c in conversations
                if self.field not in c.meta
            ][:5]
        )
        return [c.meta[self.field] in self.languages for c in conversations]

    def _detected(self, text: str) -> str | None:
        import langdetect  # late: its profiles take half a second

        langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
        try:
            return langdetect.detect(_CODE.sub(" ", text)[: self.characters])
        except langdetect.LangDetectException:
            return None


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
class DropNearDuplicates:
    """Drops conversations that share most of their word shingles with an earlier one.

    Attributes:
      threshold: Jaccard similarity, estimated by MinHash, from which one is a near-duplicate.
      shingle_words: words of a shingle; case and punctuation do not count.
      permutations: of MinHash; the estimate's standard deviation is at most 0.5 / sqrt of it.
      sources: as of KeepLanguages.
    """

    name: ClassVar[str] = "near duplicates"
    threshold: float = 0.8
    shingle_words: int = 5
    permutations: int = 128
    sources: tuple[str, ...] = ()

    def __post_init__(self):
        problems = []
        if not 0 < self.threshold <= 1:
            problems.append(f"DropNearDuplicates.threshold={self.threshold} must be in (0, 1]")
        if self.shingle_words < 1:
            problems.append(f"DropNearDuplicates.shingle_words={self.shingle_words}: at least 1")
        if self.permutations < 16:
            problems.append(f"DropNearDuplicates.permutations={self.permutations}: at least 16")
        _raise_if(problems)

    def keep(self, conversations: Sequence[Conversation]) -> list[bool]:
        """Whether each stays: the first of similar ones does, and only those that stay count."""
        import datasketch  # late: it imports scipy

        # Bands are chosen to find pairs a little below the threshold too: LSH alone misses many at
        # it. The estimate from all permutations then decides.
        index = datasketch.MinHashLSH(
            threshold=max(0.05, self.threshold - 0.1), num_perm=self.permutations
        )
        kept_signatures, kept = {}, []
        for number, conversation in enumerate(conversations):
            signature = datasketch.MinHash(num_perm=self.permutations, seed=1)
            signature.update_batch(shingles(conversation.text(), self.shingle_words))
            similar = (
                kept_signatures[other].jaccard(signature) >= self.threshold
                for other in index.query(signature)
            )
            kept.append(not any(similar))
            if kept[-1]:
                index.insert(number, signature)
                kept_signatures[number] = signature
        return kept


def shingles(text: str, words: int) -> list[bytes]:
    """Runs of `words` words, lower case; a shorter text is one shingle."""
    found = [word.encode("utf-8", "surrogatepass") for word in _WORD.findall(text.lower())]
    return [b" ".join(found[at : at + words]) for at in range(max(1, len(found) - words + 1))]


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
