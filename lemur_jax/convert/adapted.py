"""A model with LoRA adapters, read as the model that they make: W + scale A B, block by block.

The adapters of one layer are read when a part of that layer is: their size does not grow with L.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lemur_jax.config import LoraConfig, ModelConfig
from lemur_jax.convert.cast import cast
from lemur_jax.convert.model import Index, Source, region_of
from lemur_jax.convert.stored import Region
from lemur_jax.convert.wrapped import Wrapped
from lemur_jax.model import lora

ADAPTERS = "adapters"  # item of a checkpoint, and what the names of its arrays begin with
# (target such as "wq", layer) -> its A [I..., R] and B [R, O...]
ReadPair = Callable[[str, int], tuple[np.ndarray, np.ndarray]]
# (leaf that is trained whole, region) -> its values
ReadWhole = Callable[[str, Region], np.ndarray]
_BAND_ELEMENTS = 1 << 20  # of a weight at a time in float64


@dataclass(frozen=True)
class Adapted(Wrapped):
    """A Source with adapters added. See model.Source.

    Attributes:
      source: the frozen base.
      adapters: which there are.
      pair: reads those of one weight of one layer.
      whole: reads what is trained whole.
      adapters_path: where they lie.
    """

    adapters: LoraConfig
    pair: ReadPair
    whole: ReadWhole
    adapters_path: str

    @property
    def format(self) -> str:
        """As Source: not the base's, which is another model."""
        return f"{self.source.format} with LoRA"

    def read(self, name: str, index: Index = None) -> np.ndarray:
        """As Source, with the adapters added in float64: a cut elsewhere rounds alike."""
        if not self.changes(name):
            return self.source.read(name, index)
        region, squeezed = region_of(index, self.shape(name))
        target = name.removeprefix("layers/")
        if target == name:
            return cast(self.whole(name, region), self.dtype(name), name)[squeezed]
        base = self.source.read(name, region)
        out = np.empty(base.shape, base.dtype)
        for at, layer in enumerate(range(region[0].start, region[0].stop)):
            self._add(out[at], base[at], target, self.pair(target, layer), region[1:])
        return out[squeezed]

    def where(self, name: str, index: tuple[int, ...]) -> str:
        """As Source."""
        where = self.source.where(name, index)
        return f"{where} with {self.adapters_path}" if self.changes(name) else where

    def with_config(self, config: ModelConfig) -> "Adapted":
        """The same weights under a config that may pad the vocabulary otherwise."""
        return replace(self, source=self.source.with_config(config))

    def changes(self, name: str) -> bool:
        """As Wrapped."""
        changed = (f"layers/{target}" for target in self.adapters.targets)
        return name in (*changed, *lora.whole_leaves(self.adapters, self.config))

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


def adapted_in(source: Source) -> Adapted | None:
    """The adapters that a source adds, if it adds any."""
    while isinstance(source, Wrapped) and not isinstance(source, Adapted):
        source = source.source
    return source if isinstance(source, Adapted) else None
