"""The main job, end to end, each step a `lemur` command: `make demo`.

corpus -> tokenizer -> rows -> train, killed and resumed -> Hugging Face directory -> samples
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

CODE_PROMPT = "def read_lines(path):\n"
TEXT_PROMPT = "The purpose of this module is"
STEPS = 220


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo", help="directory of everything that is written")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    out, console = Path(options.out), Console()
    if out.exists():
        console.print(f"removing the last demo: {out}/")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    table = Table("step", "seconds", "measured", title="make demo: what was measured")
    start = time.perf_counter()

    def lemur(title: str, *arguments: str) -> str:
        """Runs one command, shows its output as it comes, and returns it."""
        console.rule(f"lemur {' '.join(arguments)}", align="left")
        before = time.perf_counter()
        lines = []
        with subprocess.Popen(
            [sys.executable, "-m", "lemur_jax.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        ) as process:
            while chunk := process.stdout.read(1):  # by character: samples stream
                sys.stdout.write(chunk)
                sys.stdout.flush()
                lines.append(chunk)
        if process.returncode:
            raise SystemExit(f"demo: `lemur {title}` failed with status {process.returncode}")
        seconds[title] = time.perf_counter() - before
        return "".join(lines)

    seconds: dict[str, float] = {}
    corpus, tokenizer, data, run, hf = (
        str(out / name) for name in ("corpus", "tokenizer", "data", "run", "hf")
    )
    lemur("data corpus", "data", "corpus", corpus)
    lemur(
        "data tokenizer",
        *("data", "tokenizer", f"{corpus}/code.jsonl", f"{corpus}/text.jsonl"),
        *(f"--out={tokenizer}", "--vocab_size=8192"),
    )
    lemur(
        "data build",
        *("data", "build", "--gin_file=data/demo.gin"),
        *(f"--gin.CODE={quoted(f'{corpus}/code.jsonl')}",),
        *(f"--gin.TEXT={quoted(f'{corpus}/text.jsonl')}",),
        *(f"--gin.TOKENIZER={quoted(tokenizer)}", f"--gin.DATA={quoted(data)}"),
    )
    train = [
        *("train", "--gin_file=runs/demo.gin", f"--gin.DATA={quoted(data)}"),
        *(f"--gin.RUN={quoted(run)}", f"--gin.TrainConfig.steps={options.steps}"),
    ]
    seconds["train, first part"] = train_until(console, train, Path(run), options.steps // 2)
    lemur("train, resumed", *train)
    lemur("convert", "convert", run, hf, "--to=hf")
    sampling = ("--temperature=0.5", "--top_p=0.9", "--repetition_penalty=1.1", "--seed=1")
    code_sample = (f"--prompt={CODE_PROMPT}", "--max_new_tokens=96", *sampling)
    code = lemur("sample", "sample", run, *code_sample)
    lemur(
        "sample text",
        *("sample", run, f"--prompt={TEXT_PROMPT}", "--max_new_tokens=64", *sampling),
    )
    again = lemur("sample hf", "sample", hf, *code_sample)

    for title, measured in summary(out, without_notes(code) == without_notes(again)).items():
        table.add_row(title, f"{seconds[title]:.0f}" if title in seconds else "", measured)
    console.print(table)
    console.print(f"all of it: {time.perf_counter() - start:.0f} s; loss curve: {run}/loss.png")
    return 0


def without_notes(output: str) -> str:
    """What was sampled, without the timing line and what libtpu, if installed, says first."""
    return output[output.find(CODE_PROMPT) :].split("\nlemur: ")[0]


def quoted(text: str) -> str:
    """A gin string."""
    return json.dumps(text)


def train_until(console: Console, arguments: list[str], run: Path, step: int) -> float:
    """Trains until the run's metrics pass `step`, then sends SIGTERM, as a preemption would."""
    console.rule(f"lemur {' '.join(arguments)}", align="left")
    before = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "lemur_jax.cli", *arguments])
    while process.poll() is None and last_step(run) < step:
        time.sleep(0.2)
    console.print(f"demo: sending SIGTERM after step {last_step(run)}")
    process.send_signal(signal.SIGTERM)
    status = process.wait()
    if status != 143:
        raise SystemExit(f"demo: `lemur train` ended with {status}, not 143 (saved and stopped)")
    return time.perf_counter() - before


def last_step(run: Path) -> int:
    """Of metrics.jsonl; 0 before there is any."""
    return max((line["step"] for line in metrics(run)), default=0)


def metrics(run: Path) -> list[dict[str, float]]:
    """Whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def summary(out: Path, same: bool) -> dict[str, str]:
    """What each step measured, from the files that it wrote."""
    corpus = json.loads((out / "corpus/manifest.json").read_text())
    data = json.loads((out / "data/manifest.json").read_text())
    lines = metrics(out / "run")
    steps = [line for line in lines if "train/tokens_per_second" in line]
    speed = sorted(line["train/tokens_per_second"] for line in steps)[len(steps) // 2]
    mfu = sorted(line.get("train/mfu", 0.0) for line in steps)[len(steps) // 2]
    rows = {"data corpus": describe_corpus(corpus), "data tokenizer": "8192 pieces, byte fallback"}
    tokens = {name: source["splits"]["train"]["tokens"] for name, source in data["sources"].items()}
    rows["data build"] = ", ".join(f"{name} {count:,} tokens" for name, count in tokens.items())
    resumed = [line["step"] for line in lines if "resumed" in line]
    rows["train, first part"] = f"SIGTERM, saved at step {resumed[0]}"
    rows["train, resumed"] = (
        f"from step {resumed[0]} to {lines[-1]['step']}; "
        f"median {speed:,.0f} tokens/s, MFU {mfu:.1%}"
    )
    for name, source in data["sources"].items():
        tag = f"evaluation/{name}/loss"
        losses = [line[tag] for line in lines if tag in line]
        entropy = source["splits"]["validation"]["unigram_entropy"]
        rows[f"held-out {name}"] = f"{losses[-1]:.3f} nats/token; unigram entropy {entropy:.3f}"
    size = sum(path.stat().st_size for path in (out / "hf").iterdir())
    rows["convert"] = f"{size / 1e6:.0f} MB in {out}/hf"
    rows["sample hf"] = "same text as the run, seed for seed" if same else "DIFFERENT from the run"
    return rows


def describe_corpus(manifest: dict) -> str:
    """Files and bytes of each source."""
    return ", ".join(
        f"{name} {value['documents']:,} documents, {value['bytes'] / 1e6:.0f} MB"
        for name, value in manifest["sources"].items()
    )


if __name__ == "__main__":
    sys.exit(main())
