"""One model of any format, tensor by tensor, in the layout of Hugging Face: [out, in].

The reference and the diagnosis speak HF's names and layout whatever the source, so a sentence such
as "q_proj is interleaved" means the same for every format; our own code gets our layout.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lemur_jax import checkpoint
from lemur_jax.checkpoint.items import open_array
from lemur_jax.config import ModelConfig, model_config
from lemur_jax.convert import safetensors, tables
from lemur_jax.convert.hf import PREFIX
from lemur_jax.convert.hf_source import open_hf
from lemur_jax.convert.recognise import recognise, step_directory
from lemur_jax.convert.rules import Rule

LAYERS = "layers/"


@dataclass(frozen=True)
class Weights:
    """A model whose tensors are read when asked for, and not kept.

    Attributes:
      path: as given.
      config: of the model, with the dtype of the weights as `param_dtype`.
      rules: by our flat name.
      source: reads in our layout: `source.read(name, index)`.
    """

    path: Path
    config: ModelConfig
    rules: dict[str, Rule]
    source: Any

    @property
    def layer_leaves(self) -> tuple[str, ...]:
        """Flat names of the weights that every layer has."""
        return tuple(name for name in self.rules if name.startswith(LAYERS))

    @property
    def other_leaves(self) -> tuple[str, ...]:
        """Flat names of the weights outside the layers: table, norm and, untied, head."""
        return tuple(name for name in self.rules if not name.startswith(LAYERS))

    def shape(self, leaf: str) -> tuple[int, ...]:
        """Of `tensor(leaf, layer)`."""
        return self.rules[leaf].their_shape(self.config)

    def dtype(self, leaf: str) -> np.dtype:
        """In which a leaf is stored."""
        return self.source.dtypes[leaf]

    def tensor(self, leaf: str, layer: int | None = None) -> np.ndarray:
        """One stored tensor, [out, in], [rows, in] or [features], in its stored dtype."""
        index = () if layer is None else (layer,)
        return self.rules[leaf].to_theirs(self.source.read(leaf, index), self.config)

    def rows(self, leaf: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the table or the head: [stop - start, E]."""
        if leaf == "head":
            return self.source.read(leaf, (slice(None), slice(start, stop))).T
        return self.source.read(leaf, (slice(start, stop),))

    def layer(self, layer: int) -> dict[str, np.ndarray]:
        """The weights of a layer in our layout, by name inside the block ("wq")."""
        return {
            leaf.removeprefix(LAYERS): np.ascontiguousarray(self.source.read(leaf, (layer,)))
            for leaf in self.layer_leaves
        }

    def nbytes(self) -> int:
        """Of all weights as stored."""
        return sum(
            int(np.prod(self.shape(leaf), dtype=np.int64))
            * self.dtype(leaf).itemsize
            * (self.config.layers if leaf in self.layer_leaves else 1)
            for leaf in self.rules
        )


def open_weights(path: str | Path) -> Weights:
    """Opens a model of any format that `lemur convert` reads.

    Raises:
      ConversionError, CheckpointError: no model, or a damaged one; names file and tensor.
    """
    source = _HF(path) if recognise(path) == "hf" else _Ours(path)
    rules = {rule.ours: rule for rule in tables.hf_llama(source.config)}
    return Weights(Path(path), source.config, rules, source)


class _HF:
    def __init__(self, path):
        self.hf = open_hf(path)
        self.config, self.dtypes = self.hf.config, self.hf.dtypes

    def read(self, name, index):
        rule = self.hf.rules[name]
        if rule.stacked:
            return self.hf.read(name, index[0])
        if not index:
            return self.hf.read(name)
        where, tensor = self.hf.tensors[rule.theirs]
        rows = index[-1].indices(tensor.shape[0])
        row_bytes = tensor.nbytes // tensor.shape[0]
        part = safetensors.Tensor(
            tensor.name,
            (rows[1] - rows[0], *tensor.shape[1:]),
            tensor.dtype,
            tensor.start + rows[0] * row_bytes,
        )
        array = safetensors.read(where, part)
        return array.T if name == "head" else array


class _Ours:
    def __init__(self, path):
        self.step_dir = step_directory(path)
        manifest = checkpoint.describe(self.step_dir)
        self.config = model_config(manifest.about["model"])
        self.entries = {
            name.removeprefix(PREFIX): entry
            for name, entry in manifest.arrays.items()
            if name.startswith(PREFIX)
        }
        self.dtypes = {n: safetensors.numpy_dtype(e.dtype) for n, e in self.entries.items()}

    def read(self, name, index):
        store = open_array(checkpoint.resolve(self.step_dir) / self.entries[name].item, PREFIX + name)
        return np.asarray(store.result()[index].read().result())
