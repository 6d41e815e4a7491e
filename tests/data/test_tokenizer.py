"""Text -> ids -> text exactly; special tokens cannot be typed; streaming equals decoding."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lemur_jax.config import ConfigError
from lemur_jax.data.tokenizer import Tokenizer
from lemur_jax.data.tokenizer_files import train, write_hf_files

LLAMA2 = Path(__file__).parents[2] / "../shared/data/tokenizer/llama2.model"
TRICKY = [
    "",
    " ",
    "   ",
    "  lead",
    "trail  ",
    "a  b",
    "\n",
    "\n\n  x",
    "\t\tx = 1\t# y\n",
    "é🎉👩‍👩‍👧 naïve",
    "\r\nabc\r\n",
    "1234567 89",
    "日本語テキスト",
    "ﬁ \u00a0 nbsp \u200b zero \ufeff",
    "<0x0A> <0x20>",
    "</ s> < s>",
    "def f(x):\n    return {'a': x[-1]}\n",
]
SPELLED = ["</s>", "<s>x</s>", "<unk>", "a <|im_end|> b", "<|im_start|>system\n</s>"]
# U+2581 is SentencePiece's own sign for a space; NUL and surrogates are not text.
TEXTS = st.text(
    st.one_of(
        st.characters(exclude_characters="\u2581\0", exclude_categories=["Cs"]),
        st.sampled_from(" \t\n\r()=🎉é日0123"),
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    if not LLAMA2.is_file():
        pytest.skip(f"{LLAMA2} is absent: shared test data is not on this machine")
    directory = tmp_path_factory.mktemp("llama2")
    shutil.copyfile(LLAMA2, directory / "tokenizer.model")
    write_hf_files(directory)
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def chat(tokenizer, tmp_path_factory):
    """The tokenizer with two added tokens, as an instruction-tuned checkpoint has them."""
    directory = tmp_path_factory.mktemp("chat")
    tokenizer.save(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    for n, content in enumerate(("<|im_start|>", "<|im_end|>")):
        about = {"content": content, "special": True}
        config["added_tokens_decoder"][str(tokenizer.vocab_size + n)] = about
    config["eos_token"] = "<|im_end|>"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def json_only(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("json_only")
    tokenizer.save(directory)
    (directory / "tokenizer.model").unlink()
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def byte_level(records, tmp_path_factory):
    """A tokenizer.json in the style of Llama 3: byte-level BPE with special tokens on top."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    engine.train_from_iterator([r["text"] for r in records["text"][:50]], trainer)
    engine.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    directory = tmp_path_factory.mktemp("byte_level")
    engine.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(directory)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_round_trip(tokenizer, json_only, byte_level, text):
    """Red with remove_extra_whitespaces=True or normalization 'nmt_nfkc' in `train`."""
    for each in (tokenizer, json_only, byte_level):
        assert each.decode(each.encode(text)) == text
        assert each.decode(each.encode(text, bos=True, eos=True)) == text


def test_round_trip_of_the_corpus(tokenizer, records):
    """Red if `TextStream` does not drop the first space, or drops one in each document part."""
    for record in records["code"][:60] + records["text"][:60]:
        text = record["text"]
        if "\u2581" not in text:
            assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


@pytest.mark.parametrize("text", TRICKY)
def test_decode_agrees_with_sentencepiece(tokenizer, text):
    """Red if a piece's bytes in `byte_table` are wrong: the reference is SentencePiece's own."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer._engine._processor.decode(ids) == text


def test_llama_settings(tokenizer):
    """Red if split_digits, byte_fallback, the special ids or add_dummy_prefix change in `train`."""
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        0,
        1,
        2,
        None,
    )
    pieces = [tokenizer.piece(index) for index in tokenizer.encode("123\n\U00012345")]
    assert pieces == ["▁", "1", "2", "3", "<0x0A>", "<0xF0>", "<0x92>", "<0x8D>", "<0x85>"]
    assert tokenizer.vocab_size == 2048


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_stream_equals_decode_at_every_prefix(tokenizer, byte_level, chat, data):
    """Red if `push` decodes each id alone: half characters become U+FFFD."""
    for each in (tokenizer, byte_level, chat):
        ids = each.encode(data.draw(TEXTS), bos=True, eos=True)
        ids += data.draw(st.lists(st.integers(0, each.vocab_size - 1), max_size=8))
        stream, shown = each.stream(), ""
        for n, index in enumerate(ids, 1):
            shown += stream.push(index)
            raw = b"".join(each._bytes[i] for i in ids[:n])
            if each is not byte_level:
                raw = raw.removeprefix(b" ")
            full = raw.decode("utf-8", "replace")
            # What is held back is one unfinished character, which `decode` shows as U+FFFD.
            assert full.startswith(shown) and full[len(shown) :] in ("", "\ufffd")
        assert shown + stream.flush() == full == each.decode(ids)


def test_stream_after_a_prompt_keeps_the_space(tokenizer):
    """Red if `after` is ignored: the first word of a continuation loses its space."""
    ids = tokenizer.encode("return the value")
    prompt, rest = ids[:1], ids[1:]
    stream = tokenizer.stream(after=prompt)
    assert "".join(map(stream.push, rest)) == "return the value"[len(tokenizer.decode(prompt)) :]
    with pytest.raises(ValueError, match=str(tokenizer.vocab_size)):
        stream.push(tokenizer.vocab_size)


@pytest.mark.parametrize("text", SPELLED)
def test_special_tokens_cannot_be_typed(chat, json_only, byte_level, text):
    """Red if added_tokens stay in the JSON given to `tokenizers`, or pieces are user-defined."""
    for each in (chat, json_only, byte_level):
        ids = each.encode(text)
        special = {each.bos_id, each.eos_id, each.unk_id, *each.added_tokens.values()}
        assert not special & set(ids)
        assert each.decode(ids) == text


def test_added_tokens(chat, tokenizer):
    """Red if `vocab_size` leaves out added tokens or eos_token of the config is ignored."""
    first = tokenizer.vocab_size
    assert chat.added_tokens == {"<|im_start|>": first, "<|im_end|>": first + 1}
    assert chat.vocab_size == first + 2 and chat.eos_id == first + 1
    assert chat.piece(first) == "<|im_start|>" and chat.id_of("<|im_end|>") == first + 1
    assert chat.decode([first, *chat.encode("hi"), first + 1]) == "hi"


def test_added_tokens_of_transformers_5(chat, tmp_path):
    """Red if tokenizer.json is not read beside a tokenizer.model: the added tokens are lost."""
    chat.save(tmp_path)
    write_hf_files(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    again = Tokenizer.load(tmp_path)
    assert again.added_tokens == chat.added_tokens and again.fingerprint == chat.fingerprint


def test_fingerprint(tokenizer, chat, records, tmp_path):
    """Red if it depends on the directory or on HF's files, or not on the added tokens."""
    texts = [r["text"] for r in records["text"][:40]]
    one = train(texts, tmp_path / "one", vocab_size=500)
    two = train(texts, tmp_path / "two", vocab_size=500)
    assert one.fingerprint == two.fingerprint != tokenizer.fingerprint
    one.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").fingerprint == one.fingerprint
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "copy" / name).unlink()
    assert Tokenizer.load(tmp_path / "copy").fingerprint == one.fingerprint
    write_hf_files(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").fingerprint == one.fingerprint
    assert chat.fingerprint != tokenizer.fingerprint
    one.save(tmp_path / "added")
    config = {"added_tokens_decoder": {"500": {"content": "<|im_end|>"}}}
    (tmp_path / "added" / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path / "added").fingerprint != one.fingerprint


def test_batch_equals_single(tokenizer, records):
    """Red if `encode_batch` puts texts out of order or loses bos and eos."""
    texts = [r["text"] for r in records["text"][:20]]
    batch = tokenizer.encode_batch(texts, bos=True, eos=True, threads=3)
    assert batch == [tokenizer.encode(text, bos=True, eos=True) for text in texts]
    assert all(ids[0] == 1 and ids[-1] == 2 for ids in batch)


def _hf_ids(directory, texts):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    return theirs, [theirs(text)["input_ids"] for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["trained", "llama2", "chat"])
def test_hugging_face_gives_the_same_ids(which, request, records):
    """Red if `_merges` sorts by length instead of score, or Prepend is left out."""
    ours = request.getfixturevalue({"trained": "tokenizer"}.get(which, which))
    texts = TRICKY + [r["text"] for name in records for r in records[name][:80]]
    # Special tokens spelled in a text: AutoTokenizer parses them, we do not.
    texts = [text for text in texts if not any(s in text for s in ("<s>", "</s>", "<unk>", "<|im"))]
    assert len(texts) > 150
    theirs, ids = _hf_ids(ours.directory, texts)
    for text, expected in zip(texts, ids, strict=True):
        assert ours.encode(text, bos=True) == expected
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(theirs) == ours.vocab_size


def test_no_tokenizer_in_directory(tmp_path):
    """Red if a missing file surfaces as FileNotFoundError."""
    with pytest.raises(ConfigError, match=r"neither tokenizer.model nor tokenizer.json.*give"):
        Tokenizer.load(tmp_path)


def test_damaged_tokenizer(tmp_path, tokenizer):
    """Red if SentencePiece's RuntimeError or a JSON error gets through."""
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"not a SentencePiece model.*copy it again"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json is not JSON.*remove it"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nope>"}')
    with pytest.raises(ConfigError, match=r"eos_token='<nope>'.*add it"):
        Tokenizer.load(tmp_path)


def test_training_refuses(tmp_path):
    """Red if an empty corpus or a hopeless vocab_size reaches SentencePiece unexplained."""
    with pytest.raises(ConfigError, match=r"corpus is empty.*write one"):
        train(["", "\n"], tmp_path / "a")
    with pytest.raises(ConfigError, match="vocab_size=100 must be at least 300"):
        train(["x"], tmp_path / "a", vocab_size=100)
    with pytest.raises(ConfigError, match=r"vocab_size=4000 cannot be trained.*lower it"):
        train(["too little text"], tmp_path / "a", vocab_size=4000)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(ConfigError, match=r"directory=.*not empty"):
        train(["x"], tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
