"""A run on the tiny data set, and pipelines that lie about it."""

from pathlib import Path

from small_models import RUN_MODEL as MODEL

from lemur_jax.config import (
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from lemur_jax.data.pipeline import Batch, Pipeline


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
