"""The settings of a conversion."""

from dataclasses import dataclass

from lemur_jax.config import MeshConfig
from lemur_jax.convert.cast import check_dtype
from lemur_jax.convert.errors import ConversionError

FORMATS = ("hf", "lemur", "easylm")
_DEFAULT_MAX_RAM = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to convert.

    Attributes:
      to: one of FORMATS.
      dtype: of the written weights; None keeps each weight's own.
      max_ram: bytes of resident memory that the process may reach.
      max_shard_bytes: of one safetensors file; None: 5 GB, transformers' habit.
      mesh: chunks of a checkpoint are what a device of this mesh holds; None: layers.
      add_tokens: behind those of the tokenizer.
      vocab_size: rows of the result; None: as they are, or as the new tokens need.
      new_rows: "mean" or "zeros"; None: mean.
      max_positions: of Meta's format, which does not say it.
      base: the model under PEFT's adapters; None: the one that they name.
      process, processes: this process, from 0, and how many share the work.
      timeout_seconds: for which processes wait for one another without seeing progress.
    """

    to: str
    dtype: str | None = None
    max_ram: int = _DEFAULT_MAX_RAM
    max_shard_bytes: int | None = None
    mesh: MeshConfig | None = None
    add_tokens: tuple[str, ...] = ()
    vocab_size: int | None = None
    new_rows: str | None = None
    max_positions: int | None = None
    base: str | None = None
    process: int = 0
    processes: int = 1
    timeout_seconds: float = 1200

    def __post_init__(self):
        check_dtype(self.dtype)
        problems = []
        if self.to not in FORMATS:
            problems.append(f"--to={self.to} is unknown; legal: {', '.join(FORMATS)}")
        if self.max_shard_bytes is not None and self.max_shard_bytes < 1:
            problems.append(f"--max_shard_bytes={self.max_shard_bytes} must be positive")
        if self.max_shard_bytes is not None and self.to != "hf":
            problems.append(
                f"--max_shard_bytes is of --to=hf; --to={self.to} has no shards: leave it out"
            )
        if self.new_rows is not None and not self.add_tokens and self.vocab_size is None:
            problems.append("--new_rows says what new rows hold: give --add_tokens or --vocab_size")
        for name in ("vocab_size", "max_positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"--{name}={value} must be positive; leave it out to keep what is")
        if not 0 <= self.process < self.processes:
            problems.append(
                f"--process={self.process} must be from 0 to --processes={self.processes} less 1"
            )
        if self.mesh is not None and self.to != "lemur":
            problems.append(f"--mesh is of checkpoints of ours, not of --to={self.to}")
        if problems:
            raise ConversionError(problems)
