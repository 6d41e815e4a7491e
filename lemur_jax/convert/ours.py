"""A checkpoint of ours, opened as a Source: parts of its arrays through TensorStore."""

import itertools
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lemur_jax import checkpoint
from lemur_jax.config import ModelConfig, lora_config, model_config
from lemur_jax.convert.adapted import ADAPTERS, Adapted
from lemur_jax.convert.cast import cast, check_dtype
from lemur_jax.convert.disk import aligned_empty
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.grain import Grain, of_chunks
from lemur_jax.convert.model import Index, region_of
from lemur_jax.convert.recognise import step_directory
from lemur_jax.convert.safetensors import numpy_dtype
from lemur_jax.convert.small_files import HF_DIR, TOKENIZER_DIR
from lemur_jax.convert.stored import Region, Shape, StoredTensor, shape_of
from lemur_jax.model import lora, param
from lemur_jax.model.decoder import abstract
from lemur_jax.sharding import padded_vocab

PREFIX = "params/"  # of the names of weights in a checkpoint


@dataclass(frozen=True)
class OurSource:
    """A checkpoint that holds exactly its model. See model.Source.

    Attributes:
      step_dir: the checkpoint.
      manifest: what it says of itself.
      leaves: shape of each leaf.
      asked: the dtype that every weight is cast to; None: as stored.
      context: bounds what is in flight.
      opened: arrays that have been opened.
    """

    path: str
    config: ModelConfig
    extras: dict[str, Any] | None
    step_dir: os.PathLike
    manifest: checkpoint.Manifest
    leaves: dict[str, Shape]
    asked: str | None
    context: Any
    opened: dict[str, checkpoint.OpenArray] = field(default_factory=dict)
    format: str = "lemur"

    @property
    def names(self) -> tuple[str, ...]:
        """As Source."""
        return tuple(self.leaves)

    def shape(self, name: str) -> Shape:
        """As Source."""
        return self.leaves[name]

    def dtype(self, name: str) -> np.dtype:
        """As Source."""
        return numpy_dtype(self.asked or self.manifest.arrays[PREFIX + name].dtype)

    def read(self, name: str, index: Index = None) -> np.ndarray:
        """As Source."""
        region, squeezed = region_of(index, self.shape(name))
        opened = self._open(name)
        directory = opened.plain_directory
        if directory is None:
            array = opened.read(region)
        else:
            stored = numpy_dtype(self.manifest.arrays[PREFIX + name].dtype)
            array = _read_files(Path(directory), stored, opened.chunks, region)
        return cast(array, self.dtype(name), name)[squeezed]

    def grain(self, name: str) -> Grain:
        """As Source: the stored chunks."""
        return of_chunks(self.shape(name), self._open(name).chunks, written=False)

    def where(self, name: str, index: tuple[int, ...]) -> str:
        """As Source."""
        return f"{PREFIX}{name}{list(index)} in {self.step_dir}"

    def files(self) -> dict[str, bytes]:
        """As Source."""
        return {
            name: checkpoint.read_file(self.step_dir, name)
            for name in self.manifest.files
            if name.startswith((f"{HF_DIR}/", f"{TOKENIZER_DIR}/"))
        }

    def digests(self) -> dict[str, str]:
        """As Source: of the arrays as they are stored, whatever dtype was asked for."""
        return {name: self.manifest.arrays[PREFIX + name].digest for name in self.leaves}

    def with_config(self, config: ModelConfig) -> "OurSource":
        """The same weights under another config, which must pad the vocabulary alike.

        Raises:
          ConversionError: it does not.
        """
        check_padding(self.step_dir, self.config, config)
        return replace(self, config=config)

    def pair(self, target: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The adapters A [I..., R] and B [R, O...] of a weight of one layer."""
        return tuple(
            self._open_stored(f"{ADAPTERS}/layers/{target}_{side}").read(
                (slice(layer, layer + 1), *(slice(0, n) for n in shape[1:]))
            )[0]
            for side, shape in ((s, self._adapter_shape(target, s)) for s in "ab")
        )

    def _adapter_shape(self, target: str, side: str) -> Shape:
        return self.manifest.arrays[f"{ADAPTERS}/layers/{target}_{side}"].shape

    def _open(self, name: str) -> checkpoint.OpenArray:
        return self._open_stored(PREFIX + name)

    def _open_stored(self, stored: str) -> checkpoint.OpenArray:
        if stored not in self.opened:
            self.opened[stored] = checkpoint.OpenArray(
                self.step_dir, stored, self.manifest.arrays[stored], self.context
            )
        return self.opened[stored]


def _read_files(directory: Path, dtype: np.dtype, chunks: Shape, region: Region) -> np.ndarray:
    """A region out of chunks that are files: as TensorStore would, without its copies.

    Raises:
      CheckpointError: a file is missing or too short.
    """
    first = [part.start // size for part, size in zip(region, chunks)]
    last = [-(-part.stop // size) for part, size in zip(region, chunks)]
    out = None
    for index in itertools.product(*(range(a, b) for a, b in zip(first, last))):
        inside, place = [], []
        for number, size, wanted in zip(index, chunks, region):
            low, high = max(wanted.start, number * size), min(wanted.stop, (number + 1) * size)
            inside.append(slice(low - number * size, high - number * size))
            place.append(slice(low - wanted.start, high - wanted.start))
        path = directory / ".".join(map(str, index))
        nbytes = math.prod(chunks) * dtype.itemsize
        try:
            part = StoredTensor(path, path.name, chunks, dtype, ((0, nbytes),)).read(tuple(inside))
        except (OSError, ConversionError) as error:
            raise checkpoint.CheckpointError(
                f"unreadable checkpoint: {error}. Use another checkpoint, or copy this one again "
                "from where it came"
            ) from error
        if part.shape == shape_of(region):
            return part
        out = aligned_empty(shape_of(region), dtype) if out is None else out
        out[tuple(place)] = part
    return aligned_empty(shape_of(region), dtype) if out is None else out


def check_padding(path: os.PathLike, stored: ModelConfig, asked: ModelConfig) -> None:
    """Raises ConversionError unless both configs pad the vocabulary to the same rows."""
    if padded_vocab(stored) != padded_vocab(asked):
        raise ConversionError(
            [
                f"{path} holds {padded_vocab(stored)} vocabulary rows, "
                f"ModelConfig.vocab_multiple={asked.vocab_multiple} asks for "
                f"{padded_vocab(asked)}: set it to {stored.vocab_multiple}"
            ]
        )


def open_ours(path: str | Path, *, dtype: str | None = None) -> OurSource | Adapted:
    """Opens a run (its newest checkpoint), a checkpoints directory or a checkpoint. Of a run with
    LoRA it is the model with the adapters added.

    Raises:
      ConversionError: the checkpoint does not say which model it holds, or holds another one.
      CheckpointError: there is none, or a damaged one.
    """
    check_dtype(dtype)
    step_dir = step_directory(path)
    manifest = checkpoint.describe(step_dir)
    if "model" not in manifest.about:
        raise ConversionError([f"{step_dir} does not say which model it holds (about['model'])"])
    config = model_config(manifest.about["model"])
    adapters = lora_config(manifest.about.get("lora"))
    leaves = {name: leaf.shape for name, leaf in param.flatten(abstract(config)).items()}
    expected = {PREFIX + name: shape for name, shape in leaves.items()}
    if adapters is not None:
        added = param.flatten(lora.abstract(adapters, config))
        expected |= {f"{ADAPTERS}/{name}": leaf.shape for name, leaf in added.items()}
    _check_holds(step_dir, manifest, expected)
    config = replace(config, param_dtype=dtype or manifest.arrays[PREFIX + "table"].dtype)
    extras = manifest.about.get("hf_extras") or None
    context = checkpoint.slice_context()
    found = OurSource(str(path), config, extras, step_dir, manifest, leaves, dtype, context)
    return found if adapters is None else Adapted(found, adapters, found.pair, str(step_dir))


def _check_holds(step_dir, manifest, leaves) -> None:
    stored = {
        name: entry
        for name, entry in manifest.arrays.items()
        if name.startswith((PREFIX, f"{ADAPTERS}/"))
    }
    problems = [f"{step_dir} lacks {name}" for name in leaves if name not in stored]
    problems += [
        f"{step_dir} holds {name}, which its model does not have"
        for name in stored
        if name not in leaves
    ]
    problems += [
        f"{step_dir}: {name} has shape {list(stored[name].shape)}, its model has {list(shape)}"
        for name, shape in leaves.items()
        if name in stored and stored[name].shape != shape
    ]
    if problems:
        raise ConversionError(problems)
