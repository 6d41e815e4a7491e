"""Decontamination: documents that share an n-gram of words with an evaluation item are removed."""

import dataclasses
import functools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lemur_jax.config import ConfigError
from lemur_jax.data.cleaning.ngrams import ngram_numbers, word_numbers, words
from lemur_jax.data.cleaning.steps import Apply, Removal, as_tuples, check
from lemur_jax.data.files import Document
from lemur_jax.data.reading import formats, storage
from lemur_jax.data.reading.patterns import expand
from lemur_jax.data.reading.rows import Problem


@dataclasses.dataclass(frozen=True)
class _Ngram:
    """An n-gram of an evaluation item, and whose it is."""

    words: tuple[str, ...]
    item: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decontaminate:
    """Removes documents that share an n-gram with an evaluation set (arXiv:2005.14165, appendix C).

    Texts are compared as lower-case words, so punctuation and layout do not matter. The report
    names each document, the evaluation item and the n-gram. The evaluation sets are held in memory,
    in each worker: about 250 bytes a word.

    Attributes:
      files: evaluation sets: paths or globs of .jsonl(.gz, .zst), .json (a list, or an object of
        lists) or .parquet files.
      keys: fields whose texts count; () takes every text of an item.
      ngram: words of an n-gram.
      min_words: texts of fewer than `ngram` words, but at least so many, must occur as a whole;
        shorter ones are too common to tell: they are counted in the report, not compared.
    """

    files: tuple[str, ...]
    keys: tuple[str, ...] = ()
    ngram: int = 13
    min_words: int = 8

    def __post_init__(self):
        as_tuples(self, "files", "keys")
        problems = [] if self.files else ["files=() is empty: name the evaluation sets"]
        if self.ngram < 1:
            problems.append(f"ngram={self.ngram} must be >= 1")
        if not 1 <= self.min_words <= max(self.ngram, 1):
            problems.append(f"min_words={self.min_words} must be in [1, ngram={self.ngram}]")
        check(self, problems)

    def start(self) -> Apply:
        index, _ = _index(self)
        if not index:
            raise ConfigError(
                [
                    f"Decontaminate.files={self.files!r} hold no text of at least "
                    f"{self.min_words} words in keys={self.keys!r}: nothing would be compared"
                ]
            )
        numbers = {n: np.sort(np.fromiter(found, np.uint64)) for n, found in index.items()}

        def apply(document: Document, counts: Counter) -> Document | Removal:
            found = words(document.text)
            own = word_numbers(found)
            for n, known in numbers.items():
                grams = ngram_numbers(own, n)
                places = np.minimum(np.searchsorted(known, grams), len(known) - 1)
                for place in np.flatnonzero(known[places] == grams):
                    hit = index[n][int(grams[place])]
                    if tuple(found[place : place + n]) == hit.words:  # not a mere equal number
                        evidence = {"item": hit.item, "ngram": " ".join(hit.words)}
                        return Removal("shares an n-gram", evidence)
            return document

        return apply


def too_short(step: Decontaminate) -> int:
    """How many evaluation texts have too few words to be compared."""
    return _index(step)[1]


@functools.lru_cache(maxsize=4)
def _index(step: Decontaminate) -> tuple[dict[int, dict[int, _Ngram]], int]:
    """{n: {number: n-gram}} of all evaluation texts, and how many were too short."""
    index: dict[int, dict[int, _Ngram]] = {}
    short = 0
    for item, text in _texts(step):
        found = words(text)
        if len(found) < step.min_words:
            short += 1
            continue
        n = min(step.ngram, len(found))
        for place, number in enumerate(ngram_numbers(word_numbers(found), n).tolist()):
            gram = _Ngram(tuple(map(sys.intern, found[place : place + n])), item)
            index.setdefault(n, {}).setdefault(number, gram)
    return index, short


def _texts(step: Decontaminate) -> Iterator[tuple[str, str]]:
    """(file:number, text) of every evaluation text."""
    field = "Decontaminate.files"
    for name in expand(step.files, field):
        short = name.rsplit("/", 1)[-1]
        for number, item in enumerate(_items(name, field), 1):
            if step.keys and isinstance(item, Mapping):
                missing = [key for key in step.keys if key not in item]
                if missing:
                    raise ConfigError(
                        [f"{field}={name!r} item {number} has no {missing}: it has {sorted(item)}"]
                    )
                item = [item[key] for key in step.keys]
            for text in _leaves(item):
                yield f"{short}:{number}", text


def _items(name: str, field: str) -> Iterator[Any]:
    if name.endswith(".json"):
        try:
            with storage.open_binary(name, field) as file:
                whole = json.load(file)
        except (OSError, ValueError):
            whole = None  # perhaps lines of JSON under this name
        if whole is not None:
            lists = (
                [v for v in whole.values() if isinstance(v, list)] if _is_map(whole) else [whole]
            )
            yield from (item for part in lists for item in part) if lists else [whole]
            return
    for row in formats.read(name, field):
        if isinstance(row, Problem):
            raise ConfigError([f"{field}={name!r} {row.what}"])
        yield row.fields


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
