"""Chat data: the mask is derived again from the ids, and what it says wrongly is caught."""

import dataclasses
import json

import numpy as np
import pytest

from lemur_jax.check import ids, masks, stop
from lemur_jax.check.evidence import collect
from lemur_jax.data.pipeline import make_batch
from lemur_jax.data.tokenizer import Tokenizer

START, END = "<|im_start|>", "<|im_end|>"
TALK = [
    ("system", "Return a value, do not print it."),
    ("user", "How does import os work?\nAnd sys?"),
    ("assistant", "\n  import os\nreturns the module.\n\n"),
    ("user", "Thanks"),
    ("assistant", "def f(x):\n    return x"),
]
LENGTH = 256


@pytest.fixture(scope="module")
def tokenizer(tiny_data, tmp_path_factory):
    """The tiny data set's tokenizer with two added tokens."""
    directory = tmp_path_factory.mktemp("chat") / "tokenizer"
    Tokenizer.load(tiny_data / "tokenizer").save(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    added = config.setdefault("added_tokens_decoder", {})
    added |= {
        str(i): {"content": token, "special": True} for i, token in ((512, START), (513, END))
    }
    path.write_text(json.dumps(config))
    return Tokenizer.load(directory)


def render(tokenizer, talk):
    """(ids, learnt) of a conversation, as train.py has them: written out, not by our renderer."""
    tokens, learnt = [tokenizer.bos_id], [0]
    for role, content in talk:
        header = tokenizer.encode(f"{role}\n")
        both = tokenizer.encode(f"{role}\n{content}")
        assert both[: len(header)] == header
        answer = int(role == "assistant")
        tail = tokenizer.encode("\n")
        tokens += [512, *both, 513, *tail]
        learnt += [0, *[0] * len(header), *[answer] * (len(both) - len(header)), answer]
        learnt += [answer] * len(tail)
    return tokens, learnt


class Chat:
    """A pipeline of two conversations a row; `change` edits the learnt flags of the rows."""

    def __init__(self, tokenizer, change=lambda tokens, learnt: learnt, **about):
        self.tokenizer_dir = tokenizer.directory
        self.manifest = {"chat": {"format": "chatml", "packing": "segmented"} | about}
        rows = []
        for talks in ((TALK[:3], TALK[1:3]), (TALK[:3], TALK[3:])):
            row = np.zeros((3, LENGTH + 1), np.int64)
            at = 0
            for number, talk in enumerate(talks, 1):
                tokens, learnt = render(tokenizer, talk)
                where = slice(at, at + len(tokens))
                row[:, where] = tokens, [number] * len(tokens), learnt
                at += len(tokens)
            rows.append(row)
        tokens, segments, learnt = (np.stack(x) for x in zip(*rows))
        batch = make_batch(tokens.astype(np.int32), segments.astype(np.int32))
        flags = change(tokens, learnt)[:, 1:]
        self._batch = batch._replace(weights=(batch.weights * flags).astype(np.float32))

    def rows(self, step, start, stop):
        del step, start, stop
        return self._batch

    def provenance(self, step):
        del step
        return [("chat", 0, ["a", "b"]), ("chat", 1, ["a", "c"])]


def evidence(tokenizer, *args, **about):
    return collect(Chat(tokenizer, *args, **about), tokenizer, 2, 2)


def test_an_empty_row_has_no_texts(tokenizer):
    """Red if a row of padding alone, which rows_multiple adds, is compared with itself."""
    sound = evidence(tokenizer)
    segments = sound.batch.segment_ids.copy()
    segments[0] = 0
    batch = sound.batch._replace(segment_ids=segments)
    assert ids.check_ids(dataclasses.replace(sound, batch=batch), 514).status == "passed"


def test_a_sound_chat_passes(tokenizer, run_config):
    """Red if the newline behind <|im_end|>, or an answer that begins with one, were misread."""
    sound = evidence(tokenizer)
    found = masks.check_masks(sound)
    assert found.status == "passed", found
    wanted = masks.expected_learnt(sound)
    assert (wanted == sound.batch.weights)[sound.batch.segment_ids > 0].mean() > 0.98
    assert 0.1 < found.figures["learnt share by source"]["chat"] < 0.8
    assert ids.check_ids(sound, 514).status == "passed"
    ends = stop.check_stop(sound, run_config)
    assert ends.figures["token"] == END and ends.figures["learnt"] == 4


def headers_too(tokens, learnt):
    """The fault: <|im_start|>assistant of answers is learnt as well."""
    learnt = learnt.copy()
    for row, flags in zip(tokens, learnt):
        for at in np.flatnonzero(np.diff(flags) == 1):  # the last token before an answer
            begin = np.flatnonzero(row[: at + 1] == 512)[-1]
            flags[begin : at + 1] = 1
    return learnt


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (headers_too, "no part of an answer"),
        (lambda tokens, learnt: np.ones_like(learnt), "100 % of rows 0, 1"),
        (lambda tokens, learnt: learnt * 0, "0 % of rows 0, 1"),
        (lambda tokens, learnt: learnt * (tokens != 513), "of answers are not"),
        (lambda tokens, learnt: 1 - learnt, "no part of an answer"),
    ],
)
def test_faults_of_a_chat_mask(tokenizer, change, said):
    """Red if the fault's rule were left out of masks._chat, or the reader of turns agreed."""
    found = masks.check_masks(evidence(tokenizer, change))
    assert found.status == "failed" and said in " ".join(found.fixes)


def test_a_masked_end_of_turn_is_caught(tokenizer, run_config):
    """Red if EOS were taken for the stop token of ChatML."""
    masked = evidence(tokenizer, lambda tokens, learnt: learnt * (tokens != 513))
    assert "never has a weight" in stop.check_stop(masked, run_config).fixes[0]


def test_a_tokenizer_without_the_specials(tiny_data, run_config, tokenizer):
    """Red if a missing <|im_end|> were no problem of ids and stop."""
    from dataclasses import replace

    without = replace(evidence(tokenizer), tokenizer=Tokenizer.load(tiny_data / "tokenizer"))
    assert any("is not one id" in fix for fix in ids.check_ids(without, 514).fixes)
    assert stop.check_stop(without, run_config).status == "failed"
