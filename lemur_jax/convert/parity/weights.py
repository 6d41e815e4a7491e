"""One model of any format, tensor by tensor, in the layout of Hugging Face: [out, in].

The reference and the diagnosis speak HF's names and layout whatever the source, so a sentence such
as "q_proj is interleaved" means the same for every format; our own code gets our layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert import tables
from lemur_jax.convert.model import Source
from lemur_jax.convert.rules import Rule

LAYERS = "layers/"
_NEAR_ROWS = 32  # of the vocabulary
_SAMPLED_ROWS = 64  # for a tensor's precision


@dataclass(frozen=True)
class Weights:
    """A model whose tensors are read when asked for, and not kept.

    Attributes:
      source: reads in our layout, of any format.
      rules: HF's table for its config, by our flat name.
    """

    source: Source
    rules: dict[str, Rule]

    @property
    def config(self) -> ModelConfig:
        """Of the model; `param_dtype` is that of the stored table."""
        return self.source.config

    @property
    def layer_leaves(self) -> tuple[str, ...]:
        """Flat names of the weights that every layer has."""
        return tuple(name for name in self.rules if name.startswith(LAYERS))

    def shape(self, leaf: str) -> tuple[int, ...]:
        """Of `tensor(leaf, layer)`."""
        return self.rules[leaf].their_shape(self.config)

    def dtype(self, leaf: str) -> np.dtype:
        """In which a leaf is stored; "head" of a tied model is its table."""
        return self.source.dtype("table" if self.tied and leaf == "head" else leaf)

    def precision(self, leaf: str, layer: int | None = None) -> np.dtype:
        """The narrowest dtype that holds a tensor: bfloat16 numbers may be stored as float32.

        Looks at a few rows of one layer.
        """
        stored = self.dtype(leaf)
        leaf = "table" if self.tied and leaf == "head" else leaf
        some = slice(0, _SAMPLED_ROWS)
        sample = self.source.read(leaf, some if layer is None else (layer, some))
        return narrowest(sample, stored)

    @property
    def tied(self) -> bool:
        """Whether the head is the table."""
        return self.config.tie_embeddings

    def tensor(self, leaf: str, layer: int | None = None) -> np.ndarray:
        """One stored tensor, [out, in], [rows, in] or [features], in its stored dtype."""
        return self.rules[leaf].to_theirs(self.source.read(leaf, layer), self.config)

    def rows(self, leaf: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the table or the head: [stop - start, E]."""
        if leaf == "head" and not self.tied:
            return self.source.read(leaf, (slice(None), slice(start, stop))).T
        return self.source.read("table", slice(start, stop))

    def take(self, leaf: str, ids: np.ndarray) -> np.ndarray:
        """Rows of the table or the head in any order: [*ids.shape, E]."""
        wanted, inverse = np.unique(ids, return_inverse=True)
        # Neighbours are read together: a read has its costs, some rows too many have few.
        parts = []
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > _NEAR_ROWS) + 1):
            rows = self.rows(leaf, int(run[0]), int(run[-1]) + 1)
            parts.append(rows[run - run[0]])
        return np.concatenate(parts)[inverse.reshape(ids.shape)]

    def layer(self, layer: int) -> Iterator[tuple[str, np.ndarray]]:
        """The weights of a layer in our layout, by name inside the block ("wq"), one at a time."""
        for leaf in self.layer_leaves:
            array = np.ascontiguousarray(self.source.read(leaf, layer))
            yield leaf.removeprefix(LAYERS), array

    def nbytes(self) -> int:
        """Of all weights as stored."""
        return sum(
            tensor_bytes(self, leaf) * (self.config.layers if leaf in self.layer_leaves else 1)
            for leaf in self.rules
        )


def narrowest(numbers: np.ndarray, stored: np.dtype) -> np.dtype:
    """bfloat16 or float16 if it holds all the numbers as they are, otherwise `stored`."""
    with np.errstate(over="ignore"):
        for dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype("float16")):
            if (numbers.astype(dtype).astype(stored) == numbers).all():
                return dtype
    return stored


def tensor_bytes(weights: Weights, leaf: str) -> int:
    """Of one stored tensor."""
    return int(np.prod(weights.shape(leaf), dtype=np.int64)) * weights.dtype(leaf).itemsize


def of_source(source: Source) -> Weights:
    """A source, seen through HF's table."""
    return Weights(source, {rule.ours: rule for rule in tables.hf_llama(source.config)})
