"""A model that cannot be opened: which tensors are in what is missing or cut short.

Reads headers only and trusts nothing in them: whatever is odd is left to the reader's own error.
"""

import json
from pathlib import Path
from typing import Any

from lemur_jax.convert import safetensors, tables
from lemur_jax.convert.errors import first_few
from lemur_jax.convert.file_kind import is_pointer, other_kind
from lemur_jax.convert.hf_config import config_from_hf
from lemur_jax.convert.torch_file import is_cut_zip

_SHOWN = 4
_INDEXES = (safetensors.INDEX, "pytorch_model.bin.index.json")
# Whatever reading a damaged header or index raises.
_ODD = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)
_ODD += (OverflowError, RecursionError)


def lost_tensors(path: str | Path) -> list[str]:
    """A line for each weight file of a Hugging Face directory that is not there, or not whole."""
    directory = Path(path)
    held: dict[str, list[str]] = {safetensors.SINGLE: []}
    for index in _INDEXES:
        try:
            weight_map = _json(directory / index)["weight_map"]
            for name, file in weight_map.items():
                held.setdefault(str(file), []).append(str(name))
        except _ODD:
            continue
    lost = []
    for file, names in sorted(held.items()):
        if Path(file).name != file:
            continue
        if other_kind(directory / file) is not None:
            continue  # the reader has said what it is
        if (directory / file).is_file():
            lost += _cut_short(directory / file, names)
        elif names:
            lost.append(f"{file} is missing; it held {_listed(names)}: download it again")
    return lost + _transposed(directory)


def _json(path: Path) -> Any:
    """Raises one of _ODD. A pipe is not opened: it would wait."""
    if other_kind(path) is not None:
        raise ValueError(f"{path} is no file")
    return json.loads(path.read_text())


def _transposed(directory: Path) -> list[str]:
    """Tensors whose shape is that of the config, backwards."""
    try:
        config = config_from_hf(_json(directory / "config.json"))
        files = [path for path in directory.glob("*.safetensors") if path.is_file()]
        headers = [safetensors.read_header(path) for path in files]
    except _ODD:  # the reader has said it; its ConversionError is a ValueError
        return []
    shapes = {name: tensor.shape for header in headers for name, tensor in header.items()}
    if config.layers > len(shapes):  # the names of a million layers take memory
        return []
    transposed = [
        f"{name} is stored transposed: {list(shapes[name])}, not {list(shape)}: transpose it"
        for rule in tables.hf_llama(config)
        for name in rule.source_names(config)
        if (shape := rule.their_shape(config)) != shapes.get(name) == shape[::-1]
    ]
    return first_few(transposed, "tensors")


def _cut_short(path: Path, listed: list[str]) -> list[str]:
    size = path.stat().st_size
    try:
        if is_pointer(path):
            return []
        if path.suffix == ".bin":
            if not listed or not is_cut_zip(path):
                return []
            return [f"{path.name} is cut short; by the index it holds {_listed(listed)}"]
        if path.suffix != ".safetensors":
            return []
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, 100_000_000):
                return [f"{path.name} ends inside its header: none of its tensors can be read"]
            header = json.loads(file.read(length))
        ends = {
            name: 8 + length + int(entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except _ODD:
        return []
    names = [name for name, end in ends.items() if end > size]
    if not names:
        return []
    return [f"{path.name} is cut short at byte {size}; not whole: {_listed(names)}: copy it again"]


def _listed(names: list[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
