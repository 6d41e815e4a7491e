"""A Hugging Face Llama directory, opened: config, and every weight of ours on demand.

Opening reads config.json and the headers of the safetensors files and checks all of it; no weight
is read before it is asked for, and then only its own bytes.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert import safetensors, tables
from lemur_jax.convert.cast import cast, check_dtype
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.hf_config import config_from_hf, stated_dtype
from lemur_jax.convert.rules import Rule, Shape, Source, check_complete
from lemur_jax.model import param, rope
from lemur_jax.model.decoder import abstract

_FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class HFModel:
    """An HF directory that has passed every check.

    Attributes:
      directory: where it lies.
      config: the model; `param_dtype` is the dtype of the stored weights.
      source: config.json as it is.
      rules: the table for this config, by our flat name.
      tensors: (file, tensor) by their name.
      dtypes: of each of our leaves.
      tied_head: whether a tied model also stores lm_head.weight (equal to the table).
    """

    directory: Path
    config: ModelConfig
    source: dict[str, Any]
    rules: dict[str, Rule]
    tensors: dict[str, tuple[Path, safetensors.Tensor]]
    dtypes: dict[str, np.dtype]
    tied_head: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Our flat names, e.g. "table", "layers/wq"."""
        return tuple(self.rules)

    def shape(self, name: str) -> Shape:
        """Shape of a leaf: layers stacked in front, vocabulary padded."""
        return self.rules[name].our_shape(self.config)

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """A leaf in our layout, or one layer of it; vocabulary padded with zeros.

        Args:
          name: one of `names`.
          layer: of a leaf under layers/; None reads all of them, stacked.
        """
        rule = self.rules[name]
        if not rule.stacked:
            return self._one(rule, rule.theirs)
        sources = rule.source_names(self.config)
        if layer is not None:
            return self._one(rule, sources[layer])
        result = np.empty(self.shape(name), self.dtypes[name])
        for index, source in enumerate(sources):
            result[index] = self._one(rule, source)
        return result

    def _one(self, rule: Rule, source: str) -> np.ndarray:
        array = cast(safetensors.read(*self.tensors[source]), self.dtypes[rule.ours], source)
        return rule.to_ours(array, self.config)


def open_hf(directory: str | Path, *, dtype: str | None = None) -> HFModel:
    """Opens an HF directory with safetensors weights.

    Args:
      directory: holds config.json and model.safetensors, or shards and their index.
      dtype: cast every weight to this as it is read; None keeps the dtype that is stored.

    Raises:
      ConversionError: everything that is wrong with config, files, names, shapes and dtypes.
    """
    check_dtype(dtype)
    directory = Path(directory)
    source = read_json(directory / "config.json")
    config = config_from_hf(source)
    found = _headers(directory)
    table = tables.hf_llama(config)
    leaves = {name: leaf.shape for name, leaf in param.flatten(abstract(config)).items()}

    buffers, tied_head, rest = [], [], []
    for path, tensor in found:
        if tensor.name.endswith(tables.HF_INVERSE_FREQUENCIES):
            buffers.append((path, tensor))
        elif config.tie_embeddings and tensor.name == tables.HF_TIED_HEAD.theirs:
            tied_head.append((path, tensor))
        else:
            rest.append((path, tensor))
    check_complete(table, config, leaves, [Source(t.name, t.shape, p.name) for p, t in rest])
    tensors = {tensor.name: (path, tensor) for path, tensor in rest}
    dtypes = _leaf_dtypes(table, config, tensors, dtype)
    for path, tensor in buffers:
        _check_inverse_frequencies(path, tensor, config)
    for path, tensor in tied_head:
        _check_tied_head(path, tensor, *tensors[tables.HF_TIED_HEAD_OF])

    weights = dtypes["table"].name
    computes = dtype or stated_dtype(source) or weights
    config = replace(config, dtype=computes, param_dtype=weights)
    rules = {rule.ours: rule for rule in table}
    return HFModel(directory, config, source, rules, tensors, dtypes, bool(tied_head))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ConversionError: no such file, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(
            [f"{path} does not exist: a Hugging Face directory must have it"]
        ) from None
    except ValueError as error:
        raise ConversionError([f"{path} is not JSON ({error}): copy it again"]) from error
    if not isinstance(content, dict):
        raise ConversionError([f"{path} holds a {type(content).__name__}, not an object"])
    return content


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def _headers(directory: Path) -> list[tuple[Path, safetensors.Tensor]]:
    """Every tensor of every weight file. One that lies in two files is listed twice."""
    single, index = directory / safetensors.SINGLE, directory / safetensors.INDEX
    if single.is_file() and index.is_file():
        raise ConversionError(
            [f"{directory} has both {single.name} and {index.name}: remove the one that is old"]
        )
    if single.is_file():
        return [(single, tensor) for tensor in safetensors.read_header(single).values()]
    if not index.is_file():
        raise ConversionError([_no_weights(directory)])
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError([f"{index} has no weight_map: copy it again"])
    shards = sorted(set(weight_map.values()))
    problems = [
        f"{index.name} names {shard!r} as a shard, which is no plain file name: copy it again"
        for shard in shards
        if Path(shard).name != shard
    ]
    problems += [
        f"{index.name} names shard {shard!r}, which is not in {directory}: download it"
        for shard in shards
        if not (directory / shard).is_file()
    ]
    problems += [
        f"shard {path.name!r} is in {directory} but not in {index.name}: it belongs to another "
        "download; remove it, or copy the index again"
        for path in sorted(directory.glob("model-*.safetensors"))
        if path.name not in shards
    ]
    if problems:
        raise ConversionError(problems)
    found = []
    for shard in shards:
        try:
            header = safetensors.read_header(directory / shard)
        except ConversionError as error:
            problems += error.problems
            continue
        found += [(directory / shard, tensor) for tensor in header.values()]
        problems += [
            f"{index.name} says that {name!r} is in {shard}, but it is not: copy both again"
            for name, where in weight_map.items()
            if where == shard and name not in header
        ]
        problems += [
            f"{name!r} is in {shard} but not in {index.name}: copy both again"
            for name in header
            if name not in weight_map
        ]
    if problems:
        raise ConversionError(problems)
    return found


def _no_weights(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    other = [n for n in names if re.fullmatch(r"pytorch_model.*\.bin|.*\.pth|.*\.msgpack", n)]
    wanted = f"{safetensors.SINGLE} or {safetensors.INDEX}"
    if other:
        return (
            f"{directory} has no {wanted}, only {', '.join(other[:4])}: safetensors is needed. "
            "Convert once with transformers: LlamaForCausalLM.from_pretrained(DIR)"
            ".save_pretrained(NEW_DIR)"
        )
    return f"{directory} has no {wanted}; it has {', '.join(names[:12]) or 'nothing'}"


# ---------------------------------------------------------------------------------------------
# What names and shapes do not show
# ---------------------------------------------------------------------------------------------


def _leaf_dtypes(table, config, tensors, dtype) -> dict[str, np.dtype]:
    problems, dtypes = [], {}
    for rule in table:
        by_dtype: dict[str, list[str]] = {}
        for name in rule.source_names(config):
            by_dtype.setdefault(tensors[name][1].dtype.name, []).append(name)
        for found, names in by_dtype.items():
            if found not in _FLOATS and (found != "float64" or dtype is None):
                fix = "give dtype=" if found == "float64" else "use unquantised weights"
                problems.append(f"{names[0]!r} has dtype {found}, which is not supported: {fix}")
        if len(by_dtype) > 1 and dtype is None:
            shown = ", ".join(f"{names[0]!r} {found}" for found, names in by_dtype.items())
            problems.append(
                f"{rule.ours!r} stacks layers of different dtypes ({shown}): give dtype="
            )
        if by_dtype:
            dtypes[rule.ours] = safetensors.numpy_dtype(dtype or next(iter(by_dtype)))
    if problems:
        raise ConversionError(problems)
    return dtypes


def _check_inverse_frequencies(path: Path, tensor: safetensors.Tensor, config: ModelConfig):
    """The buffer holds the plain frequencies (old checkpoints scale later) or the scaled ones."""
    found = safetensors.read(path, tensor).astype(np.float64)
    # Relative rounding of the dtype in which the whole model was saved, and some for pow().
    tolerance = {"float16": 2e-3, "bfloat16": 1e-2}.get(tensor.dtype.name, 1e-5)
    plain = replace(config.rope, kind="default", factor=1.0)
    for rotary in (plain, config.rope):
        expected, _ = rope.frequencies(rotary, config.head_dim)
        # float16 cannot hold the smallest frequencies: an absolute term for its subnormals.
        if found.shape == expected.shape and np.allclose(
            found, expected, rtol=tolerance, atol=6e-8
        ):
            return
    raise ConversionError(
        [
            f"buffer {tensor.name!r} in {path.name} is not what config.json implies "
            f"(rope_theta={config.rope.theta}, head_dim={config.head_dim}): correct the config, "
            "or remove the buffer if it is known to be stale"
        ]
    )


def _check_tied_head(path: Path, head: safetensors.Tensor, table_path: Path, table) -> None:
    same = head.shape == table.shape and head.dtype == table.dtype
    if same:
        bits = f"u{head.dtype.itemsize}"
        a, b = safetensors.read(path, head), safetensors.read(table_path, table)
        same = np.array_equal(a.view(bits), b.view(bits))
    if not same:
        raise ConversionError(
            [
                f"tie_word_embeddings=True, but {head.name!r} in {path.name} differs from "
                f"{table.name!r}: set tie_word_embeddings to false in config.json to use both, "
                f"or remove {head.name!r}"
            ]
        )
