"""EasyLM's streaming msgpack as a Source. The stream holds weights alone: its config must lie
beside it as a config.json in Hugging Face's terms (EasyLM's own is a pickle)."""

from pathlib import Path

from lemur_jax.config import ModelConfig
from lemur_jax.convert import msgpack_stream, tables
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.file_kind import check_file
from lemur_jax.convert.found import Dictated, table_source
from lemur_jax.convert.hf_config import config_from_hf
from lemur_jax.convert.json_file import read_json
from lemur_jax.convert.model import TableSource
from lemur_jax.convert.rules import Rule
from lemur_jax.convert.small_files import hf_files
from lemur_jax.convert.stored import StoredTensor

STREAM = "streaming_params"  # as EasyLM's trainer names it
PATTERNS = ("streaming_params*", "streaming_train_state*", "*.stream", "*.msgpack")


def streams(directory: Path) -> list[Path]:
    """The files of a directory that look like EasyLM's."""
    return sorted({path for pattern in PATTERNS for path in directory.glob(pattern)})


def open_easylm(
    path: str | Path, *, dtype: str | None = None, mixed: str | None = None
) -> TableSource:
    """Opens a stream, or a directory with one stream.

    Args:
      path: the file or its directory; a config.json and tokenizer files lie beside it.
      dtype: cast every weight to this as it is read; None keeps the stored dtype.
      mixed: see `model.open_source`.

    Raises:
      ConversionError: everything that is wrong with config, stream, names, shapes and dtypes.
    """
    path = Path(path)
    if path.is_dir():
        found = streams(path)
        if len(found) != 1:
            shown = ", ".join(file.name for file in found)
            raise ConversionError([f"{path} has several streams ({shown}): give one of them"])
        path = found[0]
    check_file(path)
    why = (
        "EasyLM's stream does not say which model it holds: put the config.json of the same "
        "model in Hugging Face's format beside it"
    )
    source = read_json(path.parent / "config.json", why)
    config = config_from_hf(source)
    return table_source(
        path,
        "easylm",
        config,
        rules(config),
        _parameters(path),
        dtype=dtype,
        mixed=mixed,
        dictated=Dictated(None, None, None),
        source=source,
        carried=lambda: hf_files(path.parent),
    )


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The table for this config.

    Raises:
      ConversionError: EasyLM has no such model.
    """
    problems = [
        f"EasyLM's Llama has no {what}: convert to another format"
        for what, there in (
            ("tied embeddings", config.tie_embeddings),
            ("attention_bias", config.attention_bias),
            ("mlp_bias", config.mlp_bias),
            (
                f"head_dim={config.head_dim} other than hidden_size / num_attention_heads",
                config.head_dim * config.heads != config.embed,
            ),
            (f"RoPE scaling ({config.rope.kind})", config.rope.kind != "default"),
        )
        if there
    ]
    if problems:
        raise ConversionError(problems)
    return tables.EASYLM


def _parameters(path: Path) -> list[StoredTensor]:
    """Weights of the model, by their path below `params`; optimizer state is left where it is."""
    found, problems = [], []
    for key, tensor in msgpack_stream.read_tensors(path).items():
        if key[0] in ("opt_state", "step"):
            continue
        while key and key[0] == "params":
            key = key[1:]
        if tensor is None:
            problems.append(f"{path}: {'/'.join(key)!r} is not an array")
            continue
        name = "/".join(key)
        found.append(StoredTensor(path, name, tensor.shape, tensor.dtype, tensor.extents))
    if problems:
        raise ConversionError(problems)
    return found
