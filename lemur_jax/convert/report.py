"""conversion.json: what a conversion says of its result, in formats that have no manifest.

The digests are those of our leaves (checkpoint.digest), in our layout and with the vocabulary
padded as stated: the same whatever the format, so that any two copies of a model can be compared
by them alone.
"""

import json
from pathlib import Path
from typing import Any

from lemur_jax.config import ModelConfig
from lemur_jax.convert.json_file import read_json
from lemur_jax.sharding import padded_vocab

REPORT = "conversion.json"
_VERSION = 1


def report_text(config: ModelConfig, leaves: dict[str, dict[str, Any]], about: dict) -> str:
    """The file's contents.

    Args:
      config: the model.
      leaves: {"shape", "dtype", "digest"} of each leaf.
      about: what else is worth knowing: source, flags, errors of a cast.
    """
    content = {
        "format_version": _VERSION,
        "vocabulary_rows": padded_vocab(config),
        "leaves": leaves,
        "about": about,
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def read_digests(directory: Path, config: ModelConfig) -> dict[str, str]:
    """The stated digest of each leaf, {} without a report or if it pads the vocabulary otherwise.

    Raises:
      ConversionError: the report is no JSON.
    """
    path = directory / REPORT
    if not path.is_file():
        return {}
    content = read_json(path)
    if content.get("format_version") != _VERSION:
        return {}
    if content.get("vocabulary_rows") != padded_vocab(config):
        return {}
    return {name: leaf["digest"] for name, leaf in content["leaves"].items()}
