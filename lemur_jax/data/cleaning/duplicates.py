"""Exact and near duplicates: a signature of each document, and which documents are redundant.

Of every cluster the first document is kept, in the order of sources, shards and records: the
result does not depend on the number of workers.
"""

import dataclasses
import hashlib
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lemur_jax.config import ConfigError
from lemur_jax.data.cleaning.groups import Clusters, equal_keys
from lemur_jax.data.cleaning.ngrams import ngram_numbers, word_numbers, words
from lemur_jax.data.cleaning.steps import check

_ROWS = 1 << 14  # signatures that are looked at together
_SHINGLES = 1 << 13  # hashed together: x permutations x 4 bytes
# Up to here every pair of a group is compared; in a larger one each document with those before it
# that are like none before them.
_EVERY_PAIR = 256


class CorpusStep(Protocol):
    """A step that compares documents with one another.

    Attributes:
      dtype: of a signature.
      width: items of a signature.
    """

    dtype: str
    width: int

    def signer(self) -> Callable[[str], np.ndarray]:
        """The function text -> signature [width]."""
        ...

    def redundant(
        self, signatures: np.ndarray, directory: Path, memory_bytes: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of (documents to remove, the document that is kept instead of each).

        Args:
          signatures: [documents, width], mapped from disk.
          directory: an empty one on disk, for what is spilled.
          memory_bytes: what may be held at a time.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactDuplicates:
    """Removes documents whose text occurred before; 16 bytes of BLAKE2b tell.

    Attributes:
      normalise: compares without case, Unicode's compatibility forms and the amount of white space;
        False compares texts as they are.
    """

    normalise: bool = True
    dtype = "<u8"
    width = 2

    def signer(self) -> Callable[[str], np.ndarray]:
        """Text -> uint64 [2]: BLAKE2b of the text as it is compared."""

        def sign(text: str) -> np.ndarray:
            if self.normalise:
                text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
            digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
            return np.frombuffer(digest, "<u8")

        return sign

    def redundant(
        self, signatures: np.ndarray, directory: Path, memory_bytes: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See CorpusStep. On disk 24 bytes for each document; in memory `memory_bytes`."""
        records = (
            np.column_stack([block.astype(np.uint64), _numbers(start, block)])
            for start, block in _blocks(signatures)
        )
        for group in equal_keys(records, len(signatures), directory, memory_bytes):
            yield group[1:], np.full(len(group) - 1, group[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Removes documents that are like an earlier one: MinHash-LSH (datasketch) of word n-grams.

    Two documents are alike when their signatures agree in at least `threshold` of the permutations,
    which estimates the Jaccard similarity of their n-grams (standard error at 0.8 and 128: 0.035).
    Clusters are the connected documents; the first of each is kept.

    Attributes:
      threshold: Jaccard similarity from which on documents are duplicates.
      ngram: words of an n-gram; a shorter document is one n-gram.
      permutations: of MinHash: 4 bytes each for each document, on disk.
      seed: of the permutations.
    """

    threshold: float = 0.8
    ngram: int = 5
    permutations: int = 128
    seed: int = 1
    dtype = "<u4"

    def __post_init__(self):
        problems = []
        if not 0.1 <= self.threshold <= 1:
            problems.append(f"threshold={self.threshold} must be in [0.1, 1]")
        if self.ngram < 1:
            problems.append(f"ngram={self.ngram} must be >= 1")
        if not 16 <= self.permutations <= 1024:
            problems.append(f"permutations={self.permutations} must be in [16, 1024]")
        check(self, problems)

    @property
    def width(self) -> int:
        """Items of a signature."""
        return self.permutations

    def signer(self) -> Callable[[str], np.ndarray]:
        """Text -> uint32 [permutations]: the MinHash of its n-grams."""
        # One object for all: making its permutations takes longer than a document.
        minhash = _datasketch().MinHash(
            num_perm=self.permutations, seed=self.seed, hashfunc=int, scheme="affine32"
        )

        def sign(text: str) -> np.ndarray:
            minhash.clear()
            shingles = _shingles(text, self.ngram)
            for start in range(0, len(shingles), _SHINGLES):
                minhash.update_batch(shingles[start : start + _SHINGLES])
            return minhash.hashvalues.astype("<u4")

        return sign

    def bands(self) -> tuple[int, int]:
        """(bands, permutations of each): datasketch's optimum, which weighs misses most, since what
        is found in vain is compared again."""
        index = _datasketch().MinHashLSH(
            threshold=self.threshold, num_perm=self.permutations, weights=(0.1, 0.9)
        )
        return index.b, index.r

    def redundant(
        self, signatures: np.ndarray, directory: Path, memory_bytes: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See CorpusStep. On disk 8 bytes, and 24 for each band, for each document."""
        directory.mkdir(parents=True, exist_ok=True)
        bands, rows = self.bands()
        clusters = Clusters(directory / "clusters", len(signatures))

        def records() -> Iterator[np.ndarray]:
            for start, block in _blocks(signatures):
                for band in range(bands):
                    part = block[:, band * rows : (band + 1) * rows].astype(np.uint64)
                    key = ngram_numbers(part.reshape(-1), rows)[::rows]  # a number of each row
                    second = np.full(len(key), band, np.uint64)
                    yield np.column_stack([key, second, _numbers(start, block)])

        groups = equal_keys(records(), len(signatures) * bands, directory / "bands", memory_bytes)
        for group in groups:
            _join_alike(group, signatures, self.threshold, clusters)
        yield from clusters.followers()


def _shingles(text: str, n: int) -> np.ndarray:
    """uint32 numbers of the different n-grams of words; of the whole text when it has fewer."""
    numbers = word_numbers(words(text) or [text])
    grams = ngram_numbers(numbers, min(n, len(numbers)))
    return np.unique(grams >> np.uint64(32)).astype(np.uint32)


def _join_alike(
    group: np.ndarray, signatures: np.ndarray, threshold: float, clusters: Clusters
) -> None:
    every_pair = len(group) <= _EVERY_PAIR
    firsts = [clusters.first(int(document)) for document in group]
    if len(set(firsts)) == 1:
        return  # another band has joined them
    own = np.asarray(signatures[group]) if every_pair else None
    left = np.arange(len(group))
    while len(left) > 1:
        head, rest = left[0], left[1:]
        alike = np.zeros(len(rest), bool)
        for start in range(0, len(rest), _ROWS):
            part = rest[start : start + _ROWS]
            others = own[part] if every_pair else signatures[group[part]]
            first = own[head] if every_pair else signatures[group[head]]
            alike[start : start + _ROWS] = np.mean(others == first, axis=1) >= threshold
        for other in rest[alike]:
            clusters.join(int(group[head]), int(group[other]))
        left = rest if every_pair else rest[~alike]


def _blocks(signatures: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(signatures), _ROWS):
        yield start, np.asarray(signatures[start : start + _ROWS])


def _numbers(start: int, block: np.ndarray) -> np.ndarray:
    return np.arange(start, start + len(block), dtype=np.uint64)


def _datasketch() -> Any:
    try:
        import datasketch

        return datasketch
    except ImportError as error:
        raise ConfigError(
            [f"NearDuplicates needs datasketch ({error}): pip install datasketch"]
        ) from error
