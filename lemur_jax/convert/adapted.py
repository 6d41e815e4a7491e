"""A model with LoRA adapters, read as the model that they make: W + scale A B, block by block.

The adapters of one layer are read when a part of that layer is: their size does not grow with L.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lemur_jax.config import LoraConfig, ModelConfig
from lemur_jax.convert.cast import cast
from lemur_jax.convert.grain import Grain
from lemur_jax.convert.model import Index, Source, region_of
from lemur_jax.convert.stored import Region, Shape
from lemur_jax.model import lora

ADAPTERS = "adapters"  # item of a checkpoint, and what the names of its arrays begin with
# (target such as "wq", layer) -> its A [I..., R] and B [R, O...]
ReadPair = Callable[[str, int], tuple[np.ndarray, np.ndarray]]
_BAND_ELEMENTS = 1 << 20  # of a weight at a time in float64


@dataclass(frozen=True)
class Adapted:
    """A Source with adapters added. See model.Source.

    Attributes:
      source: the frozen base.
      adapters: which there are.
      pair: reads those of one weight of one layer.
      adapters_path: where they lie.
    """

    source: Source
    adapters: LoraConfig
    pair: ReadPair
    adapters_path: str

    @property
    def path(self) -> str:
        """As Source."""
        return self.source.path

    @property
    def format(self) -> str:
        """As Source: not the base's, which is another model."""
        return f"{self.source.format} with LoRA"

    @property
    def config(self) -> ModelConfig:
        """As Source."""
        return self.source.config

    @property
    def extras(self) -> dict[str, Any] | None:
        """As Source."""
        return self.source.extras

    @property
    def names(self) -> tuple[str, ...]:
        """As Source."""
        return self.source.names

    def shape(self, name: str) -> Shape:
        """As Source."""
        return self.source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """As Source: the base's; the sum is rounded to it."""
        return self.source.dtype(name)

    def read(self, name: str, index: Index = None) -> np.ndarray:
        """As Source, with the adapters added in float64: a cut elsewhere rounds alike."""
        target = self._target(name)
        if target is None:
            return self.source.read(name, index)
        region, squeezed = region_of(index, self.shape(name))
        base = self.source.read(name, region)
        out = np.empty(base.shape, base.dtype)
        for at, layer in enumerate(range(region[0].start, region[0].stop)):
            self._add(out[at], base[at], target, self.pair(target, layer), region[1:])
        return out[squeezed]

    def where(self, name: str, index: tuple[int, ...]) -> str:
        """As Source."""
        where = self.source.where(name, index)
        return where if self._target(name) is None else f"{where} with {self.adapters_path}"

    def grain(self, name: str) -> Grain:
        """As Source."""
        return self.source.grain(name)

    def files(self) -> dict[str, bytes]:
        """As Source."""
        return self.source.files()

    def digests(self) -> dict[str, str]:
        """As Source: of the leaves that are as they were."""
        return {n: d for n, d in self.source.digests().items() if self._target(n) is None}

    def with_config(self, config: ModelConfig) -> "Adapted":
        """The same weights under a config that may pad the vocabulary otherwise."""
        return replace(self, source=self.source.with_config(config))

    def _target(self, name: str) -> str | None:
        target = name.removeprefix("layers/")
        return target if target in self.adapters.targets else None

    def _add(
        self,
        out: np.ndarray,
        base: np.ndarray,
        target: str,
        pair: tuple[np.ndarray, np.ndarray],
        region: Region,
    ) -> None:
        """out = base + scale A B of a region of one layer, in bands of its first axis."""
        inputs = lora.INPUT_DIMENSIONS.get(target, 1)
        a = pair[0][region[:inputs]].astype(np.float64)
        b = pair[1][(slice(None), *region[inputs:])].astype(np.float64)
        rows = max(1, _BAND_ELEMENTS * len(base) // max(base.size, 1))
        for first in range(0, len(base), rows):
            band = slice(first, first + rows)
            total = base[band].astype(np.float64) + lora.delta(a[band], b, self.adapters.scale)
            out[band] = cast(total, out.dtype, f"layers/{target}")


def origin(source: Source) -> Source:
    """What lies on the disk below changes of vocabulary and adapters."""
    while hasattr(source, "source"):
        source = source.source
    return source


def adapted_in(source: Source) -> Adapted | None:
    """The adapters that a source adds, if it adds any."""
    while not isinstance(source, Adapted):
        if not hasattr(source, "source"):
            return None
        source = source.source
    return source
