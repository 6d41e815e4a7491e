"""The `lemur` command: usage mistakes, bad input, and the way from a run to text and back."""

import json
from pathlib import Path

import pytest

from lemur_jax import cli

TINY = [
    "--gin_file=models/tiny.gin",
    "--gin.DataConfig.batch_size=8",
    "--gin.DataConfig.sequence_length=64",
    "--gin.OptimizerConfig.peak_learning_rate=1e-3",
    "--gin.TrainConfig.steps=2",
    '--gin.ModelConfig.dtype="float32"',
    "--gin.EvaluationConfig.batches=1",
]


def fails(capsys, *argv: str) -> str:
    """Runs a command that must fail with exit status 2; returns what it says."""
    assert cli.main(argv) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err.lstrip()
    assert error.startswith("lemur: error: ") and "Traceback" not in error
    return error


def train(data: Path, run: Path, *more: str) -> list[str]:
    paths = (("DataConfig.path", data), ("TrainConfig.run_dir", run))
    settings = [f"--gin.{name}={json.dumps(str(path))}" for name, path in paths]
    return ["train", *TINY, *settings, *more]


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(train(tiny_data, run)) == 0
    return run


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--gin_fil=x"], "unknown argument --gin_fil=x; did you mean --gin_file?"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--gin.TrainConfig.steps"], "--gin.TrainConfig.steps has no value"),
        (["convert", "a", "b", "--gin.X=1"], "this command takes no gin settings"),
        (["sample", "x"], "give --prompt=TEXT or --input=F.jsonl"),
        (["sample", "x", "--input=a"], "--input and --output go together"),
        (["sample", "x", "--prompt=a", "--top_p=0"], "top_p=0"),
        (["train", "--processes=2"], "--processes and --process need --coordinator"),
        (["convert", "nowhere", "b"], "nowhere"),
        (["sample", "nowhere", "--prompt=a"], "nowhere"),
        (["data", "inspect", "nowhere"], "nowhere"),
        (["data", "tokenizer", "nowhere.jsonl", "--out=x"], "nowhere.jsonl"),
    ],
    ids=str,
)
def test_mistakes(capsys, argv, message):
    """Red if main() lets LemurError through, or a flag's unknown value passes."""
    assert message in fails(capsys, *argv)


def test_dry_run_prints_sizes_and_writes_nothing(capsys, tiny_data, tmp_path):
    """Red if the dry run allocated the model, or counted the moments once."""
    run = tmp_path / "run"
    assert cli.main([*train(tiny_data, run), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert not run.exists()
    assert "164,160" in out  # parameters
    assert "ModelConfig.kv_heads = 2" in out
    assert "sum, GiB a device" in out


def test_dry_run_of_a_pod_needs_no_pod(capsys, tiny_data, tmp_path):
    """Red if the dry run asked for the devices of the mesh."""
    mesh = ["--gin.MeshConfig.fsdp=64", "--gin.MeshConfig.tensor=4"]
    run = [*train(tiny_data, tmp_path / "run"), *mesh, "--gin.DataConfig.batch_size=64"]
    assert cli.main([*run, "--dry_run"]) == cli.EXIT_BAD_INPUT  # embed 64 over 256
    assert "ModelConfig.embed=64 must divide by MeshConfig.fsdp_outer*fsdp*tensor=256" in (
        capsys.readouterr().err
    )
    bigger = [*run, "--gin.ModelConfig.embed=256", "--dry_run"]
    assert cli.main(bigger) == 0
    assert "256 / 8 (cpu)" in capsys.readouterr().out


def test_all_gin_problems_come_at_once(capsys, tiny_data, tmp_path):
    """Red if the command stopped at the first problem."""
    bad = ["--gin.ModelConfig.embd=3", "--gin.TrainConfig.step=3", "--gin.ModelConfig.heads='x'"]
    error = fails(capsys, *train(tiny_data, tmp_path / "run"), *bad)
    assert "did you mean 'embed'?" in error
    assert "did you mean 'steps'?" in error
    assert "ModelConfig.heads = 'x' must be int" in error


def test_from_run_to_text_to_hugging_face_and_back(capsys, run, tmp_path):
    """Red if the export forgot the tokenizer, or the sampler read other weights from it."""
    prompt = ["--prompt=import os", "--max_new_tokens=8"]
    assert cli.main(["sample", str(run), *prompt]) == 0
    text = capsys.readouterr().out
    assert text.startswith("import os")
    assert cli.main(["convert", str(run), str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    assert cli.main(["sample", str(tmp_path / "hf"), *prompt]) == 0
    assert capsys.readouterr().out == text
    assert cli.main(["convert", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    capsys.readouterr()
    assert cli.main(["sample", str(tmp_path / "ours"), *prompt, "--no_stream"]) == 0
    assert capsys.readouterr().out == text
    assert "already 'hf'" in fails(
        capsys, "convert", str(tmp_path / "hf"), str(tmp_path / "x"), "--to=hf"
    )
    assert "hf" in fails(capsys, "convert", str(run), str(tmp_path / "hf"))  # not empty


def test_nothing_is_replaced_in_passing(capsys, tiny_data, tmp_path):
    """Red if _check_new is not called: another tokenizer would take the place of the data's."""
    before = (tiny_data.parent / "tokenizer" / "tokenizer.model").read_bytes()
    corpus = str(tiny_data.parent / "code.jsonl")
    out = f"--out={tiny_data.parent / 'tokenizer'}"
    assert "exists" in fails(capsys, "data", "tokenizer", corpus, out, "--vocab_size=300")
    assert (tiny_data.parent / "tokenizer" / "tokenizer.model").read_bytes() == before
    assert "exists" in fails(capsys, "data", "corpus", str(tiny_data))
    assert "File exists" in fails(capsys, "data", "corpus", f"{corpus}/below")


def test_jsonl(capsys, run, tmp_path):
    """Red if answers came in another order, or a flag did not reach the lines."""
    prompts = [{"prompt": "def f("}, {"prompt": "class A:", "max_new_tokens": 3}]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in prompts))
    files = [f"--input={source}", f"--output={out}", "--max_new_tokens=5"]
    assert cli.main(["sample", str(run), *files]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["line"] for answer in answers] == [1, 2]
    assert [len(answer["completions"][0]["ids"]) for answer in answers] == [5, 3]
    source.write_text('{"prompt": "a", "temprature": 1}\n')
    out.unlink()
    capsys.readouterr()
    error = fails(capsys, "sample", str(run), *files)
    assert "temprature" in error and "temperature" in error


def test_prompt_longer_than_the_context(capsys, run):
    """Red if the prompt were cut in silence."""
    error = fails(capsys, "sample", str(run), f"--prompt={'word ' * 400}")
    assert "256" in error
