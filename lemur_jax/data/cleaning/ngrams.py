"""Words, and their n-grams as 64-bit numbers: the same on every machine and in every process."""

import re
import zlib

import numpy as np

_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def words(text: str) -> list[str]:
    """Letters, digits and underscores in a row, lower case: what is compared of a text."""
    return _WORD.findall(text.lower())


def word_numbers(found: list[str]) -> np.ndarray:
    """uint64 [words]: CRC-32 of each."""
    return np.fromiter(
        (zlib.crc32(w.encode("utf-8", "surrogatepass")) for w in found), np.uint64, len(found)
    )


def ngram_numbers(numbers: np.ndarray, n: int) -> np.ndarray:
    """uint64 [words - n + 1] of all n-grams, by their place; [0] when there are fewer words."""
    count = len(numbers) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(n):  # a polynomial modulo 2^64: numpy wraps without a word on arrays
        total = total * _BASE + numbers[offset : offset + count] + np.uint64(1)
    total ^= total >> np.uint64(31)
    total *= _MIX
    return total ^ (total >> np.uint64(29))
