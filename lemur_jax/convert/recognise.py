"""What a path is, by what it contains."""

import os
from pathlib import Path

from lemur_jax import checkpoint
from lemur_jax.convert import easylm
from lemur_jax.convert.errors import ConversionError

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's


def recognise(path: str | Path) -> str:
    """Says "hf", "meta", "easylm", "peft" or "lemur", by what a path contains.

    A path with a scheme (gs://) is taken for ours: other formats are read from local disks only.

    Raises:
      ConversionError: neither; lists what was looked for and what is there.
    """
    if "://" in str(path):
        return "lemur"
    path = Path(path)
    if path.is_file() and any(path.match(pattern) for pattern in easylm.PATTERNS):
        return "easylm"
    if not path.is_dir():
        raise ConversionError(
            [f"{path} is not a directory: give a run, checkpoint or HF directory"]
        )
    if (path / checkpoint.MANIFEST).is_file() or (path / checkpoint.CHECKPOINTS).is_dir():
        return "lemur"
    if checkpoint.complete_steps(path):
        return "lemur"
    if easylm.streams(path):
        return "easylm"
    if any(path.glob("consolidated.*.pth")) and not any(path.glob("model*.safetensors")):
        return "meta"
    if (path / ADAPTER_CONFIG).is_file() and not any(path.glob("model*.safetensors")):
        return "peft"
    if (path / "config.json").is_file() or any(path.glob("model*.safetensors")):
        return "hf"
    there = sorted(child.name for child in path.iterdir())
    raise ConversionError(
        [
            f"{path} is neither a checkpoint of ours (looked for {checkpoint.MANIFEST}, "
            f"{checkpoint.CHECKPOINTS}/, <step>/{checkpoint.MANIFEST}) nor a Hugging Face "
            f"directory (looked for config.json, {ADAPTER_CONFIG}), nor Meta's "
            f"(consolidated.*.pth) or EasyLM's ({easylm.STREAM}); it holds "
            f"{', '.join(there[:12]) or 'nothing'}"
        ]
    )


def step_directory(path: str | Path) -> os.PathLike:
    """The checkpoint meant by a run, a checkpoints directory or a step, absolute as Orbax wants it.

    Raises:
      CheckpointError: there is none; says what is there instead.
    """
    if "://" in str(path):
        return checkpoint.resolve(path)
    return Path(checkpoint.resolve(os.path.abspath(path)))
