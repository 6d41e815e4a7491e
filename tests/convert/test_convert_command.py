"""`lemur convert` as it is typed: plan, dry run, verify, flags."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_hf

from lemur_jax import cli, cli_convert
from lemur_jax.convert import engine


@pytest.fixture
def source(tmp_path):
    return str(tiny_hf.write(tmp_path / "hf"))


def test_the_plan_comes_first_and_a_dry_run_stops_there(capsys, tmp_path, source):
    """Red when --dry_run writes, or the plan lacks bytes, memory or time."""
    assert cli.main(["convert", source, str(tmp_path / "o"), "--dry_run", "--max_ram=3GiB"]) == 0
    out = capsys.readouterr().out
    for words in ("plan: 12 leaves in", "in, ", "out (", "--max_ram=3.0 GiB", "time: about"):
        assert words in out
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert cli.main(["convert", source, str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    assert out.index("plan:") < out.index("peak memory") < out.index("wrote")


def test_verify_says_equal_or_what_differs(capsys, tmp_path, source):
    """Red when the exit status is 0 for models that differ."""
    assert cli.main(["convert", source, str(tmp_path / "o"), "--to=easylm"]) == 0
    assert cli.main(["convert", "verify", source, str(tmp_path / "o")]) == 0
    assert "equal: 12 leaves" in capsys.readouterr().out
    weights = tiny_hf.weights()
    weights["lm_head.weight"][7, 3] = np.inf
    other = str(tiny_hf.write(tmp_path / "other", weights))
    assert cli.main(["convert", "verify", source, other]) == cli_convert.EXIT_DIFFERENT
    out = capsys.readouterr().out
    assert "head: 1 values differ" in out and "lm_head.weight in model.safetensors" in out


def test_no_accelerator_is_asked_for(tmp_path, source):
    """Red when convert, verify or parity leaves JAX's platforms as the environment has them."""
    made = str(tmp_path / "o")
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}  # of which there is none
    for words in ([source, made], ["verify", source, made], ["parity", source, made]):
        command = [sys.executable, "-m", "lemur_jax.cli", "convert", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_layers_of_different_dtypes(capsys, tmp_path):
    """Red when the source is opened again, for its tokenizer, without --dtype."""
    weights = tiny_hf.weights()
    name = "model.layers.1.input_layernorm.weight"
    weights[name] = weights[name].astype("float16")
    source = str(tiny_hf.write(tmp_path / "hf", weights))
    assert cli.main(["convert", source, str(tmp_path / "o")]) == cli.EXIT_BAD_INPUT
    assert "give --dtype=float32" in capsys.readouterr().err
    assert cli.main(["convert", source, str(tmp_path / "o"), "--dtype=float32"]) == 0


def test_interrupted(capsys, tmp_path, monkeypatch, source):
    """Red when Ctrl-C is a traceback, or what is written goes."""
    run = engine.run

    def interrupted(*arguments):
        run(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "run", interrupted)
    assert cli.main(["convert", source, str(tmp_path / "o")]) == cli.EXIT_INTERRUPTED
    said = capsys.readouterr()
    assert "the same command goes on" in said.out and "interrupted" in said.err
    monkeypatch.setattr(engine, "run", run)
    assert cli.main(["convert", source, str(tmp_path / "o")]) == 0
    assert "going on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["verify", "a"], "verify takes two models"),
        (["verify", "a", "b", "--to=hf", "--mesh=fsdp=2"], "remove --to, --mesh"),
        (["SRC", "o", "--mesh=tensor=2,tensor=4"], "tensor is given twice"),
        (["a"], "convert takes SRC and DST, 1 paths were given"),
        (["SRC", "o", "--max_ram=lots"], "--max_ram='lots' is no size"),
        (["SRC", "o", "--max_ram=100MiB"], "the least is"),
        (["SRC", "o", "--mesh=rows=2"], "'rows' is no axis"),
        (["SRC", "o", "--mesh=fsdp=two"], "fsdp needs a number"),
        (["SRC", "o", "--to=hf"], "already 'hf'"),
        (["SRC", "o", "--dtype=int4"], "dtype='int4' is unknown"),
        (["SRC", "o", "--process=1"], "--process=1 must be from 0"),
        (["SRC", "gs://bucket/x", "--to=easylm"], "gs://bucket/x is not local"),
    ],
    ids=str,
)
def test_flags_that_cannot_be(capsys, tmp_path, monkeypatch, source, argv, message):
    """Red when a flag is parsed after the weights have been opened for writing."""
    monkeypatch.chdir(tmp_path)
    argv = [source if word == "SRC" else word for word in argv]
    assert cli.main(["convert", *argv]) == cli.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".o*"))


def test_the_same_format_in_another_dtype(capsys, tmp_path, source):
    """Red when --to=hf is refused for an HF source that changes."""
    out = str(tmp_path / "o")
    assert cli.main(["convert", source, out, "--to=hf", "--dtype=bfloat16"]) == 0
    assert "cast layers/wq: float32 -> bfloat16" in capsys.readouterr().out
    assert cli.main(["convert", source, str(tmp_path / "p"), "--to=hf", "--add_tokens=A,B"]) == 0
    assert cli.main(["convert", "verify", source, out, "--dtype=bfloat16"]) == 0
