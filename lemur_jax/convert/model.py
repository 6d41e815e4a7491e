"""A model that lies somewhere, whatever its format: config and weights in OUR layout, on demand.

`open_source` recognises the format by what a path contains and checks config, names, shapes and
dtypes before it returns; no weight is read before it is asked for, and then only the part that is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.cast import cast
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.grain import Grain, of_rule
from lemur_jax.convert.rules import Rule
from lemur_jax.convert.stored import JoinedTensor, Region, Shape, StoredTensor

Index = int | slice | tuple[int | slice, ...] | None


class Source(Protocol):
    """A model on disk. Names, shapes and axes are ours: "layers/wq" is [L,E,H,D].

    Attributes:
      path: where it lies.
      format: "hf", "bin" (HF's PyTorch files), "meta", "easylm" or "lemur"; of a model with
        adapters also "... with LoRA".
      config: the model; `param_dtype` is that of the stored embedding table.
      names: of every leaf, in the order of the table.
      extras: what a config.json says beyond ModelConfig (`hf_extras` of hf.py); None: unknown.
    """

    path: str
    format: str
    config: ModelConfig
    extras: dict[str, Any] | None

    @property
    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> Shape:
        """Layers stacked in front, vocabulary padded."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """As `read` returns it: the stored one, unless another was asked for at opening."""
        ...

    def read(self, name: str, index: Index = None) -> np.ndarray:
        """A part of a leaf; vocabulary padded with zeros. May be a view with any strides.

        Holds the part asked for, of one layer at a time in their layout too, and a few MiB.

        Args:
          name: one of `names`.
          index: None reads all of it; an int or slice selects layers (the leading axis); a tuple
            holds an int or slice (step 1) for each of the first axes.
        """
        ...

    def where(self, name: str, index: tuple[int, ...]) -> str:
        """The tensor and file of one element, in the source's own names; for messages."""
        ...

    def grain(self, name: str) -> Grain:
        """Where a leaf is cut for reading."""
        ...

    def files(self) -> dict[str, bytes]:
        """Small files that travel with the model: tokenizer/..., hf/..."""
        ...

    def digests(self) -> dict[str, str]:
        """The digests that the source itself states of its leaves, {} if it states none."""
        ...


def open_source(
    path: str | Path,
    *,
    dtype: str | None = None,
    mixed: str | None = None,
    max_positions: int | None = None,
    base: str | Path | None = None,
) -> Source:
    """Opens a model of any format that we read.

    Args:
      path: run, checkpoint, HF directory (safetensors or .bin), PEFT's adapters, directory with
        Meta's consolidated.*.pth, or with EasyLM's streaming_params and a config.json.
      dtype: cast every weight to this as it is read; None keeps each one's own.
      mixed: cast to this only the leaves that have no dtype of their own: layers of several
        dtypes, or float64.
      max_positions: of Meta's format, whose params.json does not say it.
      base: the model under PEFT's adapters; None: the one that they name, if it lies here.

    Raises:
      ConversionError: not recognised, or anything that is wrong with it.
      CheckpointError: a checkpoint of ours is incomplete or damaged.
    """
    from lemur_jax.convert import easylm, hf_source, meta, ours, peft
    from lemur_jax.convert.recognise import recognise
    from lemur_jax.convert.unreadable import lost_tensors

    kind = recognise(path)
    if kind == "peft":
        below = peft.base_of(path) if base is None else base
        options = {"dtype": dtype, "mixed": mixed, "max_positions": max_positions}
        return peft.open_peft(path, open_source(below, **options))
    if base is not None:
        raise ConversionError([f"--base is of PEFT's adapters; {path} is {kind!r}: remove it"])
    if kind == "lemur":
        return ours.open_ours(path, dtype=dtype)
    if kind == "meta":
        return meta.open_meta(path, dtype=dtype, mixed=mixed, max_positions=max_positions)
    if kind == "easylm":
        return easylm.open_easylm(path, dtype=dtype, mixed=mixed)
    try:
        return hf_source.open_hf(path, dtype=dtype, mixed=mixed)
    except ConversionError as error:
        raise ConversionError([*error.problems, *lost_tensors(path)]) from error


def check_max_positions(given: int | None, *sources: Source) -> None:
    """Raises ConversionError if no source has a use for --max_positions."""
    if given is None or any(source.format == "meta" for source in sources):
        return
    stated = "; ".join(f"{s.path} ({s.format}) states {s.config.max_positions}" for s in sources)
    raise ConversionError(
        [
            f"--max_positions={given} is of Meta's weights, which do not say it; {stated}: leave "
            "it out"
        ]
    )


@dataclass(frozen=True)
class TableSource:
    """A Source whose tensors lie in files, one for each layer, and are ours by a table of rules.

    Attributes:
      path, format, config, extras: as in Source.
      rules: the table for this config, by our flat name.
      tensors: by their name.
      dtypes: of each of our leaves.
      carried: reads the small files.
      stated: digests of our leaves, where the source states them.
    """

    path: str
    format: str
    config: ModelConfig
    extras: dict[str, Any] | None
    rules: Mapping[str, Rule]
    tensors: Mapping[str, StoredTensor | JoinedTensor]
    dtypes: Mapping[str, np.dtype]
    carried: Callable[[], dict[str, bytes]]
    stated: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """As Source."""
        return tuple(self.rules)

    def shape(self, name: str) -> Shape:
        """As Source."""
        return self.rules[name].our_shape(self.config)

    def dtype(self, name: str) -> np.dtype:
        """As Source."""
        return self.dtypes[name]

    def read(self, name: str, index: Index = None) -> np.ndarray:
        """As Source."""
        rule = self.rules[name]
        region, squeezed = region_of(index, self.shape(name))
        if not rule.stacked:
            return self._one(rule, rule.theirs, region)[squeezed]
        layers = range(region[0].start, region[0].stop)
        sources = rule.source_names(self.config)
        if len(layers) == 1:
            return self._one(rule, sources[layers[0]], region[1:])[None][squeezed]
        shape = tuple(part.stop - part.start for part in region)
        result = np.empty(shape, self.dtypes[name])
        for at, layer in enumerate(layers):
            result[at] = self._one(rule, sources[layer], region[1:])
        return result[squeezed]

    def where(self, name: str, index: tuple[int, ...]) -> str:
        """As Source."""
        rule = self.rules[name]
        theirs = rule.theirs.format(index[0]) if rule.stacked else rule.theirs
        return f"{theirs} in {self.tensors[theirs].path.name}"

    def grain(self, name: str) -> Grain:
        """As Source."""
        return of_rule(self.rules[name])

    def files(self) -> dict[str, bytes]:
        """As Source."""
        return self.carried()

    def digests(self) -> dict[str, str]:
        """As Source."""
        return dict(self.stated)

    def with_config(self, config: ModelConfig) -> "TableSource":
        """The same weights under a config that may pad the vocabulary otherwise."""
        return replace(self, config=config)

    def _one(self, rule: Rule, source: str, region: Region) -> np.ndarray:
        part = rule.part(region, self.config)
        array = self.tensors[source].read(part.theirs)
        return part.to_ours(cast(array, self.dtypes[rule.ours], source))


def region_of(index: Index, shape: Shape) -> tuple[Region, tuple[Any, ...]]:
    """An index as a region with all axes, and the index that then drops the axes of its ints.

    Raises:
      IndexError: too many axes, or outside of the shape.
    """
    given = () if index is None else index if isinstance(index, tuple) else (index,)
    if len(given) > len(shape):
        raise IndexError(f"{index} has more axes than {shape}")
    region, squeezed = [], []
    for part, size in zip((*given, *(slice(None),) * (len(shape) - len(given))), shape):
        if isinstance(part, slice):
            start, stop, step = part.indices(size)
            if step != 1:
                raise IndexError(f"{part}: only steps of 1")
            region.append(slice(start, max(start, stop)))
            squeezed.append(slice(None))
            continue
        if not -size <= part < size:
            raise IndexError(f"{part} is outside of an axis of {size}")
        region.append(slice(part % size, part % size + 1))
        squeezed.append(0)
    return tuple(region), tuple(squeezed)
