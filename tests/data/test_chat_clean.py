"""Cleaning steps against brute force and by example."""

import itertools
import random

import pytest

from lemur_jax.config import ConfigError
from lemur_jax.data.chat import clean
from lemur_jax.data.chat.conversation import Conversation, Message


def talk(text, path="p", source="s", **meta):
    turns = (Message("user", text), Message("assistant", "Yes."))
    return Conversation(turns, path, source=source, meta=meta)


def test_languages():
    """Red if the seed goes (short texts flip), code is looked at, or undetectable texts go."""
    english = "The function returns the number of lines that were read from the open file."
    german = "Die Funktion gibt die Anzahl der Zeilen zurück, die gelesen wurden, und schließt sie."
    step = clean.KeepLanguages()
    kept = step.keep([talk(english), talk(german), talk(f"{english}\n```\n{german * 9}\n```")])
    assert kept == [True, False, True]
    numbers = Conversation((Message("user", "1 + 1"), Message("assistant", "2")), "p")
    assert step.keep([numbers]) == [True]
    for doubtful in ("print radio\nYes.", "normal test\nYes.", "taxi hotel bar\nYes."):
        assert len({*clean.languages_of([doubtful] * 20)}) == 1
    both = clean.KeepLanguages(languages=("en", "de"))
    assert both.keep([talk(german)]) == [True]


@pytest.mark.slow
def test_languages_in_processes(monkeypatch):
    """Red if parts come back in another order, or the seed is not set in the processes."""
    monkeypatch.setattr(clean, "_TEXTS_A_TASK", 3)
    words = ("print radio", "normal test", "Die Zeilen, die gelesen wurden.", "1", "the open file")
    talks = [talk(word) for word in words * 4]
    found = clean.KeepLanguages(processes=2)._detect(talks)
    assert found == clean.KeepLanguages(processes=1)._detect(talks)
    assert len(set(found)) > 2


def test_language_of_the_record():
    """Red if `field` is ignored, or a record without it passes."""
    step = clean.KeepLanguages(field="lang")
    assert step.keep([talk("x", lang="en"), talk("x", lang="de")]) == [True, False]
    with pytest.raises(ConfigError, match="KeepLanguages.field='lang'"):
        step.keep([talk("x")])


@pytest.mark.parametrize(
    "text, run",
    [("naïve café", 1), ("你好吗", 3), ("你 好 吗", 1), ("你—好—吗", 1),
     ("—…“”", 0), ("😀😀😀", 0), ("हिन्दी", 6),
     ("äöü", 3), ("", 0), ("abc", 0), ("été à", 1), ("x→→→y", 0)],
)  # fmt: skip
def test_runs_of_foreign_characters(text, run):
    """Red if marks ("M") or letters ("L") are dropped, or a run is not reset."""
    assert clean.longest_foreign_run(text) == run
    kept = clean.DropNonEnglishRuns(length=3).keep([talk(text)])
    assert kept == [run < 3]


def test_exact_duplicates():
    """Red if roles or whitespace rules change, or the last of equals stays."""
    one, spaced = talk("a b", "1"), talk(" a  b\n", "2")
    other = Conversation((Message("user", "a b"), Message("assistant", "No.")), "3")
    assert clean.DropExactDuplicates().keep([one, spaced, other, one]) == [True, False, True, False]


def test_near_duplicates_against_brute_force():
    """Red if the threshold is ignored, shingles are sets of words, or the later one stays.

    Pairs whose true similarity is within 0.12 of the threshold may go either way: MinHash with 128
    permutations has a standard deviation of at most 0.045."""
    draw = random.Random(0)
    words = [f"word{n}" for n in range(400)]
    texts = []
    for _ in range(60):
        base = [draw.choice(words) for _ in range(120)]
        for changes in (0, 1, 2, 4, 8, 30):
            edited = list(base)
            for _ in range(changes):
                edited[draw.randrange(len(edited))] = draw.choice(words)
            texts.append(" ".join(edited))
    draw.shuffle(texts)
    step = clean.DropNearDuplicates(threshold=0.7)
    kept = step.keep([talk(text) for text in texts])
    grams = [
        {tuple(w[at : at + 5]) for at in range(len(w) - 4)}
        for w in ((text + " yes").split() for text in texts)
    ]

    def similarity(a, b):
        return len(a & b) / len(a | b)

    survivors = [number for number, stays in enumerate(kept) if stays]
    pairs = itertools.combinations(survivors, 2)
    assert max(similarity(grams[a], grams[b]) for a, b in pairs) < 0.82
    for number, stays in enumerate(kept):
        if not stays:
            earlier = (similarity(grams[number], grams[n]) for n in range(number))
            assert max(earlier) > 0.58
    assert 60 < len(survivors) < len(texts)


def test_texts_without_words_are_compared_as_they_are():
    """Red if a text without words had no n-gram (all would be equal), or a lone surrogate ended
    the step."""
    texts = ["?!", "\ud800", "?!", "..."]
    talks = [Conversation((Message("user", text),), str(n)) for n, text in enumerate(texts)]
    assert clean.DropNearDuplicates().keep(talks) == [True, True, False, True]


def test_steps_are_counted_and_limited_to_their_sources():
    """Red if `removed` counts survivors, the order of steps is lost, or `sources` is ignored."""
    talks = [
        talk("你好吗", "1", "web"),
        talk("你好吗", "2", "own"),
        talk("same", "3", "web"),
        talk("same", "4", "own"),
    ]
    steps = [clean.DropNonEnglishRuns(sources=("web",)), clean.DropExactDuplicates()]
    left, removed = clean.clean(talks, steps)
    assert [c.path for c in left] == ["2", "3"]
    assert [(r.step, r.seen, r.conversations, r.first) for r in removed] == [
        ("non-English characters", 2, 1, ("1",)),
        ("exact duplicates", 3, 1, ("4",)),
    ]
    assert removed[0].bytes == len("你好吗\nYes.".encode())


@pytest.mark.parametrize(
    "make",
    [
        lambda: clean.KeepLanguages(languages=(), characters=0, processes=-1),
        lambda: clean.DropNonEnglishRuns(length=0),
        lambda: clean.DropNearDuplicates(threshold=0.0, ngram=0, permutations=1),
    ],
)
def test_bad_settings_are_named(make):
    """Red if a __post_init__ goes."""
    with pytest.raises(ConfigError):
        make()
