"""Meta's distribution of Llama: params.json and consolidated.NN.pth, one file for each of the
devices that the model was split over (tensor parallelism)."""

from pathlib import Path
from typing import Any

from lemur_jax.convert import tables, torch_file
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.found import Dictated, table_source
from lemur_jax.convert.hf_config import config_from_hf
from lemur_jax.convert.json_file import read_json
from lemur_jax.convert.model import TableSource
from lemur_jax.convert.small_files import hf_files
from lemur_jax.convert.stored import JoinedTensor, StoredTensor

PARAMS = "params.json"
_KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps"),
    *("ffn_dim_multiplier", "rope_theta", "use_scaled_rope", "rope_scaling_factor"),
    *("max_seq_len", "max_batch_size"),
}
_NEEDED = ("dim", "n_layers", "n_heads", "norm_eps")
_POSITIVE = (  # if they are there
    *("n_kv_heads", "multiple_of", "ffn_dim_multiplier", "rope_theta", "rope_scaling_factor"),
    "max_seq_len",
)


def open_meta(
    directory: str | Path,
    *,
    dtype: str | None = None,
    mixed: str | None = None,
    max_positions: int | None = None,
) -> TableSource:
    """Opens a directory with params.json and consolidated.*.pth.

    Args:
      directory: holds them; a tokenizer.model beside them travels along.
      dtype: cast every weight to this as it is read; None keeps the stored dtype.
      mixed: see `model.open_source`.
      max_positions: the longest sequence the model handles, which params.json does not say.

    Raises:
      ConversionError: everything that is wrong with params.json, files, names, shapes, dtypes.
    """
    directory = Path(directory)
    params = read_json(directory / PARAMS, "Meta's weights come with it")
    files = _files(directory)
    parts = [torch_file.read_tensors(path) for path in files]
    _check_count(directory, parts, files)
    tensors = _joined(parts, files)
    source = _as_hf(directory / PARAMS, params, tensors, max_positions)
    config = config_from_hf(source)
    return table_source(
        directory,
        "meta",
        config,
        tables.META,
        list(tensors.values()),
        dtype=dtype,
        mixed=mixed,
        dictated=Dictated(tables.META_INVERSE_FREQUENCIES, None, None),
        source=source,
        carried=lambda: hf_files(directory),
    )


def _files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("consolidated.*.pth"))
    expected = [f"consolidated.{number:02d}.pth" for number in range(len(files))]
    missing = [name for name in expected if not (directory / name).is_file()]
    if missing:
        raise ConversionError(
            [f"{directory} has {len(files)} consolidated files but not {missing[0]}: download it"]
        )
    return files


def _check_count(directory: Path, parts: list[dict[str, StoredTensor]], files: list[Path]) -> None:
    """As many parts as one part's share of a matrix says; no part twice.

    Raises:
      ConversionError: names the files.
    """
    query, norm = parts[0].get("layers.0.attention.wq.weight"), parts[0].get("norm.weight")
    if query is None or norm is None or len(query.shape) != 2 or len(norm.shape) != 1:
        return  # said of their shapes later
    rows, whole = query.shape[0], norm.shape[0]
    if rows and whole % rows == 0 and whole // rows != len(files):
        count = whole // rows
        wanted = [f"consolidated.{number:02d}.pth" for number in range(count)]
        missing = [name for name in wanted if not (directory / name).is_file()]
        fix = f"{', '.join(missing)} must be missing: download"
        raise ConversionError(
            [
                f"{directory} has {len(files)} consolidated files, but {query.name} in "
                f"{files[0].name} has {rows} of {whole} rows, which makes {count} files: "
                + (fix if missing else "remove those of another model")
            ]
        )
    for b in range(1, len(parts)):
        for a in range(b):
            if _same_parts(parts[a], parts[b]):
                raise ConversionError(
                    [
                        f"{files[b].name} in {directory} is a copy of {files[a].name}: every "
                        f"tensor is bit for bit the same. Download {files[b].name} again"
                    ]
                )


def _same_parts(a: dict[str, StoredTensor], b: dict[str, StoredTensor]) -> bool:
    split = [name for name in a if tables.META_SPLIT.get(name.split(".")[-2:][0]) is not None]
    return bool(split) and all(
        name in b and a[name].shape == b[name].shape and _same_bits(a[name], b[name])
        for name in split
    )


def _joined(
    parts: list[dict[str, StoredTensor]], files: list[Path]
) -> dict[str, StoredTensor | JoinedTensor]:
    problems = [
        f"{name!r} is in {files[a].name} but not in {files[b].name}: the files are of several "
        "models, or one is damaged"
        for a in range(len(parts))
        for b in range(len(parts))
        for name in sorted(set(parts[a]) - set(parts[b]))[:4]
    ]
    if problems:
        raise ConversionError(problems)
    joined: dict[str, StoredTensor | JoinedTensor] = {}
    for name, first in parts[0].items():
        axis = _split_axis(name, first, parts)
        pieces = tuple(part[name] for part in parts)
        if axis is None or len(parts) == 1:
            for piece in pieces[1:]:
                if piece.shape != first.shape or not _same_bits(piece, first):
                    problems.append(
                        f"{name!r} must be the same in every file, but {piece.path.name} differs "
                        f"from {first.path.name}: the files are of several models, or one is "
                        "damaged"
                    )
            joined[name] = first
            continue
        outside = {s.shape[:axis] + s.shape[axis + 1 :] for s in pieces}
        if len(outside) > 1 or len({s.dtype for s in pieces}) > 1:
            shown = ", ".join(f"{s.path.name} {s.dtype.name} {list(s.shape)}" for s in pieces)
            problems.append(f"the parts of {name!r} do not fit together: {shown}")
            continue
        joined[name] = JoinedTensor(name, pieces, axis)
    if problems:
        raise ConversionError(problems)
    return joined


def _split_axis(name: str, tensor: StoredTensor, parts: list) -> int | None:
    """The embedding was split by columns up to Llama 2, by rows since: the norm's length tells."""
    if name == "tok_embeddings.weight" and "norm.weight" in parts[0] and len(tensor.shape) == 2:
        embed = parts[0]["norm.weight"].shape[0]
        return 0 if tensor.shape[1] == embed else 1
    words = name.split(".")
    return tables.META_SPLIT.get(words[-2]) if len(words) > 1 else None


def _same_bits(a: StoredTensor, b: StoredTensor) -> bool:
    return a.dtype == b.dtype and a.read().tobytes() == b.read().tobytes()


def _as_hf(
    path: Path, params: dict[str, Any], tensors: dict, max_positions: int | None
) -> dict[str, Any]:
    """The config.json that says the same as params.json."""
    problems = [
        f"{path}: unknown key {key}={value!r}: it may change the model, so nothing is converted"
        for key, value in params.items()
        if key not in _KNOWN and value is not None
    ]
    problems += [
        f"{path}: {key}={params.get(key)!r} must be a positive number"
        for key in (*_NEEDED, *(k for k in _POSITIVE if params.get(k) is not None))
        if isinstance(params.get(key), bool)
        or not isinstance(params.get(key), (int, float))
        or not params[key] > 0
    ]
    if max_positions is None:
        max_positions = params.get("max_seq_len")
    if max_positions is None:
        problems.append(
            f"{path} does not say how long the model's positions reach: give --max_positions="
            "4096 (Llama 2), 2048 (Llama 1) or 8192 (Llama 3)"
        )
    if params.get("use_scaled_rope") and "rope_scaling_factor" not in params:
        problems.append(
            f"{path} has use_scaled_rope but no factor: add "
            '"rope_scaling_factor": 8 (Llama 3.1) or 32 (Llama 3.2)'
        )
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in tensors:
            problems.append(f"{path.parent} has no tensor {name!r}: download its files again")
    if problems:
        raise ConversionError(problems)
    rows = tensors["tok_embeddings.weight"].shape[0]
    mlp = tensors["layers.0.feed_forward.w1.weight"].shape[0]
    if params.get("vocab_size", -1) not in (-1, rows):
        problems.append(
            f"{path} says vocab_size={params['vocab_size']!r}, "
            f"tok_embeddings.weight has {rows} rows"
        )
    stated = _mlp(params)
    if stated not in (None, mlp):
        problems.append(
            f"{path}: dim, multiple_of and ffn_dim_multiplier make {stated} hidden units, "
            f"feed_forward.w1 has {mlp}"
        )
    if problems:
        raise ConversionError(problems)
    stored = tensors["tok_embeddings.weight"].dtype.name
    source = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": params["dim"],
        "intermediate_size": mlp,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": float(params.get("rope_theta") or 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": stored,
    }
    if params.get("use_scaled_rope"):
        source["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(params["rope_scaling_factor"]),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return source


def _mlp(params: dict[str, Any]) -> int | None:
    """Hidden units as Meta's code derives them; None if params.json does not say how."""
    if params.get("multiple_of") is None:
        return None
    hidden = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    return int(-(-hidden // params["multiple_of"]) * params["multiple_of"])
