"""One Orbax item (a group of arrays): how it is laid out on disk, opened and read."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from lemur_jax.checkpoint.manifest import ArrayEntry, CheckpointError

# A chunk is the unit of reading. Capped, so that restoring a large array onto many devices does
# not read the same bytes once for each; and never across the leading axis (layers) when a slice
# of it is large enough to stand alone, so that one layer can be read without the others.
_CHUNK_BYTES = 32 << 20
_SLICE_BYTES = 256 << 10


def handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's reader and writer of one item, told to store and consult no shardings."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=False, use_compression=False, type_handler_registry=registry
    )


def save_args(array: jax.Array) -> ocp.SaveArgs:
    """The chunks in which an array is stored."""
    shard = array.sharding.shard_shape(array.shape)
    bytes_of_a_slice = math.prod(shard[1:]) * array.dtype.itemsize
    alone = array.ndim > 1 and bytes_of_a_slice >= _SLICE_BYTES
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if alone else ())


def open_array(item_dir: epath.Path, name: str, context: tensorstore.Context | None = None) -> Any:
    """A future of the array's TensorStore: reads the item's index, no data."""
    spec = {
        "driver": "zarr",
        "fill_missing_data_reads": False,  # a lost chunk is an error, not zeros
        "kvstore": kvstore(item_dir, name),
    }
    return tensorstore.open(spec, context=context, open=True, read=True)


def kvstore(item_dir: epath.Path, name: str) -> Any:
    """Where an array's keys are: in Orbax's database, or each in a file of its own (convert)."""
    if (item_dir / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": location(item_dir), "path": f"{name}/"}
    return location(item_dir / name)


def location(path: epath.Path) -> Any:
    """A directory as TensorStore names it, with a slash at the end: local, gs:// or s3://.

    AWS_ENDPOINT_URL(_S3), AWS's own variables for stores that speak S3, are not known to it.
    """
    if "://" not in str(path):
        return f"file://{os.path.abspath(path)}/"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if str(path).startswith("s3://") and endpoint:
        bucket, _, key = str(path).removeprefix("s3://").partition("/")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        own = {"endpoint": endpoint, "aws_region": region}
        return {"driver": "s3", "bucket": bucket, "path": f"{key}/"} | own
    return f"{path}/"


def _check_index(item_dir: epath.Path, entries: Mapping[str, ArrayEntry]) -> None:
    """Opens every array first, so that a damaged index is one error that names all it touches.

    (Found by Orbax, the first of many reads in flight fails, and the others complain to stderr.)
    """
    bad: dict[str, Exception] = {}
    for name, future in {name: open_array(item_dir, name) for name in entries}.items():
        try:
            store = future.result()
        except ValueError as error:
            bad[name] = error
            continue
        found, said = (store.dtype.name, store.shape), (entries[name].dtype, entries[name].shape)
        if found != said:
            bad[name] = ValueError(f"{name} is stored as {found}, the manifest says {said}")
    if bad:
        raise CheckpointError(unreadable(item_dir, list(bad), next(iter(bad.values()))))


def read_item(
    item_dir: epath.Path,
    entries: Mapping[str, ArrayEntry],
    targets: Mapping[str, jax.ShapeDtypeStruct] | None,
) -> dict[str, Any]:
    """Arrays of one item, by Orbax: on the targets' shardings, or numpy when there are none."""
    if targets is None:
        how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in entries}
    else:
        how = {
            name: ocp.ArrayRestoreArgs(
                sharding=targets[name].sharding,
                global_shape=entry.shape,
                dtype=np.dtype(targets[name].dtype),
                strict=True,
            )
            for name, entry in entries.items()
        }
    _check_index(item_dir, entries)
    arguments = ocp.args.PyTreeRestore(
        item=dict.fromkeys(entries, 0), restore_args=how, partial_restore=True
    )
    arrays = handler().restore(item_dir, args=arguments)
    # Numpy reads scalars as numpy scalars.
    return arrays if targets is not None else {n: np.asarray(a) for n, a in arrays.items()}


def unreadable(item_dir: epath.Path, names: Sequence[str], error: Exception) -> str:
    """The message for arrays that cannot be read."""
    return (
        f"unreadable checkpoint: {some(names)} in {item_dir}. "
        f"Cause: {type(error).__name__}: {_brief(error)}. "
        "Use another checkpoint, or copy this one again from where it came"
    )


def some(names: Sequence[str] | Mapping[str, Any]) -> str:
    """The first few of `names`, for a message."""
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _brief(error: BaseException) -> str:
    """TensorStore's message without the specification it appends, which is longer than a page."""
    return re.sub(r" \[(tensorstore_spec|source locations).*", "", str(error), flags=re.DOTALL)
