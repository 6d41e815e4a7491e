"""A file of requests: order, bad lines, resuming."""

import dataclasses
import json

import pytest

from lemur_jax.config import ConfigError
from lemur_jax.sample import batch
from lemur_jax.sample.request import Request


def _write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path):
    return _write(
        tmp_path / "in.jsonl",
        [
            json.dumps({"prompt": "a much longer prompt", "max_new_tokens": 21}),
            json.dumps({"prompt": "b", "temperature": 1.0, "n": 2, "seed": 3}),
            "",
            json.dumps({"prompt": [1, 5, 6], "max_new_tokens": 18}),
            json.dumps({"prompt": "\u2028é", "stop": ["k"]}),
        ],
    )


def test_same_order_and_same_answers(sampler, source, tmp_path):
    """Red if rows are written in the order of their buckets, or defaults override a line."""
    out = tmp_path / "out.jsonl"
    done = batch.sample_file(sampler, source, out, {"max_new_tokens": 20})
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [answer["line"] for answer in answers] == [1, 2, 4, 5]
    assert [len(answer["completions"]) for answer in answers] == [1, 2, 1, 1]
    assert (done.kept, done.sampled) == (0, 4)
    assert done.new_tokens == sum(len(c["ids"]) for a in answers for c in a["completions"])
    request = Request(prompt="b", temperature=1.0, n=2, seed=3, max_new_tokens=20)
    want = [list(completion.ids) for completion in sampler.generate([request])]
    assert [completion["ids"] for completion in answers[1]["completions"]] == want
    assert len(answers[0]["completions"][0]["ids"]) == 21


@pytest.mark.parametrize("cut", [1, 60, None])
def test_resume_gives_the_same_file(sampler, source, tmp_path, monkeypatch, cut):
    """Red if a half-written line is kept, or lines that are there are sampled again."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    batch.sample_file(sampler, source, whole, {"max_new_tokens": 20})
    lines = whole.read_bytes().splitlines(keepends=True)
    # Two whole lines, and none, some or all but the line end of the third.
    out.write_bytes(b"".join(lines[:2]) + (lines[2][:cut] if cut else lines[2][:-1]))
    asked = []
    generate = type(sampler).generate
    monkeypatch.setattr(
        type(sampler), "generate", lambda self, rs: asked.extend(rs) or generate(self, rs)
    )
    done = batch.sample_file(sampler, source, out, {"max_new_tokens": 20})
    assert out.read_bytes() == whole.read_bytes()
    assert (done.kept, done.sampled, len(asked)) == (2, 2, 2)


def test_resume_refuses_other_requests(sampler, source, tmp_path):
    """Red if the digest leaves out the settings."""
    out = tmp_path / "out.jsonl"
    batch.sample_file(sampler, source, out, {"max_new_tokens": 20})
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="line 2 was not made from this input"):
        batch.sample_file(sampler, source, out, {"max_new_tokens": 8})
    assert out.read_bytes() == before


def test_all_bad_lines_are_named(sampler, tmp_path):
    """Red if the first bad line ends the reading, or something is sampled before."""
    lines = [
        '{"prompt": "fine"}',
        '{"prompt": "x", "tempreture": 1}',
        "{not json",
        '["x"]',
        '{"max_new_tokens": 3}',
        '{"prompt": "x", "top_p": 2}',
    ]
    source, out = _write(tmp_path / "bad.jsonl", lines), tmp_path / "out.jsonl"
    with pytest.raises(ConfigError) as error:
        batch.sample_file(sampler, source, out)
    text = str(error.value)
    for number, words in (
        (2, "unknown key 'tempreture'; did you mean 'temperature'?"),
        (3, "not JSON"),
        (4, "holds a list"),
        (5, 'has no "prompt"'),
        (6, "top_p=2"),
    ):
        assert any(f":{number}: " in line and words in line for line in text.splitlines()), text
    assert not out.exists()


def test_long_prompts_are_named_by_line(sampler, tmp_path):
    """Red if prompts are only checked when their batch is sampled."""
    lines = [json.dumps({"prompt": "x" * n}) for n in (3, 500, 4)]
    with pytest.raises(ConfigError, match="line 2: prompt has 501 tokens"):
        batch.sample_file(sampler, _write(tmp_path / "in", lines), tmp_path / "out")


def test_windows_keep_the_order(sampler, tmp_path, monkeypatch):
    """Red if a window's answers are written before an earlier window's."""
    monkeypatch.setattr(batch, "BATCHES_PER_WRITE", 1)
    lines = [json.dumps({"prompt": "y" * n, "max_new_tokens": 1}) for n in (9, 20, 3, 21, 5) * 2]
    seen = []
    out = tmp_path / "out"
    batch.sample_file(
        sampler, _write(tmp_path / "in", lines), out, report=lambda *counts: seen.append(counts)
    )
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [*range(1, 11)]
    assert seen == [(8, 10), (10, 10)]


def test_requests_can_be_prepared(sampler, tmp_path):
    """Red if `prepare` is not called, its result is dropped, or its problems lose their lines."""

    def prepare(request):
        if request.prompt == "bad":
            raise ConfigError(["no message"])
        return dataclasses.replace(request, prompt=(1, 5, 6))

    lines = [json.dumps({"prompt": prompt}) for prompt in ("x", "y y y")]
    source, out = _write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    batch.sample_file(sampler, source, out, {"max_new_tokens": 18}, prepare=prepare)
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [a["completions"][0]["prompt_tokens"] for a in answers] == [3, 3]
    source = _write(tmp_path / "bad.jsonl", [*lines, "", '{"prompt": "bad"}'])
    with pytest.raises(ConfigError, match="line 4: no message"):
        batch.sample_file(sampler, source, tmp_path / "o.jsonl", prepare=prepare)
