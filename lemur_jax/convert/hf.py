"""Hugging Face directory -> checkpoint of ours, and back.

Both directions go tensor by tensor. Weights keep the dtype in which they are stored, bit for bit,
unless another is asked for; so the float32 master weights of a training run are exported as
float32 unless `dtype` says otherwise. Neither direction writes into a directory that holds
anything, and the destination appears under its name only when it is complete.

What a config.json says beyond ModelConfig travels with the checkpoint as `about["hf_extras"]`:
  config: the config.json, whole.
  weights_dtype: of the stored weights at the time.
  tied_head: whether the tied matrix was stored under both of its names.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lemur_jax import checkpoint
from lemur_jax.config import ModelConfig, model_config
from lemur_jax.convert import safetensors, tables
from lemur_jax.convert.cast import cast, check_dtype
from lemur_jax.convert.destination import appearing, check_new
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.hf_config import config_to_hf
from lemur_jax.convert.model import open_source
from lemur_jax.convert.ours import PREFIX
from lemur_jax.convert.progress import progress
from lemur_jax.convert.recognise import step_directory
from lemur_jax.convert.rules import Rule
from lemur_jax.convert.small_files import GENERATION_CONFIG, HF_DIR, TOKENIZER_DIR
from lemur_jax.convert.stored import whole
from lemur_jax.model import param
from lemur_jax.model.decoder import abstract

_SHARD_BYTES = 5_000_000_000  # transformers' habit
_TOKEN_IDS = ("bos", "eos", "pad")


# ---------------------------------------------------------------------------------------------
# HF -> ours
# ---------------------------------------------------------------------------------------------


def import_hf(hf_dir: str | Path, out_dir: str | Path, *, dtype: str | None = None) -> os.PathLike:
    """Writes a parameter checkpoint, step 0, that says what it is.

    Reads tensor by tensor, but the writer of checkpoints takes whole trees: host memory must hold
    the weights once, and one leaf twice.

    Args:
      hf_dir: local HF directory with safetensors weights.
      out_dir: must not exist or be empty; local, or gs://.
      dtype: of the stored weights; None keeps each weight's own.

    Returns:
      The step directory.

    Raises:
      ConversionError: anything wrong with the source, or `out_dir` holds something.
      CheckpointError: the checkpoint cannot be written.
    """
    check_new(out_dir)
    hf = open_source(hf_dir, dtype=dtype)
    extras = dict(hf.extras)
    if dtype is not None:
        extras |= {"config": config_to_hf(hf.config, extras["config"], dtype)}
        extras |= {"weights_dtype": hf.config.param_dtype}
    about = {"kind": "params", "model": dataclasses.asdict(hf.config), "hf_extras": extras}
    total = sum(np.prod(hf.shape(n), dtype=int) * hf.dtype(n).itemsize for n in hf.names)
    cpu = _host()
    arrays = {}
    with progress(f"reading {hf.path}", int(total)) as advance:
        for name in hf.names:
            leaf = hf.read(name)
            arrays[PREFIX + name] = jax.device_put(leaf, cpu)
            advance(name, leaf.nbytes)
    with checkpoint.CheckpointWriter(out_dir, keep_latest=1) as writer:
        writer.save(0, {"params": arrays}, about=about, files=hf.files())
    return step_directory(out_dir)


def carried(path: str | Path) -> tuple[dict[str, Any] | None, dict[str, bytes]]:
    """What a model brings along beside its weights: `hf_extras` and files, tokenizer included.

    A training run that starts from `path` puts them into its own checkpoints, so that its export
    still has the source's token ids, generation settings and licence.

    Args:
      path: an HF directory, or a checkpoint of ours.
    """
    source = open_source(path)
    return source.extras, source.files()


def _host() -> jax.Device:
    """The CPU: a conversion must not depend on what fits on an accelerator."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        platforms = jax.config.jax_platforms
        raise ConversionError(
            [f"JAX_PLATFORMS={platforms!r} hides the CPU, which must hold the weights: add ',cpu'"]
        ) from error


# ---------------------------------------------------------------------------------------------
# Ours -> HF
# ---------------------------------------------------------------------------------------------


def export_hf(
    path: str | Path,
    out_dir: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Writes a directory that `transformers` loads.

    Args:
      path: run, checkpoints directory or checkpoint; of a run the newest checkpoint.
      out_dir: must not exist or be empty; local.
      dtype: of the written weights; None keeps the stored dtype.
      max_shard_bytes: of one safetensors file.

    Returns:
      `out_dir`.

    Raises:
      ConversionError: the checkpoint does not hold its model, transformers cannot hold the model,
        or `out_dir` holds something.
      CheckpointError: no checkpoint there, or a damaged one.
    """
    check_dtype(dtype)
    if max_shard_bytes < 1:
        raise ConversionError([f"max_shard_bytes={max_shard_bytes} must be positive"])
    if "://" in str(out_dir):
        raise ConversionError([f"{out_dir} is not local: export to a local directory, then copy"])
    check_new(out_dir)
    out_dir = Path(out_dir)
    step_dir = step_directory(path)
    manifest = checkpoint.describe(step_dir)
    if "model" not in manifest.about:
        raise ConversionError([f"{step_dir} does not say which model it holds (about['model'])"])
    config = model_config(manifest.about["model"])
    extras = manifest.about.get("hf_extras") or {}
    table = _table(config, extras)
    dtypes = _stored_dtypes(step_dir, manifest, table, config, dtype)
    planned = _planned(table, config, dtypes)
    written = config_to_hf(
        config, extras.get("config"), _dtype_to_state(extras, dtypes["table"].name)
    )
    with appearing(out_dir, sum(tensor.nbytes for tensor in planned)) as directory:
        ids = _write_small_files(step_dir, manifest, directory)
        if not extras:
            written |= {f"{role}_token_id": ids.get(role) for role in _TOKEN_IDS}
        (directory / "config.json").write_text(_json(written))
        if not (directory / GENERATION_CONFIG).exists():
            (directory / GENERATION_CONFIG).write_text(_json(_generation_config(written)))
        _write_weights(step_dir, directory, table, config, planned, max_shard_bytes)
    return out_dir


def _table(config: ModelConfig, extras: dict[str, Any]) -> tuple[Rule, ...]:
    table = tables.hf_llama(config)
    if extras.get("tied_head") and config.tie_embeddings:
        table += (tables.HF_TIED_HEAD,)
    return table


def _dtype_to_state(extras: dict[str, Any], weights: str) -> str | None:
    """None while the weights are as they came: then the source's config.json is right already."""
    return None if extras.get("weights_dtype") == weights else weights


def _stored_dtypes(step_dir, manifest, table, config, dtype) -> dict[str, np.dtype]:
    """dtype of each leaf as it will be written; the checkpoint must hold exactly its model."""
    stored = {
        name.removeprefix(PREFIX): entry
        for name, entry in manifest.arrays.items()
        if name.startswith(PREFIX)
    }
    leaves = {name: leaf.shape for name, leaf in param.flatten(abstract(config)).items()}
    problems = [f"{step_dir} lacks {PREFIX}{name}" for name in leaves if name not in stored]
    problems += [
        f"{step_dir} holds {PREFIX}{name}, which its model does not have"
        for name in stored
        if name not in leaves
    ]
    problems += [
        f"{step_dir}: {PREFIX}{name} has shape {list(stored[name].shape)}, its model has "
        f"{list(shape)}"
        for name, shape in leaves.items()
        if name in stored and stored[name].shape != shape
    ]
    problems += [
        f"no rule of the table writes {name!r}" for name in set(leaves) - {r.ours for r in table}
    ]
    if problems:
        raise ConversionError(problems)
    return {name: safetensors.numpy_dtype(dtype or entry.dtype) for name, entry in stored.items()}


def _planned(table, config, dtypes) -> list[safetensors.Planned]:
    """Every tensor, in the order of the layers, so that one shard holds whole layers."""

    def one(rule: Rule, name: str) -> safetensors.Planned:
        return safetensors.Planned(name, rule.their_shape(config), dtypes[rule.ours])

    first = [one(rule, rule.theirs) for rule in table if rule.ours == "table"]
    last = [one(r, r.theirs) for r in table if not r.stacked and r.ours != "table"]
    layers = [
        one(rule, rule.theirs.format(layer))
        for layer in range(config.layers)
        for rule in table
        if rule.stacked
    ]
    return first + layers + last


def _write_weights(step_dir, directory, table, config, planned, max_shard_bytes) -> None:
    dtype_of = {tensor.name: tensor.dtype for tensor in planned}
    total = sum(tensor.nbytes for tensor in planned)
    files, index = safetensors.layout(directory, planned, max_shard_bytes)
    tensors = {}
    for file in files:
        file.path.write_bytes(file.header)
        os.truncate(file.path, file.size)
        tensors |= {tensor.name: tensor for tensor in file.tensors}
    if index is not None:
        (directory / safetensors.INDEX).write_text(index)
    with progress(f"writing {directory.name}", total) as advance:
        for rule in table:
            for name, array in zip(rule.source_names(config), _slices(step_dir, rule), strict=True):
                array = cast(rule.to_theirs(array, config), dtype_of[name], name)
                descriptor = os.open(tensors[name].path, os.O_WRONLY)
                tensors[name].write(descriptor, whole(array.shape), array)
                os.close(descriptor)
                advance(name, array.nbytes)


def _slices(step_dir, rule: Rule) -> Iterator[np.ndarray]:
    """The layers of a leaf one at a time, or the leaf; digests are checked on the way."""
    if rule.stacked:
        return checkpoint.read_slices(step_dir, PREFIX + rule.ours)
    return iter([checkpoint.read_tensor(step_dir, PREFIX + rule.ours)])


def _write_small_files(step_dir, manifest, directory: Path) -> dict[str, int | None]:
    """Tokenizer and carried files; returns the tokenizer's special ids, {} without a tokenizer."""
    for name in manifest.files:
        folder, _, rest = name.partition("/")
        if folder in (TOKENIZER_DIR, HF_DIR) and rest and "/" not in rest:
            (directory / rest).write_bytes(checkpoint.read_file(step_dir, name))
    names = {path.name for path in directory.iterdir()}
    if not names & {"tokenizer.model", "tokenizer.json"}:
        return {}
    if "tokenizer.json" not in names and "tokenizer_config.json" not in names:
        # One that we trained. Imported late: conversion of weights needs no sentencepiece.
        from lemur_jax.data.tokenizer_files import write_hf_files

        write_hf_files(directory)
    if "hf_extras" in manifest.about:
        return {}  # its config.json has the ids already
    from lemur_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(directory)
    return {role: getattr(tokenizer, f"{role}_id") for role in _TOKEN_IDS}


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    ids = {f"{role}_token_id": config.get(f"{role}_token_id") for role in _TOKEN_IDS}
    return {"_from_model_config": True} | {k: v for k, v in ids.items() if v is not None}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
