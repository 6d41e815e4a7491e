"""Parameters from any checkpoint that we can read, as a model on a mesh."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from lemur_jax import checkpoint
from lemur_jax.config import ModelConfig, lora_config, model_config
from lemur_jax.convert.adapted import ADAPTERS
from lemur_jax.convert.cast import cast
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.hf_config import COMPUTATION
from lemur_jax.convert.model import open_source
from lemur_jax.convert.ours import PREFIX, check_padding
from lemur_jax.convert.recognise import recognise, step_directory
from lemur_jax.model import lora, param
from lemur_jax.model.decoder import Decoder, abstract

# What may differ between the config asked for and the stored one: how to compute and to initialise.
_FREE = (*COMPUTATION, "initializer_range")


def load_model(
    path: str | Path, *, mesh: Mesh | None = None, config: ModelConfig | None = None
) -> tuple[Decoder, os.PathLike]:
    """Reads a run, a checkpoint or a Hugging Face directory, one leaf at a time.

    Args:
      path: recognised by what it contains.
      mesh: where the weights go; None puts them on the first device.
      config: the model asked for: its `dtype`, `param_dtype`, `remat`, `attention` and
        `vocab_multiple` are honoured, everything else must agree with what is stored. None takes
        the stored config, and with it the stored dtype of the weights.

    Returns:
      The model, and the directory that the weights came from (a step directory of ours, or the HF
      directory).

    Raises:
      ConversionError: `path` is neither, cannot be read, or is of another model than asked for.
      CheckpointError: a checkpoint of ours is incomplete or damaged.
    """
    if recognise(path) == "lemur":
        model, step_dir = _from_checkpoint(step_directory(path), mesh, config)
        return _with_adapters(model, step_dir, mesh), step_dir
    return _from_files(Path(path), mesh, config)


def _from_files(
    path: Path, mesh: Mesh | None, config: ModelConfig | None
) -> tuple[Decoder, os.PathLike]:
    hf = open_source(path)
    if config is not None:
        _check_same(path, hf.config, config)
        hf = hf.with_config(config)  # pads the vocabulary as asked
    targets = _targets(abstract(hf.config), mesh)
    flat = {}
    for name, target in targets.items():
        leaf = cast(hf.read(name), target.dtype, name)
        # Each process and device takes its own part.
        flat[name] = jax.make_array_from_callback(
            target.shape, target.sharding, lambda index, leaf=leaf: leaf[index]
        )
        del leaf
    return param.unflatten(abstract(hf.config), flat), path


def _from_checkpoint(
    step_dir: os.PathLike, mesh: Mesh | None, config: ModelConfig | None
) -> tuple[Decoder, os.PathLike]:
    manifest = checkpoint.describe(step_dir)
    stored = model_config(manifest.about["model"])
    config = stored if config is None else config
    _check_same(step_dir, stored, config)
    check_padding(step_dir, stored, config)
    model = abstract(config)
    flat = _restore(step_dir, manifest, PREFIX, _targets(model, mesh))
    return param.unflatten(model, flat), step_dir


def _with_adapters(model: Decoder, step_dir: os.PathLike, mesh: Mesh | None) -> Decoder:
    """The model with the adapters of its checkpoint added to its weights, if it has any."""
    manifest = checkpoint.describe(step_dir)
    config = lora_config(manifest.about.get("lora"))
    if config is None:
        return model
    like = lora.abstract(config, model.config)
    flat = _restore(step_dir, manifest, f"{ADAPTERS}/", _targets(like, mesh))
    return jax.jit(lora.merge, donate_argnums=0)(model, param.unflatten(like, flat))


def _restore(
    step_dir: os.PathLike,
    manifest: checkpoint.Manifest,
    prefix: str,
    targets: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """The arrays whose stored names are `prefix` and a target's, in the targets' dtypes."""
    flat = {}
    for name, target in targets.items():
        stored_name = prefix + name
        entry = manifest.arrays.get(stored_name)
        if entry is None:
            raise ConversionError([f"{step_dir} lacks {stored_name}: copy it again"])
        # A restore changes no dtype, so that digests can be compared; cast after it.
        as_stored = jax.ShapeDtypeStruct(
            target.shape, np.dtype(entry.dtype), sharding=target.sharding
        )
        restored = checkpoint.restore(
            step_dir, (entry.item,), {stored_name: as_stored}, names=[stored_name]
        )
        flat[name] = restored[stored_name].astype(target.dtype)
    return flat


def _targets(model: Decoder | lora.Adapters, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    if mesh is not None:
        return param.flatten(param.abstract_with_shardings(model, mesh))
    first = SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=first)
        for name, leaf in param.flatten(model).items()
    }


def _check_same(path: os.PathLike, stored: ModelConfig, asked: ModelConfig) -> None:
    different = [
        f"ModelConfig.{field.name}={getattr(asked, field.name)!r}, but {path} has "
        f"{getattr(stored, field.name)!r}: the model must be the same"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in _FREE and getattr(asked, field.name) != getattr(stored, field.name)
    ]
    if different:
        raise ConversionError(different)
