"""Words encoded one by one have SentencePiece's own ids, or are not encoded so."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

from lemur_jax.data import words
from lemur_jax.data.tokenizer import Tokenizer
from lemur_jax.data.words import WordEncoder, is_separable

LLAMA2 = Path(__file__).parents[2] / "../shared/data/tokenizer/llama2.model"
# What borders are made of: spaces, newlines, digits, letters, signs, and what glues them.
ALPHABET = st.sampled_from(list(" \n\t▁aZé_.,;()[]{}«»“”0129\r\0\u2009中文😀ß̈"))
TEXTS = st.one_of(st.text(ALPHABET, max_size=60), st.text(max_size=40))


def parsed(tokenizer):
    return proto.ModelProto.FromString((tokenizer.directory / "tokenizer.model").read_bytes())


@pytest.fixture(scope="module", params=["trained", "llama2"])
def pair(request, tokenizer):
    """(ours, SentencePiece's) of one model."""
    model = parsed(tokenizer).SerializeToString()
    if request.param == "llama2":
        if not LLAMA2.is_file():
            pytest.skip(f"{LLAMA2} is absent: shared test data is not on this machine")
        model = LLAMA2.read_bytes()
        assert is_separable(model)
    return WordEncoder(model), sentencepiece.SentencePieceProcessor(model_proto=model)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_same_ids_as_sentencepiece(pair, text):
    """Red if `_OTHER` is dropped from the last alternative of _WORDS ("»." is a piece of Llama's),
    or the space before the first word is."""
    ours, theirs = pair
    assert ours.encode(text).tolist() == theirs.encode(text)


def test_same_ids_on_every_piece(pair):
    """Red if `(?![{_OTHER}])` is dropped after the letters ("né" is a piece) or the signs."""
    ours, theirs = pair
    for index in range(theirs.vocab_size()):
        text = theirs.id_to_piece(index)
        assert ours.encode(text).tolist() == theirs.encode(text), text


def test_same_ids_on_the_corpus(pair, records):
    """Red if a word's ids are kept under another word: `start = end` in `_learn`."""
    ours, theirs = pair
    for record in records["code"][:80] + records["text"][:80]:
        assert ours.encode(record["text"]).tolist() == theirs.encode(record["text"])


def test_memory_is_bounded(pair, records, monkeypatch):
    """Red if `_forget` is not called, or forgets the newline, or long words are kept."""
    monkeypatch.setattr(words, "WORDS", 50)
    ours, theirs = pair
    for record in records["code"][:10]:
        assert ours.encode(record["text"]).tolist() == theirs.encode(record["text"])
        longest = max(len(set(words._WORDS.findall(r["text"]))) for r in records["code"][:10])
        assert len(ours._memory) <= 50 + longest + 2
    ours.encode("x" * 1000)
    assert max(map(len, ours._memory)) <= words.CHARACTERS_PER_WORD


@pytest.mark.parametrize("piece", ["a▁b", "a(", "(a", "12", "a1", "1a", "\na", "1▁"])
def test_pieces_across_borders(tokenizer, piece):
    """Red if one of the alternatives of _BORDER is dropped."""
    spec = parsed(tokenizer)
    assert is_separable(spec.SerializeToString())
    spec.pieces[1000].piece = piece
    assert not is_separable(spec.SerializeToString())


def test_other_models(tokenizer):
    """Red if a check of `is_separable` is dropped."""
    for change in ("unigram", "no fallback", "squeezes spaces", "suffix"):
        spec = parsed(tokenizer)
        if change == "unigram":
            spec.trainer_spec.model_type = proto.TrainerSpec.UNIGRAM
        elif change == "no fallback":
            spec.trainer_spec.byte_fallback = False
        elif change == "squeezes spaces":
            spec.normalizer_spec.remove_extra_whitespaces = True
        else:
            spec.trainer_spec.treat_whitespace_as_suffix = True
        assert not is_separable(spec.SerializeToString()), change


def test_arrays_equal_lists(tokenizer, records):
    """Red if `encode_arrays` swaps BOS and EOS or loses one."""
    texts = [record["text"] for record in records["text"][:20]] + [""]
    for bos, eos in ((True, True), (True, False), (False, True), (False, False)):
        arrays = tokenizer.encode_arrays(texts, bos, eos)
        assert [ids.tolist() for ids in arrays] == tokenizer.encode_batch(texts, bos, eos)
    assert isinstance(tokenizer, Tokenizer)
