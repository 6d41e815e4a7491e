"""Where converted weights go: files written in place (a checkpoint of ours: see chunks.py).

A Target is created on the partial destination; `prepare` gives every file its final size, `write`
puts blocks into their places in any order and from any thread or process, `finish` adds the small
files that make the result whole.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert import easylm, grain, msgpack_stream, safetensors, tables
from lemur_jax.convert.disk import DiskFile
from lemur_jax.convert.grain import Grain
from lemur_jax.convert.rules import Rule
from lemur_jax.convert.stored import Region, Shape, StoredTensor, contiguous

MAX_SHARD_BYTES = 5_000_000_000  # transformers' habit


@dataclass(frozen=True)
class Leaf:
    """A leaf as it will be written.

    Attributes:
      name: ours.
      shape: layers stacked, vocabulary padded.
      dtype: of the written weights.
      source: where the source is cut; decides the chunks of a checkpoint.
    """

    name: str
    shape: Shape
    dtype: np.dtype
    source: Grain


class Target(Protocol):
    """See the module. `total_bytes`: of all that `prepare` makes room for."""

    total_bytes: int

    def grain(self, name: str) -> Grain:
        """Where blocks of a leaf may be cut."""
        ...

    def prepare(self) -> None:
        """Creates everything, at its final size; what is there already stays."""
        ...

    def write(self, name: str, region: Region, array: np.ndarray) -> None:
        """Puts a contiguous block into its place."""
        ...

    def read(self, name: str, region: Region) -> np.ndarray | None:
        """A block as it lies there, contiguous; None: it is not all there."""
        ...

    def sync(self) -> None:
        """Returns when everything written so far is on the disk."""
        ...


# ---------------------------------------------------------------------------------------------
# Files in place: safetensors, EasyLM
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlacedFile:
    """A file to be: its size, and what lies between the tensors (headers) by its offset."""

    path: Path
    size: int
    between: Sequence[tuple[int, bytes]]


class FilesTarget:
    """Tensors at known places in files, one for each layer of a leaf. Implements Target."""

    def __init__(
        self,
        config: ModelConfig,
        rules: Sequence[Rule],
        files: Sequence[PlacedFile],
        tensors: Mapping[str, StoredTensor],
    ):
        """Plans only.

        Args:
          config: the model.
          rules: of the format; a leaf may have two (a tied head stored under both names).
          files: all of them.
          tensors: by their name.
        """
        self._config, self._files, self._tensors = config, files, tensors
        self._rules: dict[str, list[Rule]] = {}
        for rule in rules:
            self._rules.setdefault(rule.ours, []).append(rule)
        self._open: dict[Path, DiskFile] = {}
        self._touched: set[Path] = set()
        self._lock = threading.Lock()
        self.total_bytes = sum(file.size for file in files)

    def grain(self, name: str) -> Grain:
        """As Target."""
        return grain.of_rule(self._rules[name][0])

    def prepare(self) -> None:
        """As Target."""
        for file in self._files:
            opened = self._file(file.path)
            os.truncate(file.path, file.size)
            for offset, data in file.between:
                opened.write(memoryview(data), offset)
            opened.sync()

    def write(self, name: str, region: Region, array: np.ndarray) -> None:
        """As Target."""
        for rule in self._rules[name]:
            if not rule.stacked:
                self._write_one(rule, rule.theirs, region, array)
                continue
            for at, layer in enumerate(range(region[0].start, region[0].stop)):
                self._write_one(rule, rule.theirs.format(layer), region[1:], array[at])

    def read(self, name: str, region: Region) -> np.ndarray | None:
        """As Target."""
        found = None
        for rule in self._rules[name]:
            before, found = found, self._read_all(rule, region)
            if before is not None and before.tobytes() != found.tobytes():
                return None  # a tied head that is not its table
        return found

    def _read_all(self, rule: Rule, region: Region) -> np.ndarray:
        if not rule.stacked:
            return contiguous(self._read_one(rule, rule.theirs, region))
        layers = range(region[0].start, region[0].stop)
        if len(layers) == 1:
            return contiguous(self._read_one(rule, rule.theirs.format(layers[0]), region[1:]))[None]
        names = [rule.theirs.format(layer) for layer in layers]
        return np.stack([contiguous(self._read_one(rule, name, region[1:])) for name in names])

    def _read_one(self, rule: Rule, theirs: str, region: Region) -> np.ndarray:
        part = rule.part(region, self._config)
        return part.to_ours(self._tensors[theirs].read(part.theirs))

    def sync(self) -> None:
        """As Target."""
        with self._lock:
            touched = [self._open[path] for path in self._touched if path in self._open]
            self._touched.clear()
        for file in touched:
            file.sync()

    def close(self) -> None:
        """Releases the files."""
        self.sync()
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _write_one(self, rule: Rule, theirs: str, region: Region, array: np.ndarray) -> None:
        part = rule.part(region, self._config)
        tensor = self._tensors[theirs]
        tensor.write(self._file(tensor.path), part.theirs, part.to_theirs(array))
        with self._lock:
            self._touched.add(tensor.path)  # after the write: a sync in between covers nothing

    def _file(self, path: Path) -> DiskFile:
        with self._lock:
            if path not in self._open:
                self._open[path] = DiskFile(path)
            return self._open[path]


def safetensors_target(
    directory: Path,
    config: ModelConfig,
    dtypes: Mapping[str, np.dtype],
    extras: Mapping[str, Any],
    max_shard_bytes: int,
) -> tuple[FilesTarget, dict[str, bytes]]:
    """The files of a Hugging Face directory, in the order of the layers, so that one shard holds
    whole layers; and the index, if there are several."""
    table = tables.hf_llama(config)
    if extras.get("tied_head") and config.tie_embeddings:
        table += (tables.HF_TIED_HEAD,)

    def one(rule: Rule, name: str) -> safetensors.Planned:
        return safetensors.Planned(name, rule.their_shape(config), dtypes[rule.ours])

    planned = [one(rule, rule.theirs) for rule in table if rule.theirs == tables.HF_TIED_HEAD_OF]
    planned += [
        one(rule, rule.theirs.format(layer))
        for layer in range(config.layers)
        for rule in table
        if rule.stacked
    ]
    planned += [
        one(r, r.theirs) for r in table if not r.stacked and r.theirs != tables.HF_TIED_HEAD_OF
    ]
    files, index = safetensors.layout(directory, planned, max_shard_bytes)
    placed = [PlacedFile(file.path, file.size, [(0, file.header)]) for file in files]
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
    small = {} if index is None else {safetensors.INDEX: index.encode()}
    return FilesTarget(config, table, placed, tensors), small


def easylm_target(
    directory: Path, config: ModelConfig, dtypes: Mapping[str, np.dtype]
) -> FilesTarget:
    """EasyLM's stream, as its trainer saves parameters: keys below `params`."""
    table = easylm.rules(config)
    entries = [
        (("params", *name.split("/")), rule.their_shape(config), dtypes[rule.ours])
        for rule in table
        for name in rule.source_names(config)
    ]
    path = directory / easylm.STREAM
    between, placed, size = msgpack_stream.layout(path, entries)
    tensors = {tensor.name.removeprefix("params/"): tensor for tensor in placed}
    return FilesTarget(config, table, [PlacedFile(path, size, between)], tensors)
