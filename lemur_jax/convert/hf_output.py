"""The small files of an exported directory: config, generation settings, tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lemur_jax.config import ModelConfig
from lemur_jax.convert.hf_config import config_to_hf
from lemur_jax.convert.json_file import json_text
from lemur_jax.convert.small_files import GENERATION_CONFIG, beside_weights
from lemur_jax.convert.vocabulary import END, PAD, stop_at, tokenizer_ids

_TOKEN_IDS = ("bos", "eos", "pad")


def write_small_files(
    directory: Path,
    config: ModelConfig,
    extras: Mapping[str, Any] | None,
    files: Mapping[str, bytes],
    weights: str,
) -> None:
    """Writes everything but weights.

    Args:
      directory: beside the weights.
      config: the model.
      extras: `hf_extras` of the source; None: the model never was a Hugging Face one.
      files: small files by their names in a checkpoint.
      weights: dtype of the written embedding table.

    Raises:
      ConversionError: transformers cannot hold the model.
    """
    extras = extras or {}
    for name, data in beside_weights(dict(files)).items():
        (directory / name).write_bytes(data)
    stated = None if extras.get("weights_dtype") == weights else weights
    written = config_to_hf(config, extras.get("config"), stated)
    ids = _tokenizer(directory, bool(extras))
    if not extras:
        written |= {f"{role}_token_id": ids.get(role) for role in _TOKEN_IDS}
    (directory / "config.json").write_text(json_text(written))
    if not (directory / GENERATION_CONFIG).exists():
        content = _generation_config(written)
        stop_at(content, tokenizer_ids(files, (END, PAD)))
        (directory / GENERATION_CONFIG).write_text(json_text(content))


def _tokenizer(directory: Path, has_extras: bool) -> dict[str, int | None]:
    """Completes the tokenizer's files; its special ids, {} without one or if config has them."""
    names = {path.name for path in directory.iterdir()}
    if not names & {"tokenizer.model", "tokenizer.json"}:
        return {}
    if "tokenizer.json" not in names and "tokenizer_config.json" not in names:
        # One that we trained. Imported late: conversion of weights needs no sentencepiece.
        from lemur_jax.data.tokenizer_files import write_hf_files

        write_hf_files(directory)
    if has_extras:
        return {}  # its config.json has the ids already
    from lemur_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(directory)
    return {role: getattr(tokenizer, f"{role}_id") for role in _TOKEN_IDS}


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    ids = {f"{role}_token_id": config.get(f"{role}_token_id") for role in _TOKEN_IDS}
    return {"_from_model_config": True} | {k: v for k, v in ids.items() if v is not None}
