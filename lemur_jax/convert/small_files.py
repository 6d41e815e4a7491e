"""Small files that travel with a model: tokenizer, generation settings, licence.

In a checkpoint of ours they are named tokenizer/... and hf/...; in every other format they lie
beside the weights.
"""

from pathlib import Path

TOKENIZER_DIR = "tokenizer"  # of the tokenizer's files in a checkpoint
HF_DIR = "hf"  # of other small files that came from an HF directory
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "chat_format.json",
    "vocab.json",
    "merges.txt",
)
GENERATION_CONFIG = "generation_config.json"
# Llama's licence asks that it travels with the weights.
_CARRIED = (GENERATION_CONFIG, "LICENSE*", "NOTICE*", "USE_POLICY*")


def hf_files(directory: Path) -> dict[str, bytes]:
    """The small files of a directory of any format but ours, by their names in ours."""
    files = {}
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            files[f"{TOKENIZER_DIR}/{name}"] = (directory / name).read_bytes()
    for pattern in _CARRIED:
        for path in sorted(directory.glob(pattern)):
            if path.is_file():
                files[f"{HF_DIR}/{path.name}"] = path.read_bytes()
    return files


def beside_weights(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same files as they lie beside weights: no directories."""
    found = {}
    for name, data in files.items():
        folder, _, rest = name.partition("/")
        if folder in (TOKENIZER_DIR, HF_DIR) and rest and "/" not in rest:
            found[rest] = data
    return found
