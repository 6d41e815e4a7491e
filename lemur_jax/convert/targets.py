"""Where converted weights go: files written in place, or a checkpoint of ours written by chunks.

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

import jax
import numpy as np
from etils import epath

from lemur_jax import checkpoint
from lemur_jax.config import MeshConfig, ModelConfig
from lemur_jax.convert import easylm, grain, msgpack_stream, safetensors, tables
from lemur_jax.convert.disk import DiskFile
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.grain import Grain
from lemur_jax.convert.ours import PREFIX
from lemur_jax.convert.rules import Rule
from lemur_jax.convert.stored import Region, Shape, StoredTensor, contiguous
from lemur_jax.model import param
from lemur_jax.model.decoder import abstract
from lemur_jax.sharding import MESH_AXES, spec


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
        self.sync()

    def write(self, name: str, region: Region, array: np.ndarray) -> None:
        """As Target."""
        for rule in self._rules[name]:
            if not rule.stacked:
                self._write_one(rule, rule.theirs, region, array)
                continue
            for at, layer in enumerate(range(region[0].start, region[0].stop)):
                self._write_one(rule, rule.theirs.format(layer), region[1:], array[at])

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

    def _file(self, path: Path) -> DiskFile:
        with self._lock:
            self._touched.add(path)
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


# ---------------------------------------------------------------------------------------------
# A checkpoint of ours
# ---------------------------------------------------------------------------------------------


class ChunksTarget:
    """The item `params` of a checkpoint, chunk by chunk. Implements Target."""

    def __init__(
        self, step_dir: epath.Path, config: ModelConfig, leaves: Sequence[Leaf], mesh: Any | None
    ):
        """Plans only.

        Args:
          step_dir: the checkpoint to be; local, or gs://, s3://.
          config: the model.
          leaves: all of them.
          mesh: a MeshConfig with all sizes given: chunks are what its devices hold; None: layers.
        """
        self._item_dir = step_dir / PREFIX.rstrip("/")
        self._leaves = {leaf.name: leaf for leaf in leaves}
        shards = None if mesh is None else shard_shapes(config, mesh)
        self.chunks = {leaf.name: _chunks(leaf, shards) for leaf in leaves}
        self._context = checkpoint.slice_context()
        self._stores: dict[str, Any] = {}
        self._local = "://" not in str(step_dir)
        self.total_bytes = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    def grain(self, name: str) -> Grain:
        """As Target."""
        return grain.of_chunks(self._leaves[name].shape, self.chunks[name], written=True)

    def prepare(self) -> None:
        """As Target."""
        pending = {
            name: checkpoint.create_array(
                self._item_dir,
                PREFIX + name,
                leaf.shape,
                leaf.dtype,
                self.chunks[name],
                self._context,
            )
            for name, leaf in self._leaves.items()
        }
        self._stores = {name: future.result() for name, future in pending.items()}

    def write(self, name: str, region: Region, array: np.ndarray) -> None:
        """As Target. On a local disk a chunk is a file, which needs no encoding and no copy."""
        if not self._local:
            store = self._stores[name][tuple(region)]
            store.write(array, can_reference_source_data_indefinitely=True).result()
            return
        chunks = self.chunks[name]
        for part in grain.regions(array.shape, chunks):
            numbers = [
                (whole.start + inside.start) // size
                for whole, inside, size in zip(region, part, chunks)
            ]
            path = f"{self._item_dir}/{PREFIX}{name}/{'.'.join(map(str, numbers))}"
            self._write_file(path, _filled(array[part], chunks))

    def sync(self) -> None:
        """As Target: a block is on the disk when its write returns."""

    def close(self) -> None:
        """Nothing is held open."""

    def _write_file(self, path: str, array: np.ndarray) -> None:
        array = contiguous(array)
        file = DiskFile(path)
        try:
            file.write(memoryview(array.reshape(-1).view(np.uint8)), 0)
            os.truncate(path, array.nbytes)  # a leftover of a kill may be longer
            file.sync()
        finally:
            file.close()


def _filled(array: np.ndarray, chunk: Shape) -> np.ndarray:
    """A chunk at the end of an axis is as large as any other; zeros lie behind the array."""
    if array.shape == chunk:
        return array
    whole = np.zeros(chunk, array.dtype)
    whole[tuple(slice(0, size) for size in array.shape)] = array
    return whole


def shard_shapes(config: ModelConfig, mesh: MeshConfig) -> dict[str, Shape]:
    """What one device of a mesh holds of each leaf.

    Raises:
      ConversionError: the mesh does not divide the model.
    """
    sizes = (mesh.data * mesh.dcn_data, mesh.fsdp, mesh.sequence, mesh.tensor)
    if -1 in sizes:
        raise ConversionError(["--mesh: every size must be given, none can be -1"])
    abstract_mesh = jax.sharding.AbstractMesh(sizes, MESH_AXES)
    model, found, problems = abstract(config), {}, []
    leaves = jax.tree.leaves(model, is_leaf=lambda leaf: hasattr(leaf, "get_metadata"))
    for name, leaf in zip(param.flatten(model), leaves, strict=True):
        shape = leaf.get_value().shape
        where = jax.sharding.NamedSharding(
            abstract_mesh, spec(param.axes_of(leaf), abstract_mesh, shape)
        )
        try:
            found[name] = where.shard_shape(shape)
        except ValueError as error:
            problems.append(f"--mesh does not divide {name} {list(shape)}: {error}")
    if problems:
        raise ConversionError(problems)
    return found


def _chunks(leaf: Leaf, shards: dict[str, Shape] | None) -> Shape:
    stacked = leaf.name.startswith("layers/")
    if shards is None:
        return grain.chunk_shape(leaf.shape, leaf.dtype.itemsize, stacked, leaf.source.cheap)
    return grain.chunk_shape(shards[leaf.name], leaf.dtype.itemsize, stacked, leaf.source.cheap)
