"""Epochs become steps: exactly, or with an error that says how."""

import dataclasses
import json

import pytest

from lemur_jax.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    TrainConfig,
)
from lemur_jax.train.epochs import with_steps


def config(path, **fields):
    model = ModelConfig(
        vocab_size=64, embed=8, mlp=8, layers=1, heads=1, kv_heads=1, head_dim=8,
        max_positions=64, norm_eps=1e-5, rope=RopeConfig(theta=1e4),
    )  # fmt: skip
    return TrainConfig(
        run_dir="x",
        steps=fields.pop("steps", 0),
        model=model,
        data=DataConfig(path=str(path), batch_size=8, sequence_length=16),
        optimizer=fields.pop("optimizer", OptimizerConfig(peak_learning_rate=1e-3)),
        **fields,
    )


def manifest(path, **rows):
    sources = {name: {"splits": {"train": {"rows": count}}} for name, count in rows.items()}
    text = {"format_version": 2, "sources": sources, "tokenizer_fingerprint": "x"}
    (path / "manifest.json").write_text(json.dumps(text))
    return path


def test_steps_are_epochs_times_rows_over_batch(tmp_path):
    """Red if one of the three factors is forgotten."""
    made = with_steps(config(manifest(tmp_path, chat=40), epochs=3))
    assert (made.steps, made.epochs) == (15, None)
    unchanged = config(tmp_path, steps=7)
    assert with_steps(unchanged) is unchanged


def test_uneven_epochs_are_refused_with_the_fix(tmp_path):
    """Red if steps are rounded: some rows would be read more often than others."""
    with pytest.raises(ConfigError, match=r"rows_multiple=8, which adds 2 empty.*steps=12"):
        with_steps(config(manifest(tmp_path, chat=30), epochs=3))
    assert with_steps(config(tmp_path, epochs=4)).steps == 15  # 120 rows: even after all


def test_several_sources_are_refused(tmp_path):
    """Red if the first source's rows are taken."""
    with pytest.raises(ConfigError, match="2 sources"):
        with_steps(config(manifest(tmp_path, code=8, text=8), epochs=1))


def test_steps_or_epochs(tmp_path):
    """Red if both or neither pass, or a warm-up longer than the epochs does."""
    with pytest.raises(ConfigError, match="TrainConfig.steps=0 must be"):
        config(tmp_path)
    with pytest.raises(ConfigError, match="both say when the run ends"):
        config(tmp_path, steps=3, epochs=1)
    with pytest.raises(ConfigError, match="epochs=0"):
        config(tmp_path, epochs=0)
    long_warmup = OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=50)
    asked = config(manifest(tmp_path, chat=40), epochs=3, optimizer=long_warmup)
    with pytest.raises(ConfigError, match="warmup_steps=50 must be smaller"):
        with_steps(asked)
    assert dataclasses.replace(asked, epochs=30).epochs == 30
