"""What a path is, by what it contains."""

from pathlib import Path

from lemur_jax import checkpoint
from lemur_jax.convert.errors import ConversionError


def recognise(path: str | Path) -> str:
    """Says "hf" or "lemur", by what a directory contains.

    Raises:
      ConversionError: neither; lists what was looked for and what is there.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConversionError(
            [f"{path} is not a directory: give a run, checkpoint or HF directory"]
        )
    if (path / checkpoint.MANIFEST).is_file() or (path / checkpoint.CHECKPOINTS).is_dir():
        return "lemur"
    if checkpoint.complete_steps(path):
        return "lemur"
    if (path / "config.json").is_file():
        return "hf"
    there = sorted(child.name for child in path.iterdir())
    raise ConversionError(
        [
            f"{path} is neither a checkpoint of ours (looked for {checkpoint.MANIFEST}, "
            f"{checkpoint.CHECKPOINTS}/, <step>/{checkpoint.MANIFEST}) nor a Hugging Face "
            f"directory (looked for config.json); it holds {', '.join(there[:12]) or 'nothing'}"
        ]
    )
