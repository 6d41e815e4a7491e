"""A run on the tiny data set, and pipelines that lie about it."""

import dataclasses
from pathlib import Path

import pytest

from lemur_jax.check.run import certify
from lemur_jax.config import (
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    TrainConfig,
)
from lemur_jax.data.pipeline import Batch, Pipeline

MODEL = ModelConfig(
    vocab_size=512,
    embed=32,
    mlp=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_positions=64,
    rope=RopeConfig(theta=10000.0),
    norm_eps=1e-5,
    dtype="float32",
)


def make_config(run_dir: Path, data: Path, **changes) -> TrainConfig:
    defaults = {
        "run_dir": str(run_dir),
        "steps": 8,
        "model": MODEL,
        "data": DataConfig(path=str(data), batch_size=16, sequence_length=64),
        "optimizer": OptimizerConfig(peak_learning_rate=3e-3),
        "mesh": MeshConfig(fsdp=4, tensor=2),
        "loss": LossConfig(chunk_tokens=32),
        "micro_batches": 2,
    }
    return TrainConfig(**(defaults | changes))


class Changed:
    """A pipeline whose batches pass through a function, and whose manifest may say more."""

    def __init__(self, pipeline: Pipeline, change=lambda batch: batch, **manifest):
        self._pipeline, self._change = pipeline, change
        self.manifest = pipeline.manifest | manifest
        self.tokenizer_dir = pipeline.tokenizer_dir

    def rows(self, step: int, start: int, stop: int) -> Batch:
        return self._change(self._pipeline.rows(step, start, stop))

    def provenance(self, step: int):
        return self._pipeline.provenance(step)


@pytest.fixture(scope="session")
def run_config(tiny_data, tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("check") / "run", tiny_data)


@pytest.fixture(scope="session")
def pipeline(run_config):
    return Pipeline(run_config.data)


@pytest.fixture(scope="session")
def results(run_config):
    """(pipeline, only=...) -> {name: Result}; `only` leaves out what compiles."""

    def judge(pipeline, config=run_config, **options):
        certificate = certify(pipeline, dataclasses.replace(config), "text", **options)
        return {result.name: result for result in certificate.results}

    return judge
