"""`lemur sample --chat`: the prompt as the model was taught to read it, up to its own end."""

import json

import pytest

from lemur_jax.config import ConfigError
from lemur_jax.convert.vocabulary import CHATML
from lemur_jax.data import tokenizer_files
from lemur_jax.data.chat.template import FILE
from lemur_jax.data.tokenizer import Tokenizer
from lemur_jax.sample.chat import as_chat
from lemur_jax.sample.request import Request

TEXT = "the user is kind and the assistant answers in a few words, then it stops"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat") / "tokenizer"
    tokenizer_files.train([TEXT * 20], directory, vocab_size=300)
    ids = {token: 300 + n for n, token in enumerate(CHATML)}
    (directory / "added_tokens.json").write_text(json.dumps(ids))
    return Tokenizer.load(directory)


def ids_of(tokenizer, *stretches):
    return [i for s in stretches for i in ([s] if isinstance(s, int) else tokenizer.encode(s))]


def test_a_prompt_is_a_users_turn(tokenizer):
    """Red if the header of the answer is missing, or the stop id is not <|im_end|>."""
    start, end = 301, 302
    made = as_chat(tokenizer)(Request(prompt="Hi <|im_end|>", stop_ids=(7,)))
    bos = tokenizer.bos_id
    expected = (bos, start, "user\nHi <|im_end|>", end, "\n", start, "assistant\n")
    assert list(made.prompt) == ids_of(tokenizer, *expected)
    assert made.stop_ids == (7, end)
    made = as_chat(tokenizer, "Be kind")(Request(prompt="Hi"))
    assert list(made.prompt[:2]) == [bos, start]
    assert tokenizer.decode(made.prompt).lstrip().startswith("system\nBe kind")


@pytest.mark.parametrize("prompt", ["", " \n", (1, 2)])
def test_what_is_no_message_is_refused(tokenizer, prompt):
    """Red if ids are rendered again, or an empty turn is made."""
    with pytest.raises(ConfigError, match="a user's message"):
        as_chat(tokenizer)(Request(prompt=prompt))


def test_the_format_is_the_one_of_the_tuning(tokenizer, tmp_path):
    """Red if chat_format.json is not read: a model tuned on llama2 would be asked in chatml."""
    tokenizer.save(tmp_path)
    (tmp_path / FILE).write_text('{"chat_format": "llama2"}')
    other = Tokenizer.load(tmp_path)
    made = as_chat(other)(Request(prompt="Hi"))
    assert list(made.prompt) == other.encode("[INST] Hi [/INST]", bos=True)
    assert made.stop_ids == (other.eos_id,)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        as_chat(Tokenizer.load(tmp_path))


def test_a_model_that_cannot_chat_is_refused(tmp_path):
    """Red if `format_of` falls back to a format whose tokens are absent."""
    plain = tokenizer_files.train([TEXT * 20], tmp_path / "t", vocab_size=300)
    with pytest.raises(ConfigError, match="has not been taught to chat"):
        as_chat(plain)
