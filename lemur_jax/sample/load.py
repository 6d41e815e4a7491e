"""From a path to what a sampler needs: model, tokenizer, and the ids that end a text.

Imports the checkpoint and converter libraries, so `Sampler.load` imports it late.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lemur_jax import checkpoint
from lemur_jax.config import ConfigError
from lemur_jax.convert import load as convert_load
from lemur_jax.convert import small_files
from lemur_jax.convert.json_file import read_json
from lemur_jax.convert.recognise import recognise
from lemur_jax.data.tokenizer import Tokenizer
from lemur_jax.model.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a path holds.

    Attributes:
      model: layers stacked, weights as stored.
      tokenizer: from the same directory, and checked to be the one that the model was trained with
        where the checkpoint says which that was.
      stop_ids: every EOS that generation_config.json or config.json names (Llama 3 has several).
    """

    model: Decoder
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]


def load(path: str | Path) -> Loaded:
    """Reads a run directory, a checkpoint or a Hugging Face directory.

    Raises:
      ConfigError: there is no tokenizer, or it is not the one that the model was trained with.
      ConversionError, CheckpointError: the path holds no model, or a damaged one.
    """
    model, directory = convert_load.load_model(path)
    if recognise(directory) == "hf":
        return Loaded(model, _tokenizer(directory, directory), _hf_stop_ids(directory))
    about = checkpoint.describe(directory).about
    tokenizer = _tokenizer(directory / small_files.TOKENIZER_DIR, directory)
    trained_with = about.get("tokenizer_fingerprint")
    if trained_with not in (None, tokenizer.fingerprint):
        raise ConfigError(
            [
                f"tokenizer in {directory / small_files.TOKENIZER_DIR} has the fingerprint "
                f"{tokenizer.fingerprint[:16]}, but the model was trained with "
                f"{trained_with[:16]}: put the files of the training's tokenizer back"
            ]
        )
    source = (about.get("hf_extras") or {}).get("config") or {}
    generation = _json(directory / small_files.HF_DIR / small_files.GENERATION_CONFIG)
    return Loaded(model, tokenizer, _eos(generation) or _eos(source))


def _tokenizer(directory: Path, model_directory: Path) -> Tokenizer:
    try:
        return Tokenizer.load(directory)
    except ConfigError as error:
        raise ConfigError(
            [f"no tokenizer for the model in {model_directory}: {p}" for p in error.problems]
        ) from error


def _hf_stop_ids(directory: Path) -> tuple[int, ...]:
    config = read_json(directory / "config.json")
    return _eos(_json(directory / small_files.GENERATION_CONFIG)) or _eos(config)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _eos(config: dict[str, Any]) -> tuple[int, ...]:
    """`eos_token_id`, which HF writes as a number, a list or null."""
    stated = config.get("eos_token_id")
    if stated is None:
        return ()
    return tuple(stated) if isinstance(stated, list) else (stated,)
