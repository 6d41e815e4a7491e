"""JSON files of other people's checkpoints."""

import json
from pathlib import Path
from typing import Any

from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.file_kind import check_file

_MAX_BYTES = 256 << 20  # the largest index known has some MB


def read_json(path: Path, why: str = "a Hugging Face directory must have it") -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ConversionError: no such file (and `why` it is needed), not JSON, or not an object.
    """
    try:
        check_file(path)
        if path.stat().st_size > _MAX_BYTES:
            raise ConversionError([f"{path} has {path.stat().st_size} bytes: that is no JSON file"])
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError([f"{path} does not exist: {why}"]) from None
    except (ValueError, RecursionError) as error:
        raise ConversionError([f"{path} is not JSON ({error}): copy it again"]) from error
    if not isinstance(content, dict):
        raise ConversionError([f"{path} holds a {type(content).__name__}, not an object"])
    return content


def json_text(content: dict[str, Any]) -> str:
    """As we write it: sorted, indented."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
