"""A model that is another one but for some of it: a Source around a Source."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.grain import Grain
from lemur_jax.convert.model import Index, Source
from lemur_jax.convert.stored import Shape


@dataclass(frozen=True)
class Wrapped:
    """Passes everything on to `source`; what subclasses change they define. See model.Source."""

    source: Source

    @property
    def path(self) -> str:
        """As Source."""
        return self.source.path

    @property
    def format(self) -> str:
        """As Source."""
        return self.source.format

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
        """As Source."""
        return self.source.dtype(name)

    def read(self, name: str, index: Index = None) -> np.ndarray:
        """As Source."""
        return self.source.read(name, index)

    def where(self, name: str, index: tuple[int, ...]) -> str:
        """As Source."""
        return self.source.where(name, index)

    def grain(self, name: str) -> Grain:
        """As Source."""
        return self.source.grain(name)

    def files(self) -> dict[str, bytes]:
        """As Source."""
        return self.source.files()

    def changes(self, name: str) -> bool:
        """Whether a leaf is not what `source` holds."""
        raise NotImplementedError

    def digests(self) -> dict[str, str]:
        """As Source: of the leaves that are as they were."""
        return {n: d for n, d in self.source.digests().items() if not self.changes(n)}


def origin(source: Source) -> Source:
    """What lies on the disk below all changes."""
    while isinstance(source, Wrapped):
        source = source.source
    return source
