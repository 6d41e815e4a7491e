"""A checkpoint of ours as a Target: chunk by chunk, as layers or as devices of a mesh read it."""

import dataclasses
import errno
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from lemur_jax import checkpoint
from lemur_jax.config import MeshConfig, ModelConfig
from lemur_jax.convert import grain
from lemur_jax.convert.disk import DiskFile
from lemur_jax.convert.errors import ConversionError, first_few
from lemur_jax.convert.grain import Grain
from lemur_jax.convert.ours import PREFIX
from lemur_jax.convert.stored import Region, Shape, StoredTensor, contiguous, shape_of
from lemur_jax.convert.targets import Leaf
from lemur_jax.model import param
from lemur_jax.model.decoder import abstract
from lemur_jax.sharding import abstract_mesh, spec


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
        self._stores = {name: _done(future) for name, future in pending.items()}

    def write(self, name: str, region: Region, array: np.ndarray) -> None:
        """As Target. On a local disk a chunk is a file, which needs no encoding and no copy."""
        if not self._local:
            store = self._stores[name][tuple(region)]
            _done(store.write(array, can_reference_source_data_indefinitely=True))
            return
        for part, path in self._files(name, region):
            self._write_file(path, _filled(array[part], self.chunks[name]))

    def read(self, name: str, region: Region) -> np.ndarray | None:
        """As Target. What lies behind the array in a chunk at its end must be zeros too."""
        if not self._local:
            return contiguous(_done(self._stores[name][tuple(region)].read()))
        dtype, chunks = self._leaves[name].dtype, self.chunks[name]
        out = None
        for part, path in self._files(name, region):
            file, size = Path(path), math.prod(chunks) * dtype.itemsize
            if not file.is_file() or file.stat().st_size != size:
                return None
            whole = StoredTensor(file, name, chunks, dtype, ((0, size),)).read()
            if whole.shape == shape_of(region):
                return whole
            out = np.empty(shape_of(region), dtype) if out is None else out
            out[part] = whole[tuple(slice(0, n) for n in out[part].shape)]
            if (
                out[part].shape != chunks
                and _filled(out[part], chunks).tobytes() != whole.tobytes()
            ):
                return None
        return out

    def _files(self, name: str, region: Region) -> Iterator[tuple[Region, str]]:
        """The chunks of a block: where in the block, and the file."""
        chunks = self.chunks[name]
        for part in grain.regions(shape_of(region), chunks):
            numbers = [
                (whole.start + inside.start) // size
                for whole, inside, size in zip(region, part, chunks)
            ]
            yield part, f"{self._item_dir}/{PREFIX}{name}/{'.'.join(map(str, numbers))}"

    def sync(self) -> None:
        """As Target: a block is on the disk when its write returns."""

    def close(self) -> None:
        """Nothing is held open; what a kill left of TensorStore's locks goes."""
        if self._local and self._item_dir.exists():
            for lock in Path(self._item_dir).rglob("*.__lock"):
                lock.unlink()

    def _write_file(self, path: str, array: np.ndarray) -> None:
        array = contiguous(array)
        file = DiskFile(path)
        try:
            file.write(memoryview(array.reshape(-1).view(np.uint8)), 0)
            os.truncate(path, array.nbytes)  # a leftover of a kill may be longer
            file.sync()
        finally:
            file.close()


def _done(future: Any) -> Any:
    """The result of TensorStore's work.

    Raises:
      OSError: as any other write that fails: free space, or see to the network, and call again.
    """
    try:
        return future.result()
    except ValueError as error:
        text = str(error).split(" [tensorstore_spec")[0]
        full = "RESOURCE_EXHAUSTED" in text or "No space left" in text
        raise OSError(errno.ENOSPC if full else errno.EIO, text) from error


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
    if -1 in dataclasses.astuple(mesh):
        raise ConversionError(["--mesh: every size must be given, none can be -1"])
    over = abstract_mesh(mesh)
    model, found, problems = abstract(config), {}, []
    leaves = jax.tree.leaves(model, is_leaf=lambda leaf: hasattr(leaf, "get_metadata"))
    for name, leaf in zip(param.flatten(model), leaves, strict=True):
        shape = leaf.get_value().shape
        divided = spec(param.axes_of(leaf), over, shape)
        uneven = [
            f"--mesh: {_shown(over, axes)} does not divide {size}, axis {axis} of {name} "
            f"{list(shape)}: give another size"
            for axis, (size, axes) in enumerate(zip(shape, divided))
            if size % math.prod(over.shape[a] for a in _names(axes))
        ]
        problems += uneven
        if not uneven:
            found[name] = jax.sharding.NamedSharding(over, divided).shard_shape(shape)
    if problems:
        raise ConversionError(first_few(problems, "leaves"))
    return found


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _shown(over: Any, axes: str | Sequence[str] | None) -> str:
    return ",".join(f"{name}={over.shape[name]}" for name in _names(axes) if over.shape[name] > 1)


def _chunks(leaf: Leaf, shards: dict[str, Shape] | None) -> Shape:
    stacked = leaf.name.startswith("layers/")
    if shards is None:
        return grain.chunk_shape(leaf.shape, leaf.dtype.itemsize, stacked, leaf.source.cheap)
    return grain.chunk_shape(shards[leaf.name], leaf.dtype.itemsize, stacked, leaf.source.cheap)
