"""Hugging Face directory -> checkpoint of ours, and back: `convert` with its usual settings.

Weights keep the dtype in which they are stored, bit for bit, unless another is asked for; so the
float32 master weights of a training run are exported as float32 unless `dtype` says otherwise.

What a config.json says beyond ModelConfig travels with the checkpoint as `about["hf_extras"]`:
  config: the config.json, whole.
  weights_dtype: of the stored weights at the time.
  tied_head: whether the tied matrix was stored under both of its names.
"""

import os
from pathlib import Path
from typing import Any

from lemur_jax.convert.convert import convert
from lemur_jax.convert.model import open_source
from lemur_jax.convert.options import Options


def import_hf(hf_dir: str | Path, out_dir: str | Path, *, dtype: str | None = None) -> os.PathLike:
    """Writes a parameter checkpoint, step 0, that says what it is; returns its step directory.

    Args:
      hf_dir: local HF directory, or any other source of `model.open_source`.
      out_dir: must not exist or be empty; local, or gs://.
      dtype: of the stored weights; None keeps each weight's own.

    Raises:
      ConversionError: anything wrong with the source, or `out_dir` holds something.
      CheckpointError: the checkpoint cannot be written.
    """
    return convert(hf_dir, out_dir, Options(to="lemur", dtype=dtype))


def export_hf(
    path: str | Path, out_dir: str | Path, *, dtype: str | None = None, **options: Any
) -> Path:
    """Writes a directory that `transformers` loads; returns it.

    Args:
      path: run, checkpoints directory or checkpoint; of a run the newest checkpoint.
      out_dir: must not exist or be empty; local.
      dtype: of the written weights; None keeps the stored dtype.
      options: further ones of `convert.Options`, e.g. max_shard_bytes.

    Raises:
      ConversionError: the checkpoint does not hold its model, transformers cannot hold the model,
        or `out_dir` holds something.
      CheckpointError: no checkpoint there, or a damaged one.
    """
    return Path(convert(path, out_dir, Options(to="hf", dtype=dtype, **options)))


def carried(path: str | Path) -> tuple[dict[str, Any] | None, dict[str, bytes]]:
    """What a model brings along beside its weights: `hf_extras` and files, tokenizer included.

    A training run that starts from `path` puts them into its own checkpoints, so that its export
    still has the source's token ids, generation settings and licence.

    Args:
      path: an HF directory, or a checkpoint of ours.
    """
    source = open_source(path)
    return source.extras, source.files()
