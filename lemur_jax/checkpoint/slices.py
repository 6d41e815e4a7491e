"""A checkpoint written part by part, by callers that cannot hold it: see `convert`.

The layout is Orbax's without its database: one zarr array in a directory of its own, one file for
each chunk (no name or byte depends on when or by whom it was written), and the tree in _METADATA.
`restore` and Orbax read it like any other. The manifest comes last here too.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore
from etils import epath

from lemur_jax.checkpoint.items import location
from lemur_jax.checkpoint.manifest import (
    MANIFEST,
    ArrayEntry,
    Manifest,
    absolute,
    manifest_bytes,
    write_atomically,
)

# As many chunks as are encoded or on their way to disk at a time, for all arrays of a process.
_CONTEXT = {"file_io_concurrency": {"limit": 4}, "data_copy_concurrency": {"limit": 4}}
_ITEM_FILE = "_METADATA"
_STEP_FILE = "_CHECKPOINT_METADATA"


def slice_context() -> tensorstore.Context:
    """What bounds the memory of reads and writes by slices: for all arrays that are opened."""
    return tensorstore.Context(_CONTEXT)


def create_array(
    item_dir: epath.PathLike,
    name: str,
    shape: Sequence[int],
    dtype: np.dtype,
    chunks: Sequence[int],
    context: tensorstore.Context,
) -> Any:
    """A future of a TensorStore to write to; one that lies there already is opened.

    Args:
      item_dir: of the group of arrays.
      name: of the array.
      shape, dtype: of the whole array.
      chunks: of what is written and read as one; writes must be of whole chunks.
      context: from `slice_context`.
    """
    spec = {
        "driver": "zarr",
        "kvstore": location(absolute(item_dir) / name),
        # A chunk of zeros is a chunk: one that lacks was lost.
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": list(shape),
            "chunks": list(chunks),
            "dtype": _zarr_dtype(dtype),
            "compressor": None,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "dimension_separator": ".",
        },
    }
    return tensorstore.open(spec, context=context, open=True, create=True)


def _zarr_dtype(dtype: np.dtype) -> str:
    return "bfloat16" if dtype.name == "bfloat16" else dtype.newbyteorder("<").str


def finish_step(
    step_dir: epath.PathLike,
    step: int,
    entries: Mapping[str, ArrayEntry],
    about: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> None:
    """Makes a checkpoint of arrays that have been written whole: trees, small files, manifest.

    Args:
      step_dir: where the items lie.
      step: of the manifest.
      entries: every array, with its digest.
      about: any JSON.
      files: contents of small files, by their name relative to the checkpoint.
    """
    step_dir = absolute(step_dir)
    items = sorted({entry.item for entry in entries.values()})
    for item in items:
        names = [name for name, entry in entries.items() if entry.item == item]
        write_atomically(step_dir / item / _ITEM_FILE, _tree(sorted(names)))
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    about_items = {"item_handlers": dict.fromkeys(items, handler), "custom_metadata": {}}
    write_atomically(step_dir / _STEP_FILE, json.dumps(about_items).encode())
    for name, data in files.items():
        (step_dir / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(step_dir / name, data)
    manifest = Manifest(
        step=step,
        jax_version=jax.__version__,
        arrays=entries,
        about=about,
        files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    )
    write_atomically(step_dir / MANIFEST, manifest_bytes(manifest))


def _tree(names: Sequence[str]) -> bytes:
    """What Orbax says of a flat dictionary of arrays."""
    tree = {
        f"({name!r},)": {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
        for name in names
    }
    content = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    return json.dumps(content).encode()
