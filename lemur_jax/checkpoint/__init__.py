"""Checkpoints: flat {name: jax.Array} dictionaries to disk and back; the only door for Orbax.

On disk, RUN/checkpoints/<step>/ holds

    params/ opt/ ...    one Orbax item (OCDBT + zarr arrays) for each group of arrays, so that
                        reading one group never opens a file of another
    config.gin ...      small files of the caller, copied in
    manifest.json       step, name -> shape, dtype, digest, item; the caller's `about`; SHA-256 of
                        each small file and of the manifest itself

The manifest is written last, in one atomic act, after Orbax has committed: a directory without it
is not a checkpoint, whatever else it holds. Every tensor's digest (see digest.py) is taken on the
devices before the bytes leave them and compared after a restore, so "latest" can mean latest
verified. Nothing here depends on the mesh that saved: shardings are not stored, and a restore takes
them from its targets.

    manifest.py     which directories are checkpoints; the manifest and the small files
    items.py        one Orbax item: its layout, opening it, reading it
    digest.py       digests of arrays, the same on any devices and on the host
    agreement.py    processes that pass a stage together or fail together
    keep.py         which checkpoints of a run stay, step aside or go
    write.py        CheckpointWriter
    slices.py       checkpoints written part by part, by the converters
    read.py         restore, restore_latest, read_tensor, read_slices, OpenArray

Measured on 8 CPU devices sharing 4 busy cores. 176 MB of float32 in 25 arrays: save returns after
0.1-0.2 s (the first after 1.7 s: it compiles the digests), is complete after 0.4-0.6 s, 22 files;
restore onto another mesh 0.3 s, with verification; digests about 1 GB/s on devices and on the host.
Compression is off: on weights zstd saved 11% of the bytes and took half as long again to commit.
zarr2, not zarr3: same speed and file count, and Orbax validates only zarr2 after merging processes.

Importing this package costs what `import orbax.checkpoint` costs (about 2.8 s, 2.5 s of it JAX).
"""

from lemur_jax.checkpoint.digest import StreamingDigest
from lemur_jax.checkpoint.host import host_device
from lemur_jax.checkpoint.keep import set_aside
from lemur_jax.checkpoint.manifest import (
    CHECKPOINTS,
    FORMAT_VERSION,
    MANIFEST,
    ArrayEntry,
    CheckpointError,
    Manifest,
    TargetMismatchError,
    absolute,
    complete_steps,
    describe,
    latest,
    read_file,
    resolve,
)
from lemur_jax.checkpoint.read import OpenArray, read_slices, read_tensor, restore, restore_latest
from lemur_jax.checkpoint.slices import create_array, finish_step, slice_context
from lemur_jax.checkpoint.write import CheckpointWriter

__all__ = [
    "CHECKPOINTS",
    "FORMAT_VERSION",
    "MANIFEST",
    "ArrayEntry",
    "CheckpointError",
    "CheckpointWriter",
    "Manifest",
    "OpenArray",
    "StreamingDigest",
    "TargetMismatchError",
    "absolute",
    "complete_steps",
    "create_array",
    "describe",
    "finish_step",
    "host_device",
    "latest",
    "read_file",
    "read_slices",
    "read_tensor",
    "resolve",
    "restore",
    "restore_latest",
    "set_aside",
    "slice_context",
]
