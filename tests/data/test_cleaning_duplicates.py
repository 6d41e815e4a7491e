"""Duplicates: against brute force, and the numbers and groups that they are found with."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_jax.data.cleaning import duplicates, groups, ngrams
from lemur_jax.data.cleaning.duplicates import ExactDuplicates, NearDuplicates


def redundant(step, texts, tmp_path, memory_bytes=1 << 20):
    """{removed: kept} of texts."""
    sign = step.signer()
    signatures = np.array([sign(text) for text in texts], step.dtype).reshape(-1, step.width)
    found = {}
    for removed, kept in step.redundant(signatures, tmp_path / "spill", memory_bytes):
        assert not set(removed.tolist()) & found.keys()
        found |= dict(zip(removed.tolist(), kept.tolist()))
    return found


def shingles(text, n):
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def clusters(edges, count):
    """First document of each document's connected component, by repeated relabelling."""
    first = list(range(count))
    for _ in range(count):
        for a, b in edges:
            first[a] = first[b] = min(first[a], first[b])
    return first


@pytest.mark.parametrize("every_pair", [256, 2])
def test_near_duplicates_are_brute_force(tmp_path, monkeypatch, every_pair):
    """Red if a band is left out, clusters keep another than the first, or nothing is compared
    after the bands. Pairs whose similarity is within four standard errors of the threshold may
    fall either way, so there are none."""
    pytest.importorskip("datasketch")
    monkeypatch.setattr(duplicates, "_EVERY_PAIR", every_pair)
    draw = random.Random(0)
    vocabulary = [f"w{n}" for n in range(300)]
    texts = []
    for _ in range(90):
        words = draw.choices(vocabulary, k=draw.randint(60, 200))
        texts.append(" ".join(words))
        for changes in draw.choice([(), (1,), (1, 1, 2), (40,), (25, 1)]):
            other = list(words)
            for _ in range(changes):
                other[draw.randrange(len(other))] = "new"
            texts.append(" ".join(other))
    draw.shuffle(texts)
    threshold, n, edges = 0.7, 3, []
    sets = [shingles(text, n) for text in texts]
    kept = []
    for a, one in enumerate(sets):
        similar = [len(one & sets[b]) / len(one | sets[b]) for b in kept]
        if any(0.54 < s < 0.86 for s in similar):
            continue  # too near the threshold for 128 permutations to tell
        kept.append(a)
    texts, sets = [texts[a] for a in kept], [sets[a] for a in kept]
    for a, one in enumerate(sets):
        for b in range(a):
            if len(one & sets[b]) / len(one | sets[b]) >= threshold:
                edges.append((b, a))
    first = clusters(edges, len(texts))
    expected = {n: f for n, f in enumerate(first) if f != n}
    assert len(texts) > 150 and len(expected) > 30
    step = NearDuplicates(threshold=threshold, ngram=n)
    assert redundant(step, texts, tmp_path) == expected


def test_similar_is_not_near(tmp_path, monkeypatch):
    """Red if documents that only share a band are joined without a comparison."""
    pytest.importorskip("datasketch")
    words = [f"w{n}" for n in range(400)]
    texts = [" ".join(words), " ".join([*words[:300], *map(str, range(100))])]  # Jaccard 0.6
    monkeypatch.setattr(NearDuplicates, "bands", lambda self: (128, 1))
    assert redundant(NearDuplicates(ngram=1), texts, tmp_path) == {}
    assert redundant(NearDuplicates(ngram=1, threshold=0.4), texts, tmp_path / "b") == {1: 0}


def test_signatures_estimate_jaccard():
    """Red if n-grams are hashed badly: what agrees must estimate the similarity."""
    pytest.importorskip("datasketch")
    sign = NearDuplicates(ngram=2, permutations=1024).signer()
    words = [f"w{n}" for n in range(301)]
    for shared in (30, 150, 270):
        other = [*words[:shared], *(f"x{n}" for n in range(301 - shared))]
        a, b = " ".join(words), " ".join(other)
        true = len(shingles(a, 2) & shingles(b, 2)) / len(shingles(a, 2) | shingles(b, 2))
        assert np.mean(sign(a) == sign(b)) == pytest.approx(true, abs=0.06)  # 4 standard errors


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.sampled_from(["a", "A ", "b", "b\n", "", " ", "ﬁ", "fi"]), max_size=30),
    memory=st.sampled_from([100, 1000, 1 << 20]),
)
def test_exact_duplicates(tmp_path_factory, texts, memory):
    """Red if another than the first is kept, or parts on disk lose a group."""
    normal = {"A ": "a", "b\n": "b", " ": "", "ﬁ": "fi"}
    for step, spelled in (
        (ExactDuplicates(), [normal.get(text, text) for text in texts]),
        (ExactDuplicates(normalise=False), texts),
    ):
        expected = {n: spelled.index(t) for n, t in enumerate(spelled) if spelled.index(t) != n}
        assert redundant(step, texts, tmp_path_factory.mktemp("x"), memory) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=60), st.integers(24, 999))
def test_equal_keys(tmp_path_factory, keys, memory):
    """Red if the second half of a key is ignored, or a document is its own duplicate."""
    records = [(a << 60, b, n // 2) for n, (a, b) in enumerate(keys)]
    expected = {}
    for a, b, n in records:
        expected.setdefault((a, b), set()).add(n)
    blocks = [np.array(records[i : i + 7], np.uint64) for i in range(0, len(records), 7)]
    directory = tmp_path_factory.mktemp("groups")
    found = [g.tolist() for g in groups.equal_keys(blocks, len(records), directory, memory)]
    assert sorted(found) == sorted(sorted(g) for g in expected.values() if len(g) > 1)
    assert not list(directory.iterdir())


def test_ngrams_are_numbered_by_their_words():
    """Red if order does not matter, or a window is left out."""
    numbers = ngrams.word_numbers(ngrams.words("a b c a b. B a"))
    grams = ngrams.ngram_numbers(numbers, 2).tolist()
    assert len(grams) == 6 and grams[0] == grams[3] and len(set(grams)) == 5
    assert len(ngrams.ngram_numbers(numbers, 8)) == 0
