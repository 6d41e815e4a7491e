"""Whole runs on a real small data set: resume, stop, skip, refuse."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import RUN_MODEL as MODEL

from lemur_jax import checkpoint
from lemur_jax.checkpoint import CheckpointError
from lemur_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from lemur_jax.data import ledger
from lemur_jax.data.audit import audit
from lemur_jax.data.exclude import exclude
from lemur_jax.train import loop, metrics


def config(run_dir: Path, data: Path, **changes) -> TrainConfig:
    defaults = {
        "run_dir": str(run_dir),
        "steps": 8,
        "model": MODEL,
        "data": DataConfig(path=str(data), batch_size=8, sequence_length=64),
        "optimizer": OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=2),
        "mesh": MeshConfig(fsdp=4, tensor=2),
        "loss": LossConfig(z_loss=1e-4, chunk_tokens=32),
        "checkpoint": CheckpointConfig(steps_per_save=4, keep_latest=3),
        "evaluation": EvaluationConfig(steps_per_evaluation=4, batches=2),
        "steps_per_log": 1,
    }
    return TrainConfig(**(defaults | changes))


def weights(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    step_dir = run_dir / "checkpoints" / str(step)
    return checkpoint.restore(step_dir, items=("params", "opt"))


@pytest.fixture(scope="module")
def whole_run(tiny_data, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    result = loop.train(config(run_dir, tiny_data), "# operative config\n")
    assert result.finished and result.step == 8
    return run_dir


def test_a_run_learns_and_leaves_everything(whole_run):
    """Red if the optimizer moved uphill, or the loop forgot to save, plot, log or evaluate."""
    lines = metrics.read_metrics(whole_run)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.2
    held_out = [line for line in lines if "evaluation/code/loss" in line]
    assert [line["step"] for line in held_out] == [4, 8]
    assert (whole_run / "loss.png").stat().st_size > 10_000
    assert checkpoint.complete_steps(whole_run / "checkpoints") == [4, 8]
    manifest = checkpoint.describe(whole_run / "checkpoints" / "8")
    assert manifest.about["model"]["kv_heads"] == 2
    assert manifest.about["data"]["step"] == 8
    assert {"config.gin", "tokenizer/tokenizer.model"} <= set(manifest.files)


def positions(run_dir: Path) -> dict[int, dict]:
    steps = checkpoint.complete_steps(run_dir / "checkpoints")
    return {s: checkpoint.describe(run_dir / "checkpoints" / str(s)).about["data"] for s in steps}


def test_what_a_run_read_is_proved(whole_run):
    """Red if the loop does not write its ledger, or feeds other rows than it counts."""
    result = audit(whole_run, positions(whole_run), full=True)
    assert result.violations == [] and result.read_again == 8
    assert [interval[:2] for interval in result.lineage.intervals] == [(0, 4), (4, 8)]


@pytest.mark.slow
def test_what_a_run_with_events_reads_is_proved(tiny_data, tmp_path, monkeypatch):
    """Red if an exclusion or a change of weights does not reach the batches, or if the ledger's
    line comes after the checkpoint: a kill between the two would look like skipped steps."""
    original = checkpoint.CheckpointWriter.save

    def checked(self, step, *arguments, **fields):
        last = ledger.read_run(tmp_path).entries[-1]
        assert (last.event, last["step"]) == ("saved", step)
        original(self, step, *arguments, **fields)

    monkeypatch.setattr(checkpoint.CheckpointWriter, "save", checked)
    run = config(tmp_path, tiny_data, steps=4, evaluation=EvaluationConfig(batches=1))
    loop.train(run, "")
    excluded = exclude(str(tmp_path), patterns=["a*.py"])
    changes = ((6, "text", 10.0),)
    later = dataclasses.replace(run.data, weight_changes=changes)
    loop.train(dataclasses.replace(run, steps=8, data=later, micro_batches=2), "")
    result = audit(tmp_path, positions(tmp_path), full=True)
    assert result.violations == [] and result.read_again == 8
    assert [interval[:2] for interval in result.lineage.intervals] == [(0, 4), (4, 8)]
    assert result.sources["text"].used > 8  # 3 of the first 48 rows, 8 of the last 16
    assert positions(tmp_path)[8]["weight_changes"] == "6:text=10.0"
    numbers = sum(map(len, excluded.values()))
    assert positions(tmp_path)[8]["exclusions"].startswith(f"4:{numbers} documents")
    earlier = dataclasses.replace(run.data, weight_changes=((3, "text", 10.0),))
    with pytest.raises(ConfigError, match="weight_changes='3:text=10.0'.*cannot change"):
        loop.train(dataclasses.replace(run, steps=9, data=earlier), "")


def test_resume_is_bitwise_equal_to_an_uninterrupted_run(whole_run, tiny_data, tmp_path):
    """Red if a resumed run read the batches from step 0, or lost the optimizer state."""
    loop.train(config(tmp_path, tiny_data, steps=8), "")  # leaves checkpoints 4 and 8
    newest = tmp_path / "checkpoints" / "8"
    (newest / "manifest.json").unlink()  # as if killed while saving step 8
    result = loop.train(config(tmp_path, tiny_data), "")
    assert result.step == 8
    expected = weights(whole_run, 8)
    found = weights(tmp_path, 8)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    steps = [line["step"] for line in metrics.read_metrics(tmp_path) if "train/loss" in line]
    assert steps == list(range(1, 9))  # each step once, although 5..8 ran twice


def test_resume_on_another_mesh_continues_the_same_run(whole_run, tiny_data, tmp_path):
    """Red if a restore used the saved shardings."""
    two_parts = config(tmp_path, tiny_data, steps=8)
    loop.train(two_parts, "")
    (tmp_path / "checkpoints" / "8" / "manifest.json").unlink()
    loop.train(dataclasses.replace(two_parts, mesh=MeshConfig(data=2, fsdp=2, sequence=2)), "")
    expected = weights(whole_run, 8)
    for name, array in weights(tmp_path, 8).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-4, err_msg=name)


def test_a_damaged_latest_checkpoint_is_passed_over_loudly(tiny_data, tmp_path, capsys):
    """Red if restore_latest did not verify, or set_aside did not rename what it passed over."""
    run = config(tmp_path, tiny_data)
    loop.train(run, "")
    data_files = sorted(
        (tmp_path / "checkpoints" / "8" / "params").rglob("d/*"), key=lambda p: p.stat().st_size
    )
    damaged = bytearray(data_files[-1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    data_files[-1].write_bytes(damaged)
    capsys.readouterr()
    loop.train(dataclasses.replace(run, steps=9), "")
    out = capsys.readouterr().out.replace("\n", " ")
    assert "checkpoint 8 is passed over" in out
    assert "at step 4" in out
    # It counts no more when the keep policy looks, and is not deleted either; 8 was saved anew.
    assert checkpoint.complete_steps(tmp_path / "checkpoints") == [4, 8, 9]
    assert (tmp_path / "checkpoints" / "8.damaged" / "manifest.json").exists()


def test_other_data_or_model_is_refused(whole_run, tiny_data):
    """Red if check_position or _check_same_model is not called on resume."""
    run = config(whole_run, tiny_data, steps=9)
    other = dataclasses.replace(run, data=dataclasses.replace(run.data, seed=1))
    with pytest.raises(ConfigError, match="seed"):
        loop.train(other, "")
    other = dataclasses.replace(
        run, optimizer=OptimizerConfig(peak_learning_rate=1e-3, name="adafactor")
    )
    with pytest.raises(ConfigError, match="name='adafactor', but the checkpoints .* 'adamw'"):
        loop.train(other, "")
    other = dataclasses.replace(run, model=dataclasses.replace(MODEL, norm_eps=1e-6))
    with pytest.raises(ConfigError, match="norm_eps=1e-06, but the checkpoints .* 1e-05"):
        loop.train(other, "")


def test_init_from_takes_weights_only(whole_run, tiny_data, tmp_path):
    """Red if init_from also took the step or the optimizer state."""
    run = config(
        tmp_path,
        tiny_data,
        steps=1,
        init_from=str(whole_run),
        optimizer=OptimizerConfig(peak_learning_rate=0.0),
    )
    result = loop.train(run, "")
    assert result.step == 1
    trained, copied = weights(whole_run, 8), weights(tmp_path, 1)
    for name in trained:
        if name.startswith("params/"):
            np.testing.assert_array_equal(copied[name], trained[name], err_msg=name)
    assert int(copied["step"]) == 1


def test_a_run_that_only_skips_stops_and_names_documents(tiny_data, tmp_path):
    """Red if max_skipped_in_a_row is ignored."""
    run = config(tmp_path, tiny_data, optimizer=OptimizerConfig(
        peak_learning_rate=1e30, clip_norm=0.0, max_skipped_in_a_row=2
    ))  # fmt: skip
    with pytest.raises(loop.TrainingStoppedError, match=r"2 steps in a row.*not finite.*\.py"):
        loop.train(run, "")


def test_too_small_vocabulary_is_refused_before_tracing(tiny_data, tmp_path):
    """Red if _check_vocabulary is not called: lookups would clamp in silence."""
    small = dataclasses.replace(MODEL, vocab_size=100)
    with pytest.raises(ConfigError, match="vocab_size=100 is smaller than the 512 tokens"):
        loop.train(config(tmp_path, tiny_data, model=small), "")


@pytest.mark.slow
def test_sigterm_saves_and_the_command_line_resumes(tiny_data, tmp_path):
    """Red if StopRequest did not install its handler, or the exit status were 0."""
    run = tmp_path / "run"
    arguments = [
        *(sys.executable, "-m", "lemur_jax.cli", "train", "--gin_file=models/tiny.gin"),
        *(f"--gin.DataConfig.path={json.dumps(str(tiny_data))}", "--gin.DataConfig.batch_size=8"),
        "--gin.DataConfig.sequence_length=64",
        *("--gin.OptimizerConfig.peak_learning_rate=1e-3", "--gin.TrainConfig.steps=400"),
        *(f"--gin.TrainConfig.run_dir={json.dumps(str(run))}", "--gin.TrainConfig.steps_per_log=1"),
    ]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    process = subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not metrics.read_metrics(run) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143, out
    (step,) = checkpoint.complete_steps(run / "checkpoints")
    assert 0 < step < 400
    arguments.append(f"--gin.TrainConfig.steps={step + 2}")
    arguments.remove("--gin.TrainConfig.steps=400")
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert f"at step {step}" in done.stdout.replace("\n", " ")
    assert (run / "config.gin").read_text().count("TrainConfig.steps") >= 1


def test_missing_data_is_named(tmp_path):
    """Red if Pipeline opened a missing directory lazily."""
    with pytest.raises(ConfigError, match=r"DataConfig\.path=.*none"):
        loop.train(config(tmp_path, tmp_path / "none"), "")
    assert jax.process_count() == 1
    with pytest.raises(CheckpointError):
        checkpoint.resolve(tmp_path / "none")
