"""PEFT's adapter directories, both ways: adapter_config.json and adapter_model.safetensors.

PEFT names a pair by the module it adapts, base_model.model.model.layers.0.self_attn.q_proj, and
holds lora_A.weight [R, in] and lora_B.weight [out, R] as torch's Linear does. Ours are A [in..., R]
and B [R, out...] with heads split as in convert/tables.py, whose names and patterns are used here.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lemur_jax.config import LORA_TARGETS, ConfigError, LoraConfig, ModelConfig
from lemur_jax.convert import safetensors, tables, torch_file
from lemur_jax.convert.adapted import Adapted, adapted_in
from lemur_jax.convert.destination import check_new, partial_of, put_in_place
from lemur_jax.convert.disk import DiskFile
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.json_file import json_text, read_json
from lemur_jax.convert.model import Source
from lemur_jax.convert.ours import OurSource
from lemur_jax.convert.rules import Rule
from lemur_jax.convert.small_files import beside_weights
from lemur_jax.convert.stored import Region, StoredTensor, whole
from lemur_jax.convert.wrapped import origin
from lemur_jax.model import lora

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_BAND_BYTES = 16 << 20
_RULES = {rule.ours.removeprefix("layers/"): rule for rule in tables.HF_LLAMA}

# What else adapter_config.json may say without changing what the adapters compute.
_HARMLESS = {
    *("peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "bias", "auto_mapping"),
    *("base_model_name_or_path", "task_type", "inference_mode", "init_lora_weights", "revision"),
    *("peft_version", "layers_pattern", "loftq_config", "eva_config", "corda_config"),
    *("qalora_group_size", "megatron_core", "runtime_config", "ensure_weight_tying"),
    *("arrow_config", "lora_ga_config"),
}
# PEFT's modules_to_save -> our leaf and how it is theirs.
_WHOLE = {
    name: next(rule for rule in tables.HF_LLAMA if rule.ours == ours)
    for name, ours in (("embed_tokens", "table"), ("lm_head", "head"))
}


def names(target: str, layer: int) -> tuple[str, str]:
    """PEFT's names of A and B of a weight."""
    module = _PREFIX + _RULES[target].theirs.format(layer).removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def shapes(target: str, rank: int, model: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """PEFT's shapes of A and B of a weight."""
    out, into = _RULES[target].their_shape(model)
    return (rank, into), (out, rank)


def _to_theirs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rank = b.shape[0]
    return a.reshape(-1, rank).T, b.reshape(rank, -1).T


def _to_ours(
    a: np.ndarray, b: np.ndarray, target: str, model: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    shape, rank = _RULES[target].our_shape(model)[1:], len(a)
    inputs = lora.INPUT_DIMENSIONS.get(target, 1)
    return a.T.reshape(*shape[:inputs], rank), b.T.reshape(rank, *shape[inputs:])


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def base_of(directory: str | Path) -> str:
    """The local model that the adapters say they belong to.

    Raises:
      ConversionError: it is not on this machine.
    """
    named = read_json(Path(directory) / CONFIG).get("base_model_name_or_path") or ""
    for path in (Path(named), Path(directory) / named):
        if named and path.is_dir():
            return str(path)
    raise ConversionError(
        [
            f"{directory} are adapters of {named or 'a model that they do not name'}, which is no "
            f"directory here: `lemur convert {directory} OUT --base=MODEL` makes one model of both"
        ]
    )


def open_peft(directory: str | Path, base: Source) -> Adapted:
    """The adapters of a PEFT directory on their base.

    Raises:
      ConversionError: everything that is wrong with config, names and shapes.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    _check_config(directory / CONFIG, config)
    tensors = _tensors(directory)
    found = _adapters(directory, config, tensors)
    _check_tensors(directory, found, tensors, base.config)

    def pair(target: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        a, b = (tensors[name].read() for name in names(target, layer))
        return _to_ours(a, b, target, base.config)

    def whole_leaf(name: str, region: Region) -> np.ndarray:
        rule = next(rule for rule in _WHOLE.values() if rule.ours == name)
        part = rule.part(region, base.config)
        return part.to_ours(tensors[_PREFIX + rule.theirs].read(part.theirs))

    return Adapted(base, found, pair, whole_leaf, str(directory))


def _tensors(directory: Path) -> dict[str, StoredTensor]:
    if (directory / WEIGHTS).is_file():
        return safetensors.read_header(directory / WEIGHTS)
    if (directory / _PICKLED).is_file():
        return torch_file.read_tensors(directory / _PICKLED)
    raise ConversionError([f"{directory} has {CONFIG}, but neither {WEIGHTS} nor {_PICKLED}"])


def _check_config(path: Path, config: dict[str, Any]) -> None:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"{path}: peft_type={config.get('peft_type')!r}; only 'LORA' is read")
    if config.get("bias", "none") != "none":
        problems.append(f"{path}: bias={config['bias']!r}; only adapters with bias='none' are read")
    saved = config.get("modules_to_save")
    if saved and set(saved) != set(_WHOLE):
        problems.append(
            f"{path}: modules_to_save={saved!r}; only {', '.join(_WHOLE)}, both, are read"
        )
    problems += [
        f"{path}: {name}={value!r} changes what the adapters compute and is not supported: "
        "merge them with PEFT (merge_and_unload) and convert the result"
        for name, value in sorted(config.items())
        if value and name not in (*_HARMLESS, "modules_to_save")
    ]
    if problems:
        raise ConversionError(problems)


def _adapters(
    directory: Path, config: dict[str, Any], tensors: Mapping[str, StoredTensor]
) -> LoraConfig:
    """Which weights are adapted is read from the tensors: target_modules may be a pattern."""
    modules = {m[1] for name in tensors if (m := re.search(r"\.(\w+)\.lora_[AB]\.", name))}
    targets = tuple(ours for ours, theirs in LORA_TARGETS.items() if theirs in modules)
    try:
        rank, alpha = config.get("r"), config.get("lora_alpha")
        whole = bool(config.get("modules_to_save"))
        return LoraConfig(rank=rank, alpha=alpha, targets=targets, embeddings=whole)
    except ConfigError as error:
        raise ConversionError([f"{directory}: {p}" for p in error.problems]) from error


def _check_tensors(
    directory: Path, found: LoraConfig, tensors: Mapping[str, StoredTensor], model: ModelConfig
) -> None:
    expected = {
        name: shape
        for target in found.targets
        for layer in range(model.layers)
        for name, shape in zip(names(target, layer), shapes(target, found.rank, model))
    }
    if found.embeddings:
        for rule in _WHOLE.values():
            expected[_PREFIX + rule.theirs] = rule.their_shape(model)
    problems = [
        f"{directory} lacks {name}: every layer of the base must have the adapters of the others"
        for name in expected
        if name not in tensors
    ]
    problems += [
        f"{directory} holds {name}, which is no adapter of a matrix of the base's layers"
        for name in tensors
        if name not in expected
    ]
    problems += [
        f"{directory}: {name} is {list(tensors[name].shape)}, the base's needs {list(shape)}: "
        "they are of another model"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise ConversionError(problems)


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def export_peft(source: Source, destination: str | Path, base: str | None = None) -> Path:
    """Writes the adapters of a model as a directory that PEFT loads; returns it.

    Holds those of one layer at a time. The tokenizer's files are put beside them.

    Args:
      source: of a run with LoRA.
      destination: must not exist or be empty; local.
      base: what adapter_config.json calls the base model; None: the run's `init_from`.

    Raises:
      ConversionError: the source has no adapters, or `destination` holds something.
    """
    adapted = adapted_in(source)
    if adapted is None:
        raise ConversionError(
            [f"{source.path} has no adapters: --to=peft needs a run with TrainConfig.lora"]
        )
    if adapted.adapters.embeddings and adapted.config.tie_embeddings:
        raise ConversionError(
            [
                f"{source.path} trains a table that is its head too (tie_embeddings), which PEFT's "
                "files do not say: export the merged model, --to=hf"
            ]
        )
    check_new(destination)
    partial = Path(partial_of(Path(destination)))
    partial.mkdir(parents=True, exist_ok=True)
    _write_weights(partial, adapted)
    below = origin(source)
    if base is None and isinstance(below, OurSource):
        base = below.manifest.about.get("lora_base")
    (partial / CONFIG).write_text(json_text(_config(adapted.adapters, base)))
    for name, data in beside_weights(source.files()).items():
        (partial / name).write_bytes(data)
    put_in_place(partial, Path(destination))
    return Path(destination)


def _config(adapters: LoraConfig, base: str | None) -> dict[str, Any]:
    alpha = int(adapters.alpha) if float(adapters.alpha).is_integer() else adapters.alpha
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": list(_WHOLE) if adapters.embeddings else None,
        "peft_type": "LORA",
        "r": adapters.rank,
        "target_modules": [LORA_TARGETS[name] for name in adapters.targets],
        "task_type": "CAUSAL_LM",
    }


def _write_weights(directory: Path, adapted: Adapted) -> None:
    adapters, model = adapted.adapters, adapted.config
    dtype = np.dtype(lora.DTYPE)
    planned = [
        safetensors.Planned(name, shape, dtype)
        for layer in range(model.layers)
        for target in adapters.targets
        for name, shape in zip(names(target, layer), shapes(target, adapters.rank, model))
    ]
    rules = list(_WHOLE.values()) if adapters.embeddings else []
    planned += [
        safetensors.Planned(_PREFIX + rule.theirs, rule.their_shape(model), dtype) for rule in rules
    ]
    total = sum(math.prod(tensor.shape) * dtype.itemsize for tensor in planned)
    (file,), _ = safetensors.layout(directory, planned, total)  # one file, whatever its size
    places = {tensor.name: tensor for tensor in file.tensors}
    disk = DiskFile(file.path)
    try:
        disk.write(memoryview(file.header), 0)
        for layer in range(model.layers):
            for target in adapters.targets:
                pair = _to_theirs(*adapted.pair(target, layer))
                for name, array in zip(names(target, layer), pair):
                    tensor = places[name]
                    tensor.write(disk, whole(tensor.shape), array.astype(dtype))
        for rule in rules:
            _write_rows(disk, places[_PREFIX + rule.theirs], rule, adapted)
        disk.sync()
    finally:
        disk.close()
    file.path.rename(directory / WEIGHTS)


def _write_rows(disk: DiskFile, tensor: StoredTensor, rule: Rule, adapted: Adapted) -> None:
    """A table or head, some rows of its vocabulary at a time."""
    model, axis = adapted.config, rule.rows_axis()
    step = max(1, _BAND_BYTES // (tensor.shape[1] * tensor.dtype.itemsize))
    for first in range(0, tensor.shape[0], step):
        region = list(whole(rule.our_shape(model)))
        region[axis] = slice(first, min(first + step, tensor.shape[0]))
        part = rule.part(tuple(region), model)
        rows = part.to_theirs(adapted.whole(rule.ours, tuple(region)))
        tensor.write(disk, part.theirs, rows.astype(tensor.dtype))
