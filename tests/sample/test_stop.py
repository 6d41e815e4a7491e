"""Stop strings in any cutting of the text, and whole characters from the real tokenizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_jax.data import tokenizer_files
from lemur_jax.sample.request import Request
from lemur_jax.sample.rows import Progress, Row
from lemur_jax.sample.stop import RowText, StopStrings

ALPHABET = "ab\n"


def _reference(text, stops):
    """Character by character: ends at the first that completes a stop string, longest first."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(st.text(ALPHABET, max_size=4), max_size=12),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=12),
)
@settings(max_examples=400, deadline=None)
def test_any_cutting_gives_the_reference(pieces, stops):
    """Red if `_open_end` holds nothing back, or `min(hits)` becomes `max(hits)`."""
    matcher = StopStrings(stops)
    shown = "".join([matcher.push(piece) for piece in pieces]) + matcher.flush()
    assert (shown, matcher.found) == _reference("".join(pieces), stops)


@given(
    text=st.text(ALPHABET, max_size=12),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=10),
)
@settings(max_examples=200, deadline=None)
def test_nothing_is_held_without_need(text, stops):
    """Red if all of the text is held until the end: what cannot become a stop string is shown."""
    matcher = StopStrings(stops)
    shown = "".join(matcher.push(character) for character in text)
    if matcher.found is None:
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_twelve_stop_strings():
    """Red if only the first few stop strings are looked for."""
    stops = [f"<{n}>" for n in range(12)]
    matcher = StopStrings(stops)
    assert [matcher.push(p) for p in ("x<1", "1", "2<", "11", ">y")] == ["x", "", "<112", "", ""]
    assert matcher.found == "<11>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A trained SentencePiece model; what it has not seen becomes bytes."""
    texts = [f"the cat {n} sat on the mat, naïve and long\n" * 3 for n in range(200)]
    return tokenizer_files.train(texts, tmp_path_factory.mktemp("tok") / "t", vocab_size=320)


TEXTS = st.text(st.sampled_from("the cat naïvé🎉日本👩\n "), max_size=30)


@given(text=TEXTS, stops=st.lists(st.text("te 🎉日\n", min_size=1, max_size=3), max_size=10))
@settings(max_examples=150, deadline=None)
def test_streamed_characters_are_whole(tokenizer, text, stops):
    """Red if RowText decodes each id alone (`bytes.decode("utf-8", "replace")` of every piece)."""
    row = RowText(tokenizer.stream(after=[tokenizer.bos_id]), stops, tokenizer.vocab_size)
    shown = []
    for index in tokenizer.encode(text):
        shown.append(row.push(index))
        if row.stopped_by is not None:
            break
    shown.append(row.finish())
    assert "".join(shown) == row.text == _reference(text, stops)[0]
    assert "\ufffd" not in row.text


def test_unfinished_character_ends_as_replacement(tokenizer):
    """Red if `finish` does not flush the tokenizer's stream."""
    ids = tokenizer.encode("🎉")[:-1]
    row = RowText(tokenizer.stream(), [], tokenizer.vocab_size)
    assert [row.push(index) for index in ids] == [""] * len(ids)
    assert row.finish() == "\ufffd" == row.text


def test_ids_without_a_token_make_no_text(tokenizer):
    """Red if RowText passes ids beyond the tokenizer's vocabulary on (padded vocabularies)."""
    row = RowText(tokenizer.stream(), [], tokenizer.vocab_size)
    assert row.push(tokenizer.vocab_size) == "" and row.ids == [tokenizer.vocab_size]


def test_a_continuation_keeps_its_space(tokenizer):
    """Red if Progress does not tell the tokenizer's stream what came before."""
    prompt = tokenizer.encode("the cat", bos=True)
    ids = tokenizer.encode("the cat sat", bos=True)[len(prompt) :]
    row = Row(
        request=Request(prompt="the cat"), index=0, sample=0, prompt=tuple(prompt), limit=9,
        stop_ids=(2,), note=None,
    )  # fmt: skip
    (last,) = Progress(row, tokenizer).take(np.array(ids), np.zeros(len(ids)), done=True)
    assert last.completion.text == " sat"
