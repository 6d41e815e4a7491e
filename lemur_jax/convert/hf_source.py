"""A Hugging Face Llama directory as a Source: safetensors, or PyTorch's .bin files.

Opening reads config.json and the headers of the weight files and checks all of it; no weight is
read before it is asked for, and then only its own bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lemur_jax.convert import report, safetensors, tables, torch_file
from lemur_jax.convert.errors import ConversionError, first_few
from lemur_jax.convert.file_kind import other_kind
from lemur_jax.convert.found import Dictated, table_source
from lemur_jax.convert.hf_config import config_from_hf
from lemur_jax.convert.json_file import read_json
from lemur_jax.convert.model import TableSource
from lemur_jax.convert.small_files import hf_files
from lemur_jax.convert.stored import StoredTensor


@dataclass(frozen=True)
class _Kind:
    """How one kind of weight files is named and read."""

    format: str
    single: str
    index: str
    shards: str
    headers: Callable[[Path], dict[str, StoredTensor]]


_KINDS = (
    _Kind(
        "hf", safetensors.SINGLE, safetensors.INDEX, "model-*.safetensors", safetensors.read_header
    ),
    _Kind(
        "bin",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model-*.bin",
        torch_file.read_tensors,
    ),
)


def open_hf(
    directory: str | Path, *, dtype: str | None = None, mixed: str | None = None
) -> TableSource:
    """Opens an HF directory. Safetensors are taken where there are both.

    Args:
      directory: holds config.json and model.safetensors, or shards and their index, or the same
        as pytorch_model.bin.
      dtype: cast every weight to this as it is read; None keeps the dtype that is stored.
      mixed: see `model.open_source`.

    Raises:
      ConversionError: everything that is wrong with config, files, names, shapes and dtypes.
    """
    directory = Path(directory)
    source = read_json(directory / "config.json")
    config = config_from_hf(source)
    kind = next((k for k in _KINDS if _has(directory, k)), None)
    if kind is None:
        raise ConversionError([_no_weights(directory)])
    return table_source(
        directory,
        kind.format,
        config,
        tables.hf_llama(config),
        _headers(directory, kind),
        dtype=dtype,
        mixed=mixed,
        dictated=Dictated(
            tables.HF_INVERSE_FREQUENCIES, tables.HF_TIED_HEAD.theirs, tables.HF_TIED_HEAD_OF
        ),
        source=source,
        carried=lambda: hf_files(directory),
        stated=lambda found: report.read_digests(directory, found),
    )


def _has(directory: Path, kind: _Kind) -> bool:
    return any((directory / name).is_file() for name in (kind.single, kind.index))


def _headers(directory: Path, kind: _Kind) -> list[StoredTensor]:
    """Every tensor of every weight file. One that lies in two files is listed twice."""
    single, index = directory / kind.single, directory / kind.index
    if single.is_file() and index.is_file():
        raise ConversionError(
            [f"{directory} has both {single.name} and {index.name}: remove the one that is old"]
        )
    if single.is_file():
        return list(kind.headers(single).values())
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError([f"{index} has no weight_map: copy it again"])
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ConversionError([f"{index} has a weight_map to other things than file names"])
    shards = sorted(set(weight_map.values()))
    problems = [
        f"{index.name} names {shard!r} as a shard, which is no plain file name: copy it again"
        for shard in shards
        if Path(shard).name != shard
    ]
    problems += [
        f"{index.name} names shard {shard!r}, which is {other}, not a regular file: put the file "
        "itself there"
        for shard in shards
        if Path(shard).name == shard and (other := other_kind(directory / shard)) is not None
    ]
    problems += [
        f"{index.name} names shard {shard!r}, which is not in {directory}: download it"
        for shard in shards
        if Path(shard).name == shard and _is_missing(directory / shard)
    ]
    problems = first_few(problems, "shards")
    # An index with wrong names says nothing about which shards are of another download.
    problems = problems or [
        f"shard {path.name!r} is in {directory} but not in {index.name}: it belongs to another "
        "download; remove it, or copy the index again"
        for path in sorted(directory.glob(kind.shards))
        if path.name not in shards
    ]
    if problems:
        raise ConversionError(problems)
    found = []
    for shard in shards:
        try:
            header = kind.headers(directory / shard)
        except ConversionError as error:
            problems += error.problems
            continue
        found += header.values()
        problems += first_few(
            [
                f"{index.name} says that {name!r} is in {shard}, but it is not: copy both again"
                for name, where in weight_map.items()
                if where == shard and name not in header
            ],
            "tensors",
        )
        problems += first_few(
            [
                f"{name!r} is in {shard} but not in {index.name}: copy both again"
                for name in header
                if name not in weight_map and not name.endswith(tables.HF_INVERSE_FREQUENCIES)
            ],
            "tensors",
        )
    if problems:
        raise ConversionError(problems)
    return found


def _is_missing(path: Path) -> bool:
    return other_kind(path) is None and not path.is_file()


def _no_weights(directory: Path) -> str:
    for kind in _KINDS:
        for name in (kind.single, kind.index):
            path = directory / name
            if (what := other_kind(path)) is not None:
                return f"{path} is {what}, not a regular file: put the file itself there"
    names = sorted(path.name for path in directory.iterdir())
    wanted = " or ".join(name for kind in _KINDS for name in (kind.single, kind.index))
    return f"{directory} has no {wanted}; it has {', '.join(names[:12]) or 'nothing'}"
