"""The parts of tools/sft_demo.py that judge a run; the run itself is a command."""

import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "sft_demo.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("sft_demo", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_questions_are_held_out_ones(tool, tmp_path):
    """Red if training questions are asked, or only the first kind of them."""
    talks = [
        {"messages": [{"role": "user", "content": f"{kind} {n}"}], "split": split}
        for kind in ("what", "write")
        for n in range(10)
        for split in ("train", "validation")
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    tool.write_questions(tmp_path / "talks.jsonl", tmp_path / "asked.jsonl", 4)
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert [one["prompt"] for one in asked] == ["what 0", "what 5", "write 0", "write 5"]


def test_only_answers_that_the_turn_ended_count(tool, tmp_path, monkeypatch):
    """Red if any stop counts: EOS is not the end of a turn."""
    from lemur_jax.data.tokenizer import Tokenizer

    monkeypatch.setattr(
        Tokenizer, "load", classmethod(lambda cls, path: type("T", (), {"id_of": lambda s, t: 9})())
    )
    answers = [{"completions": [{"stopped_by": 9}, {"stopped_by": 2}]}, {"completions": [{}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    assert tool.stopped(tmp_path / "a.jsonl", "x") == (1, 3)


def test_the_last_held_out_loss(tool, tmp_path):
    """Red if the first evaluation is taken."""
    lines = [{"step": 1, "evaluation/chat/loss": 5.0}, {"step": 2},
             {"step": 3, "evaluation/chat/loss": 4.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tool.held_out_loss(tmp_path) == 4.0
