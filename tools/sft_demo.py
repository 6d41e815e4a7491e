"""Instruction tuning end to end, each step a `lemur` command, after `make demo`.

demo/run -> ChatML's tokens added -> conversations of docstrings -> rows with a loss mask -> tuned
model -> held-out loss and answers that end at <|im_end|>, before and after
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lemur_jax.data.chat import docstrings

QUESTION = "What does this function do?\n\ndef read_lines(path):"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", default="demo", help="directory of tools/demo.py")
    parser.add_argument("--out", help="default: DEMO/sft")
    parser.add_argument("--conversations", type=int, default=4000)
    parser.add_argument("--questions", type=int, default=64, help="held-out ones to be answered")
    options = parser.parse_args()
    demo, console = Path(options.demo), Console()
    out = Path(options.out or demo / "sft")
    if not (demo / "run" / "checkpoints").is_dir():
        raise SystemExit(f"sft_demo: {demo}/run has no checkpoints: run `make demo` first")
    if out.exists():
        console.print(f"removing the last one: {out}/")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    seconds: dict[str, float] = {}

    def lemur(title: str, *arguments: str) -> None:
        """Runs one command; its output is shown as it comes."""
        console.rule(f"lemur {' '.join(arguments)}", align="left")
        before = time.perf_counter()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "lemur_jax.cli", *arguments]
        status = subprocess.run(command, env=environment).returncode
        if status:
            raise SystemExit(f"sft_demo: `lemur {title}` failed with status {status}")
        seconds[title] = time.perf_counter() - before

    init, data, run = (str(out / name) for name in ("init", "data", "run"))
    talk, asked = out / "conversations.jsonl", out / "questions.jsonl"
    counts = docstrings.write(demo / "corpus" / "code.jsonl", talk, options.conversations)
    console.print(f"conversations: {counts}")
    write_questions(talk, asked, options.questions)

    lemur("convert", "convert", str(demo / "run"), init, "--add_tokens=chatml")
    lemur(
        "data chat",
        *("data", "chat", "--gin_file=data/sft_demo.gin", f"--gin.DATA={json.dumps(data)}"),
        *(f"--gin.CONVERSATIONS={json.dumps(str(talk))}", f"--gin.TOKENIZER={json.dumps(init)}"),
    )
    train = ("train", "--gin_file=runs/sft_demo.gin", f"--gin.DATA={json.dumps(data)}")
    train += (f"--gin.INIT={json.dumps(init)}",)
    # The loss before: a run of one step that moves nothing.
    lemur(
        "loss before",
        *(*train, f"--gin.RUN={json.dumps(str(out / 'before'))}", "--gin.TrainConfig.steps=1"),
        *("--gin.TrainConfig.epochs=None", "--gin.OptimizerConfig.peak_learning_rate=0.0"),
        "--gin.OptimizerConfig.warmup_steps=0",
    )
    lemur("train", *train, f"--gin.RUN={json.dumps(run)}")
    sampling = ("--chat", f"--input={asked}", "--max_new_tokens=120", "--temperature=0.7")
    for name, model in (("before", init), ("after", run)):
        lemur(f"answers {name}", "sample", model, *sampling, f"--output={out / name}.jsonl")
    lemur("one answer", "sample", run, "--chat", f"--prompt={QUESTION}", "--max_new_tokens=80")

    table = Table("what", "before", "after", title="instruction tuning (measured on CPU)")
    losses = [held_out_loss(Path(path)) for path in (out / "before", run)]
    table.add_row("held-out loss, nats/learnt token", *(f"{loss:.3f}" for loss in losses))
    ended = [stopped(out / f"{name}.jsonl", init) for name in ("before", "after")]
    table.add_row("answers that end at <|im_end|>", *(f"{n} of {of}" for n, of in ended))
    console.print(table)
    console.print(", ".join(f"{title} {took:.0f} s" for title, took in seconds.items()))
    return 0


def write_questions(conversations: Path, questions: Path, most: int) -> None:
    """The held-out questions, as prompts of `lemur sample --chat`."""
    records = [json.loads(line) for line in conversations.read_text().splitlines()]
    held_out = [record for record in records if record["split"] == "validation"]
    step = max(1, len(held_out) // most)  # from all over the file: it has two kinds in it
    with open(questions, "w") as file:
        for record in held_out[::step][:most]:
            file.write(json.dumps({"prompt": record["messages"][0]["content"]}) + "\n")


def held_out_loss(run: Path) -> float:
    """Of the run's last evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["evaluation/chat/loss"] for line in lines if "evaluation/chat/loss" in line][-1]


def stopped(answers: Path, tokenizer: str) -> tuple[int, int]:
    """(answers that <|im_end|> ended, all answers)."""
    from lemur_jax.data.tokenizer import Tokenizer

    end = Tokenizer.load(tokenizer).id_of("<|im_end|>")
    made = [json.loads(line) for line in answers.read_text().splitlines()]
    finished = [one for line in made for one in line["completions"]]
    return sum(one.get("stopped_by") == end for one in finished), len(finished)


if __name__ == "__main__":
    sys.exit(main())
