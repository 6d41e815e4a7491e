"""A run with LoRA from start to export: resumed bit for bit, self-describing, never mixed up."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import RUN_MODEL as MODEL

from lemur_jax import checkpoint
from lemur_jax.cli import main
from lemur_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from lemur_jax.convert.load import load_model
from lemur_jax.model import param
from lemur_jax.train import loop

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"), embeddings=True)


def config(run_dir: Path, data: Path, **changes) -> TrainConfig:
    defaults = {
        "run_dir": str(run_dir),
        "steps": 4,
        "model": MODEL,
        "data": DataConfig(path=str(data), batch_size=8, sequence_length=64),
        "optimizer": OptimizerConfig(peak_learning_rate=1e-2),
        "mesh": MeshConfig(fsdp=4, tensor=2),
        "loss": LossConfig(chunk_tokens=32),
        "checkpoint": CheckpointConfig(steps_per_save=2, keep_latest=3),
        "evaluation": EvaluationConfig(steps_per_evaluation=0, batches=2),
        "steps_per_log": 1,
    }
    return TrainConfig(**(defaults | changes))


def arrays(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    items = ("params", "adapters", "opt")
    return checkpoint.restore(run_dir / "checkpoints" / str(step), items=items)


@pytest.fixture(scope="module")
def base(tiny_data, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "base"
    loop.train(config(run_dir, tiny_data, steps=2), "")
    return run_dir


@pytest.fixture(scope="module")
def adapted(base, tiny_data):
    """(run directory, result) of four steps with LoRA on `base`."""
    run_dir = base.parent / "adapted"
    start = config(run_dir, tiny_data, init_from=str(base), lora=LORA)
    return run_dir, loop.train(start, "")


@pytest.mark.slow
def test_a_checkpoint_holds_base_adapters_and_their_moments(base, adapted):
    """Red if the base moved, or its moments were kept."""
    stored, before = arrays(adapted[0], 4), checkpoint.restore(base / "checkpoints/2")
    assert {n: w for n, w in stored.items() if n.startswith("params/")}.keys() == before.keys()
    assert all(np.array_equal(stored[name], weight) for name, weight in before.items())
    moments = [n for n in stored if n.startswith("opt/") and stored[n].ndim]
    assert len(moments) == 2 * (2 * len(LORA.targets) + len(("table", "head")))
    assert np.abs(stored["adapters/layers/wq_b"]).max() > 0


@pytest.mark.slow
def test_resume_is_bitwise(base, adapted, tiny_data, tmp_path):
    """Red if the adapters were drawn again at a resume, or restored as the base's item."""
    run_dir = tmp_path / "run"
    shutil.copytree(adapted[0], run_dir)
    shutil.rmtree(run_dir / "checkpoints/4")
    loop.train(config(run_dir, tiny_data, init_from=str(base), lora=LORA), "")
    whole, again = arrays(adapted[0], 4), arrays(run_dir, 4)
    assert whole.keys() == again.keys()
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
def test_a_full_run_does_not_go_on_with_adapters(base, adapted, tiny_data):
    """Red if only the model were compared on resume."""
    for lora in (None, dataclasses.replace(LORA, alpha=9.0)):
        with pytest.raises(ConfigError, match=r"TrainConfig\.lora="):
            loop.train(config(adapted[0], tiny_data, init_from=str(base), lora=lora, steps=6), "")


@pytest.mark.slow
def test_what_the_run_computed_is_what_is_exported(base, adapted, tiny_data, tmp_path):
    """Red if `load_model` or the export took the base; a run from the export has the same loss."""
    run_dir, result = adapted
    assert main(["convert", str(run_dir), str(tmp_path / "hf")]) == 0
    assert main(["convert", "verify", str(run_dir), str(tmp_path / "hf")]) == 0
    assert main(["convert", "verify", str(run_dir), str(base)]) == 1
    merged, _ = load_model(run_dir)
    assert not np.array_equal(merged.layers.wq[...], load_model(base)[0].layers.wq[...])
    assert set(param.flatten(merged)) == set(param.flatten(load_model(base)[0]))
    # One step at a learning rate of 0: its evaluation is of the exported weights.
    still = OptimizerConfig(peak_learning_rate=0.0, weight_decay=0.0)
    again = config(
        tmp_path / "run", tiny_data, init_from=str(tmp_path / "hf"), steps=1, optimizer=still
    )
    found = loop.train(again, "")
    for source, loss in result.held_out_loss.items():
        np.testing.assert_allclose(found.held_out_loss[source], loss, rtol=1e-5)
    assert jax.process_count() == 1


def test_lora_needs_something_to_adapt(tmp_path):
    """Red if LoRA on random weights were let through."""
    with pytest.raises(ConfigError, match=r"TrainConfig\.lora needs TrainConfig\.init_from"):
        config(tmp_path, tmp_path, lora=LORA)
