"""Steps of one document: filters, redaction, decontamination; each against something simpler."""

import gzip
import json
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_jax.config import ConfigError
from lemur_jax.data.cleaning import decontaminate, redact
from lemur_jax.data.cleaning.decontaminate import Decontaminate, too_short
from lemur_jax.data.cleaning.duplicates import NearDuplicates
from lemur_jax.data.cleaning.redact import RedactAddresses, RedactSecrets
from lemur_jax.data.cleaning.steps import (
    AlphanumericFilter,
    LanguageFilter,
    LengthFilter,
    LicenceFilter,
    LineFilter,
    Removal,
)
from lemur_jax.data.files import Document


def outcome(step, text="x", **meta):
    """The text that a step leaves, or its reason to remove it."""
    result = step.start()(Document(text, "p", "train", meta), Counter())
    return result.reason if isinstance(result, Removal) else result.text


@pytest.mark.parametrize(
    ("licences", "unknown", "expected"),
    [
        (["MIT"], "remove", "x"),
        (["mit", "apache-2.0"], "remove", "x"),
        ("MIT", "remove", "x"),
        (["MIT", "GPL-3.0"], "remove", "licence GPL-3.0"),
        ([], "remove", "no licence"),
        (None, "remove", "no licence"),
        ([], "keep", "x"),
    ],
)
def test_licences(licences, unknown, expected):
    """Red if one allowed licence is enough, case matters, or no licence counts as allowed."""
    step = LicenceFilter(field="repo.licences", unknown=unknown)
    assert outcome(step, repo={"licences": licences}) == expected
    assert outcome(LicenceFilter(), other=1) == "no licence"


def test_no_licence_is_counted_once():
    """Red if what is removed, which the stage counts by its reason, is counted here as well."""
    document, counts = Document("x", "p", "train", {}), Counter()
    LicenceFilter(unknown="remove").start()(document, counts)
    assert not counts
    LicenceFilter(unknown="keep").start()(document, counts)
    assert counts == {"no licence": 1}


TEXTS = {
    "en": "The quick brown fox jumps over the lazy dog, and everyone who watches it is amazed.",
    "de": "Der schnelle braune Fuchs springt über den faulen Hund, und alle staunen darüber.",
    "fr": "Le renard brun saute par-dessus le chien paresseux, et tout le monde est étonné.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_languages(language):
    """Red if the list of languages is inverted, or the field is ignored."""
    pytest.importorskip("langdetect")
    expected = TEXTS[language] if language in ("en", "fr") else f"language {language}"
    assert outcome(LanguageFilter(languages=("en", "fr")), TEXTS[language]) == expected
    assert outcome(LanguageFilter(field="lang"), lang=language) == (
        "x" if language == "en" else f"language {language}"
    )


def test_language_is_told_the_same_every_time():
    """Red if langdetect's seed is not set: it draws, and short texts come out differently."""
    langdetect = pytest.importorskip("langdetect")
    texts = ["no de la", "sin data", "der in on", "para test", "man hat in"] * 4
    step = LanguageFilter(languages=("en", "xx"), unknown="keep")
    first = [outcome(step, text) for text in texts]
    assert all(first[n] == first[n % 5] for n in range(20))
    assert langdetect.DetectorFactory.seed == 0
    assert outcome(LanguageFilter(), "1234 5678") == "unknown language"
    assert outcome(LanguageFilter(unknown="keep"), "1234 5678") == "1234 5678"


@given(st.text(max_size=60), st.integers(1, 30), st.integers(1, 30))
def test_limits(text, least, most):
    """Red if a limit is off by one, or bytes are counted instead of characters."""
    if most < least:
        with pytest.raises(ConfigError, match=f"max_characters={most} must be >= min_cha"):
            LengthFilter(min_characters=least, max_characters=most)
    else:
        step = LengthFilter(min_characters=least, max_characters=most)
        expected = "too short" if len(text) < least else "too long" if len(text) > most else text
        assert outcome(step, text) == expected
    lines = text.splitlines() or [""]
    mean = sum(map(len, lines)) / len(lines)
    longest = max(map(len, lines))
    expected = text
    if longest > most:
        expected = "a line is too long"
    elif mean > least:
        expected = "lines are too long"
    assert outcome(LineFilter(max_line=most, max_mean_line=least), text) == expected
    assert outcome(AlphanumericFilter(min_fraction=0.7), "a1 2") == "a1 2"
    good = sum(c.isalnum() for c in text) >= 0.5 * len(text)
    assert outcome(AlphanumericFilter(min_fraction=0.5), text) == (text if good else "few letters")


SECRETS = {
    "AWS key": "AKIA" + "Q3EGZ7WLQ4ZT2X5B",
    "GitHub token": "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8",
    "Google key": "AIza" + "SyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY",
    "Slack token": "xoxb-" + "123456789012-abcdefABCDEF",
    "Stripe key": "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
    "OpenAI key": "sk-" + "proj-Zq3vT8x0Lk2mN5pR7sU9wY1aB4cD6eF8",
    "Hugging Face token": "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "JSON web token": "eyJ"
    + "hbGciOiJIUzI1NiJ9."
    + "eyJ"
    + "zdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVm",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n" + "-----END RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_known_keys(kind):
    """Red if a kind's pattern no longer matches, or takes what surrounds the key with it."""
    counts = Counter()
    text = f"before = '{SECRETS[kind]}'  # after\n"
    result = RedactSecrets().start()(Document(text, "p"), counts)
    assert result.text == "before = '<SECRET>'  # after\n" and counts == {kind: 1}


def test_private_key_without_an_end():
    """Red if a block that is cut off stays, or takes the whole rest of a file."""
    text = "-----BEGIN PRIVATE KEY-----\nMIIE\n" + "x" * 20_000
    assert 10_000 < len(outcome(RedactSecrets(), text)) < 13_000


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ('api_key = "f3Kq9ZpL2xVb7NwT"', True),
        ("'client_secret': '9a8b7c6d5e4f3021'", True),
        ("token => 'kJ8s7D6f5G4h3J2k'", True),
        ('password = "changeme_changeme"', False),
        ('token = "aaaaaaaaaaaaaaaaaaaa1"', False),
        ('api_key = "your-api-key-goes-here"', False),
        ('checksum = "f3Kq9ZpL2xVb7NwT"', False),
        ('api_key = os.environ["OPENAI_API_KEY_NAME1"]', False),
    ],
)
def test_assigned_secrets(text, secret):
    """Red if a name is enough, or randomness alone is."""
    assert ("<SECRET>" in outcome(RedactSecrets(), text)) is secret


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgres://joe:s3cr.t!@db.host/x", "postgres://joe:<SECRET>@db.host/x"),
        ("redis://:hunter22@cache:6379", "redis://:<SECRET>@cache:6379"),
        ("amqp://u:${PASSWORD}@host", None),
        ("https://{user}:{password}@host", None),
        ("https://host:8080/@scope/package", None),
        ("ssh://git@host:22/x", None),
        ("see http://a.b: mail me@c.d", None),
    ],
)
def test_passwords_in_urls(text, expected):
    """Red if the host or the user goes too, or a port or a placeholder is taken for a password."""
    assert outcome(RedactSecrets(), text) == (expected or text)


def test_entropy():
    """Red if the logarithm's base is not 2."""
    assert redact.entropy("abcd" * 5) == pytest.approx(2)
    assert redact.entropy("aaaa") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail jane.doe+x@mail.uni-mainz.de.", "mail <EMAIL>."),
        ("Jane <jane@corp.io>", "Jane <<EMAIL>>"),
        ("user@example.com and git@host", "user@example.com and git@host"),
        ("@decorator(x) a@b", "@decorator(x) a@b"),
        ("at 93.184.216.34:80", "at <IP_ADDRESS>:80"),
        ("127.0.0.1 10.1.2.3 192.168.0.1 0.0.0.0", "127.0.0.1 10.1.2.3 192.168.0.1 0.0.0.0"),
        ("version 1.2.3.4 and 300.1.1.1", "version 1.2.3.4 and 300.1.1.1"),
        ("v93.184.216.34 1.93.184.216.34 a.93.1.1.1", "v93.184.216.34 1.93.184.216.34 a.93.1.1.1"),
        ("2001:4860:4860::8888 is public", "<IP_ADDRESS> is public"),
        ("::1, a::b, x[1::2], y[2000::3]", "::1, a::b, x[1::2], y[2000::3]"),
        ("12:30:45:00", "12:30:45:00"),
    ],
)
def test_addresses(text, expected):
    """Red if local addresses, versions, slices or decorators are redacted, or public ones stay."""
    assert outcome(RedactAddresses(), text) == expected


WORDS = [f"w{n}" for n in range(6)]
TEXT = st.lists(st.sampled_from(WORDS), max_size=25)


@settings(max_examples=150, deadline=None)
@given(items=st.lists(TEXT, min_size=1, max_size=4), document=TEXT)
def test_decontamination_is_brute_force(tmp_path_factory, items, document):
    """Red if an n-gram is missed, one is found that is not there, or short items are forgotten."""
    n, least = 4, 2
    file = tmp_path_factory.mktemp("evaluation") / "e.jsonl"
    file.write_text("".join(json.dumps({"q": " ".join(item)}) + "\n" for item in items))
    step = Decontaminate(files=str(file), ngram=n, min_words=least, min_distinct=2)
    grams = {}
    for number, item in enumerate(items, 1):
        size = min(n, len(item))
        if size >= least:
            for place in range(len(item) - size + 1):
                gram = tuple(item[place : place + size])
                if len(set(gram)) >= 2:
                    grams.setdefault(gram, number)
    if not grams:
        with pytest.raises(ConfigError, match="hold no telling text"):
            step.start()
        return
    windows = {tuple(document[a:b]) for b in range(len(document) + 1) for a in range(b)}
    text = ", ".join(document).upper()
    result = step.start()(Document(text, "p"), Counter())
    assert isinstance(result, Removal) == bool(windows & grams.keys())
    if isinstance(result, Removal):
        gram = tuple(result.evidence["ngram"].split())
        assert gram in windows and result.evidence["item"] == f"e.jsonl:{grams[gram]}"
    assert too_short(step) == sum(len(item) < least for item in items)


def test_equal_numbers_are_not_enough(tmp_path, monkeypatch):
    """Red if n-grams of the same number are taken for the same words."""
    numbers = decontaminate.ngram_numbers
    monkeypatch.setattr(decontaminate, "ngram_numbers", lambda w, n: numbers(w, n) * np.uint64(0))
    words = "abcdefghijklmnop"
    (tmp_path / "e.jsonl").write_text(json.dumps({"q": " ".join(words)}))
    step = Decontaminate(files=str(tmp_path / "e.jsonl"))
    other = " ".join(reversed(words))
    assert outcome(step, other) == other
    assert outcome(step, " ".join(words)) == "shares an n-gram"


def test_evaluation_files(tmp_path):
    """Red if a layout of evaluation files is not read, or `keys` is ignored."""
    question = (
        "what is the airspeed velocity of an unladen swallow in metres per second today please"
    )
    other = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    item = {"q": question, "deep": {"choices": [other]}}
    (tmp_path / "list.json").write_text(json.dumps([item]))
    (tmp_path / "splits.json").write_text(json.dumps({"name": "x", "test": [item]}, indent=1))
    (tmp_path / "lines.json").write_text(json.dumps(item) + "\n" + json.dumps(item) + "\n")
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(json.dumps(item).encode()))
    (tmp_path / "one.json").write_text(json.dumps(item))
    (tmp_path / "named.json").write_text(json.dumps({"17": item, "18": {"q": "short"}}))
    every = ("list.json", "splits.json", "lines.json", "z.jsonl.gz", "one.json", "named.json")
    for name in every:
        step = Decontaminate(files=str(tmp_path / name))
        assert outcome(step, f"so: {question.title()}!") == "shares an n-gram"
        assert outcome(step, other) == "shares an n-gram"
        narrow = Decontaminate(files=str(tmp_path / name), keys=("q",))
        assert outcome(narrow, other) == other
    with pytest.raises(ConfigError, match=r"item 1 has no \['w'\]: it has \['deep', 'q'\]"):
        Decontaminate(files=str(tmp_path / "list.json"), keys="w").start()
    with pytest.raises(ConfigError, match="matches no file"):
        Decontaminate(files=str(tmp_path / "no.jsonl")).start()
    (tmp_path / "bad.jsonl").write_text("nonsense\n")
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        Decontaminate(files=str(tmp_path / "bad.jsonl")).start()


@pytest.mark.parametrize(
    ("cls", "fields", "words"),
    [
        (LicenceFilter, {"allow": (), "unknown": "x"}, ["allow=()", "unknown='x'"]),
        (LanguageFilter, {"languages": (), "characters": 0}, ["languages=()", "characters=0"]),
        (LineFilter, {"max_line": 0, "max_mean_line": -1.0}, ["max_line=0", "max_mean_line=-1.0"]),
        (AlphanumericFilter, {"min_fraction": 1.5}, ["min_fraction=1.5", "[0, 1]"]),
        (RedactSecrets, {"min_entropy": 0}, ["min_entropy=0"]),
        (Decontaminate, {"files": (), "min_words": 20}, ["files=()", "min_words=20", "ngram=13"]),
        (Decontaminate, {"files": "x", "min_distinct": 9}, ["min_distinct=9", "min_words=8"]),
    ],
)
def test_bad_settings(cls, fields, words):
    """Red if a check is dropped, or only the first problem is told."""
    with pytest.raises(ConfigError) as error:
        cls(**fields)
    assert all(word in str(error.value) for word in [cls.__name__, *words])


@pytest.mark.parametrize("library", ["langdetect", "datasketch"])
def test_a_library_that_is_not_installed(library, monkeypatch):
    """Red if an ImportError gets through instead of what to install."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=f"pip install {library}"):
        LanguageFilter().start() if library == "langdetect" else NearDuplicates().signer()
