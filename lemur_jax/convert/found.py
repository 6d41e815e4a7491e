"""From the tensors that were found in files to a Source: the checks that all formats share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.cast import check_dtype
from lemur_jax.convert.errors import ConversionError, first_few
from lemur_jax.convert.hf_config import stated_dtype
from lemur_jax.convert.model import TableSource
from lemur_jax.convert.rules import Found, Rule, check_complete
from lemur_jax.convert.safetensors import numpy_dtype
from lemur_jax.convert.stored import JoinedTensor, StoredTensor
from lemur_jax.model import param, rope
from lemur_jax.model.decoder import abstract

FLOATS = ("float32", "bfloat16", "float16")
Tensor = StoredTensor | JoinedTensor


@dataclass(frozen=True)
class Dictated:
    """Tensors that follow from the others or from the config: checked, then dropped.

    Attributes:
      inverse_frequencies: how the names of rotary buffers end; None: the format has none.
      tied_head: name of the output projection that a tied model may store as well.
      tied_head_of: name of the table that it must equal.
    """

    inverse_frequencies: str | None
    tied_head: str | None
    tied_head_of: str | None


def table_source(
    path: Path,
    format: str,
    config: ModelConfig,
    table: Sequence[Rule],
    tensors: Sequence[Tensor],
    *,
    dtype: str | None,
    mixed: str | None,
    dictated: Dictated,
    source: dict[str, Any],
    carried: Callable[[], dict[str, bytes]],
    stated: Callable[[ModelConfig], dict[str, str]] = lambda config: {},
) -> TableSource:
    """A Source, once every tensor has a place, every leaf is filled and all dtypes are weights'.

    Args:
      path: for messages.
      format: of model.Source.
      config: the model.
      table: the rules of this format for this config.
      tensors: all that was found; a name may appear twice (that is an error here).
      dtype: cast weights to this when they are read; None: as stored.
      mixed: cast only leaves of several dtypes, or float64, to this.
      dictated: what is checked and dropped.
      source: config.json, or what says the same.
      carried: reads the small files.
      stated: digests of the leaves, if the source states any.

    Raises:
      ConversionError: all problems of names and shapes, or all problems of dtypes.
    """
    check_dtype(dtype)
    leaves = {name: leaf.shape for name, leaf in param.flatten(abstract(config)).items()}
    buffers, tied_head, rest = [], [], []
    for tensor in tensors:
        ending = dictated.inverse_frequencies
        if ending is not None and tensor.name.endswith(ending):
            buffers.append(tensor)
        elif config.tie_embeddings and tensor.name == dictated.tied_head:
            tied_head.append(tensor)
        else:
            rest.append(tensor)
    check_complete(table, config, leaves, [Found(t.name, t.shape, t.path.name) for t in rest])
    by_name = {tensor.name: tensor for tensor in rest}
    dtypes = _leaf_dtypes(table, config, by_name, dtype, mixed)
    for tensor in buffers:
        _check_inverse_frequencies(tensor, config)
    for tensor in tied_head:
        _check_tied_head(tensor, by_name[dictated.tied_head_of])

    weights = dtypes["table"].name
    computes = dtype or stated_dtype(source) or weights
    config = replace(config, dtype=computes, param_dtype=weights)
    extras = {
        "config": source,
        "weights_dtype": by_name[_rule(table, "table").theirs].dtype.name,
        "tied_head": bool(tied_head),
    }
    return TableSource(
        path=str(path),
        format=format,
        config=config,
        extras=extras,
        rules={rule.ours: rule for rule in table},
        tensors=by_name,
        dtypes=dtypes,
        carried=carried,
        stated=stated(config),
    )


def _rule(table: Sequence[Rule], ours: str) -> Rule:
    return next(rule for rule in table if rule.ours == ours)


def _leaf_dtypes(table, config, tensors, dtype, mixed) -> dict[str, np.dtype]:
    problems, dtypes, to = [], {}, dtype or mixed
    for rule in table:
        by_dtype: dict[str, list[str]] = {}
        for name in rule.source_names(config):
            by_dtype.setdefault(tensors[name].dtype.name, []).append(name)
        for found, names in by_dtype.items():
            if found not in FLOATS and (found != "float64" or to is None):
                fix = "give --dtype=float32" if found == "float64" else "use unquantised weights"
                problems.append(f"{names[0]!r} has dtype {found}, which is not supported: {fix}")
        if len(by_dtype) > 1 and to is None:
            shown = ", ".join(f"{names[0]!r} {found}" for found, names in by_dtype.items())
            problems.append(
                f"{rule.ours!r} stacks layers of different dtypes ({shown}): give "
                "--dtype=float32, or another that holds them all"
            )
        own = next(iter(by_dtype)) if len(by_dtype) == 1 else None
        dtypes[rule.ours] = numpy_dtype(dtype or (own if own in FLOATS else to) or "float32")
    if problems:
        raise ConversionError(first_few(problems, "tensors"))
    return dtypes


def _check_inverse_frequencies(tensor: Tensor, config: ModelConfig) -> None:
    """The buffer holds the plain frequencies (old checkpoints scale later) or the scaled ones."""
    found = tensor.read().astype(np.float64)
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
            f"buffer {tensor.name!r} in {tensor.path.name} is not what config.json implies "
            f"(rope_theta={config.rope.theta}, head_dim={config.head_dim}): correct the config, "
            "or remove the buffer if it is known to be stale"
        ]
    )


def _check_tied_head(head: Tensor, table: Tensor) -> None:
    same = head.shape == table.shape and head.dtype == table.dtype
    rows = max(1, (16 << 20) // max(1, head.dtype.itemsize * head.shape[-1]))
    for first in range(0, head.shape[0] if same else 0, rows):
        band = (slice(first, min(first + rows, head.shape[0])), slice(0, head.shape[1]))
        same = same and head.read(band).tobytes() == table.read(band).tobytes()
    if not same:
        raise ConversionError(
            [
                f"tie_word_embeddings=True, but {head.name!r} in {head.path.name} differs from "
                f"{table.name!r}: set tie_word_embeddings to false in config.json to use both, "
                f"or remove {head.name!r}"
            ]
        )
