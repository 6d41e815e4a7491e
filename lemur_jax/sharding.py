"""The device mesh and the one table from logical axes to mesh axes.

No other file names a mesh axis. Weights and activations declare logical axes; this file decides
where they lie. A logical axis that is not in the table is an error: a renamed weight must not be
replicated in silence.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lemur_jax.config import ConfigError, MeshConfig, ModelConfig

MESH_AXES = ("data", "fsdp_outer", "fsdp", "sequence", "tensor")
FSDP = ("fsdp_outer", "fsdp")

# Logical axis -> mesh axis (or axes). None is replicated, on purpose.
TABLE: dict[str, str | tuple[str, ...] | None] = {
    # weights
    "layers": None,
    "norm": None,  # RMSNorm scales: E numbers, not worth a gather
    "embed": FSDP,
    "heads": "tensor",
    "kv_heads": "tensor",  # replicated when there are fewer kv heads than the axis is wide
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "lora_rank": None,  # a few columns; the other side of an adapter lies as its weight does
    # The embedding table is looked up, not multiplied. Sharded over its vocabulary like the head,
    # or looked up while its columns lie on the axis that splits the batch, XLA falls back to a
    # full rematerialisation; so its columns are gathered over fsdp first, as any weight's are.
    "table_vocab": None,
    "table_embed": (*FSDP, "tensor"),
    "lookup_embed": "tensor",
    # activations
    "batch": ("data", *FSDP),
    "length": "sequence",
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Lays the devices out as a mesh of MESH_AXES, `dcn_data` slices outermost.

    Args:
      config: sizes; at most one is -1 and takes what the others leave.
      devices: all of the job's devices; `jax.devices()` when None.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or a TPU's axes cannot be
        laid out as this mesh.
    """
    devices = list(jax.devices()) if devices is None else devices
    sizes = resolve_mesh(config, len(devices))
    inner = tuple(getattr(sizes, axis) for axis in MESH_AXES)
    try:
        grid = _grid(inner, sizes.dcn_data, devices, split=False)
    except NotImplementedError:  # a TPU's sides (16 x 16) do not multiply to the sizes (64 x 4)
        grid = _split_grid(inner, sizes, devices)
    # Auto: the compiler propagates; Explicit axes reject gathers that carry no annotation.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _grid(inner: tuple[int, ...], slices: int, devices: list, split: bool) -> np.ndarray:
    """Devices in mesh order. On a TPU each mesh axis is made of whole sides of the slice, so that
    its groups are rings of neighbours, or with `split` of parts of sides: lines of neighbours."""
    options = {"devices": devices, "allow_split_physical_axes": split}
    if slices == 1:
        return mesh_utils.create_device_mesh(inner, **options)
    by_process = not hasattr(devices[0], "slice_index")  # hosts stand in for slices off-TPU
    return mesh_utils.create_hybrid_device_mesh(
        inner, (slices, 1, 1, 1, 1), process_is_granule=by_process, **options
    )


def _split_grid(inner: tuple[int, ...], sizes: MeshConfig, devices: list) -> np.ndarray:
    try:
        return _grid(inner, sizes.dcn_data, devices, split=True)
    except NotImplementedError as error:
        sides = [1 + max(axis) for axis in zip(*(device.coords for device in devices))]
        shown = ", ".join(f"{name}={size}" for name, size in dataclasses.asdict(sizes).items())
        raise ConfigError(
            [
                f"MeshConfig {shown} cannot be laid over a slice of {'x'.join(map(str, sides))} "
                "chips: make each size a product of its sides or of their factors"
            ]
        ) from error


def abstract_mesh(sizes: MeshConfig) -> jax.sharding.AbstractMesh:
    """The mesh of resolved sizes without any device: for shapes and shardings."""
    shape = [getattr(sizes, axis) for axis in MESH_AXES]
    shape[0] *= sizes.dcn_data
    return jax.sharding.AbstractMesh(tuple(shape), MESH_AXES)


def resolve_mesh(config: MeshConfig, device_count: int) -> MeshConfig:
    """Replaces the size -1 by what the other sizes leave of `device_count`."""
    sizes = {name: getattr(config, name) for name in (*MESH_AXES, "dcn_data")}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if free and device_count % fixed == 0:
        sizes[free[0]] = device_count // fixed
        fixed = device_count
    if fixed != device_count:
        shown = " x ".join(f"{name}={size}" for name, size in sizes.items())
        legal = [n for n in range(1, device_count + 1) if device_count % n == 0]
        if free:
            fix = (
                f"{free[0]}=-1 takes what the others leave, and {fixed} does not divide "
                f"{device_count}: change the others"
            )
        else:
            fix = f"they must multiply to {device_count}, or set one of them to -1"
        raise ConfigError(
            [
                f"MeshConfig: {shown}, but there are {device_count} devices: {fix}; legal sizes: "
                f"{', '.join(map(str, legal))}"
            ]
        )
    return MeshConfig(**sizes)


def batch_ways(mesh: MeshConfig) -> int:
    """How many ways a mesh of resolved sizes splits the rows of a batch."""
    return mesh.dcn_data * mesh.data * mesh.fsdp_outer * mesh.fsdp


def _mesh_axes(logical: str, mesh_shape: dict[str, int], size: int | None) -> tuple[str, ...]:
    if logical not in TABLE:
        raise KeyError(
            f"logical axis {logical!r} is not in lemur_jax.sharding.TABLE; "
            f"known: {', '.join(sorted(TABLE))}"
        )
    axes = TABLE[logical] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    if logical == "kv_heads" and size is not None:
        wide = math.prod(mesh_shape[a] for a in axes)
        if size < wide:
            return ()
    return axes


def spec(
    axes: tuple[str | None, ...], mesh: Any, shape: tuple[int, ...] | None = None
) -> PartitionSpec:
    """The partition of an array with these logical axes (None: not sharded).

    Args:
      axes: one logical axis for each dimension.
      mesh: Mesh or AbstractMesh.
      shape: needed where the table depends on a size (kv_heads).
    """
    mesh_shape = dict(mesh.shape)
    sizes = shape if shape is not None else (None,) * len(axes)
    entries, used = [], {}
    for logical, size in zip(axes, sizes, strict=True):
        names = () if logical is None else _mesh_axes(logical, mesh_shape, size)
        for name in names:
            if name in used:
                raise ValueError(
                    f"axes {axes}: {used[name]!r} and {logical!r} both map to mesh axis {name!r}"
                )
            used[name] = logical
        entries.append(names[0] if len(names) == 1 else (names or None))
    return PartitionSpec(*entries)


def sharding(
    axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...] | None = None
) -> NamedSharding:
    """`spec` on a concrete mesh."""
    return NamedSharding(mesh, spec(axes, mesh, shape))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the table inside jit. Without a mesh (jax.set_mesh), and where arrays
    are a device's own already (`per_device`), it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if _is_local(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, mesh, x.shape))


def _is_local(mesh: Any) -> bool:
    """Whether arrays are what one device holds: one device, or inside `per_device`."""
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return True
    return all(kind == AxisType.Manual for kind in mesh.axis_types)


def axis_size(logical: str) -> int:
    """How many ways the current mesh splits a logical axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[a] for a in _mesh_axes(logical, dict(mesh.shape), None))


def mesh_axis(logical: str) -> str:
    """The mesh axis that splits a logical axis: the name for collectives inside `per_device`."""
    (axis,) = _mesh_axes(logical, {}, None)
    return axis


def per_device(fn: Callable, in_axes: tuple, out_axes: tuple) -> Callable:
    """Runs `fn` on each device's block: the only shard_map. Kernels never see a mesh. Inside
    another `per_device` it is `fn` itself.

    Args:
      fn: takes and returns local blocks. It may communicate along `mesh_axis` of an axis that
        in_axes name, and must not otherwise.
      in_axes: logical axes of each argument.
      out_axes: logical axes of the single result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if _is_local(mesh):
        return fn

    def run(*args):
        in_specs = tuple(spec(axes, mesh, arg.shape) for axes, arg in zip(in_axes, args))
        return per_device_specs(fn, in_specs, spec(out_axes, mesh))(*args)

    return run


def per_device_specs(fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`per_device` of trees of arrays, by their PartitionSpecs."""
    # check_vma: custom_vjp kernels carry no varying-axes annotations.
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gathered(w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A weight as its layer multiplies with it. Inside `per_device`, where `w` is the device's
    part, it is gathered over the fsdp axes, and its gradient reduce-scattered over one of them
    after the other: the TPU compiler makes a reduction over one group of all chips an all-reduce
    of twice the bytes. Elsewhere the compiler gathers, and this does nothing.

    Args:
      w: in the dtype that is sent.
      axes: logical axes of the weight.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not _is_local(mesh):
        return w
    for dim, logical in enumerate(axes):
        names = () if logical is None else _mesh_axes(logical, dict(mesh.shape), None)
        names = tuple(name for name in names if name in FSDP and mesh.shape[name] > 1)
        if names:
            w = _all_gather(w, dim, names)
    return w


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(w, dim: int, names: tuple[str, ...]):
    # Along the first dimension: XLA would scatter along another one by an all-reduce and a slice.
    whole = jax.lax.all_gather(jnp.moveaxis(w, dim, 0), names, axis=0, tiled=True)
    return jnp.moveaxis(whole, 0, dim)


def _all_gather_forward(w, dim, names):
    return _all_gather(w, dim, names), None


def _all_gather_backward(dim, names, _, dw):
    dw = jnp.moveaxis(dw, dim, 0)
    for name in names:  # in the order in which the parts lie, slowest first
        dw = jax.lax.psum_scatter(dw, name, scatter_dimension=0, tiled=True)
    return (jnp.moveaxis(dw, 0, dim),)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)


def sum_over_batch(x: jax.Array, done: PartitionSpec) -> jax.Array:
    """Inside `per_device`: sums over the mesh axes that split the batch's tokens, but for those
    that `done` names, over which `x` is split itself."""
    mesh = jax.sharding.get_abstract_mesh()
    split = {name for entry in done for name in (entry if isinstance(entry, tuple) else (entry,))}
    names = [*TABLE["batch"], TABLE["length"]]
    names = tuple(name for name in names if mesh.shape[name] > 1 and name not in split)
    return jax.lax.psum(x, names) if names else x


def place(local: np.ndarray, first_row: int, rows: int, mesh: Mesh) -> jax.Array:
    """A global [M, rows, T] array over the mesh, made from the rows that this process holds.

    Args:
      local: [M, r, T], rows first_row .. first_row + r of each micro-batch.
      first_row: as `local_row_range` gives it.
      rows: R, rows of a micro-batch over all processes.
    """
    where = sharding((None, "batch", "length"), mesh)

    def block(index):
        start, stop, _ = index[1].indices(rows)
        return local[index[0], start - first_row : stop - first_row, index[2]]

    with jax.transfer_guard("allow"):  # the one place where batches are meant to cross
        return jax.make_array_from_callback((local.shape[0], rows, local.shape[2]), where, block)


def local_row_range(rows: int, mesh: Mesh) -> tuple[int, int]:
    """Smallest range of global batch rows that covers what this process's devices hold."""
    where = sharding(("batch",), mesh)
    indices = where.addressable_devices_indices_map((rows,)).values()
    ranges = [index[0].indices(rows)[:2] for index in indices]
    return min(r[0] for r in ranges), max(r[1] for r in ranges)


def check(
    model: ModelConfig,
    mesh: MeshConfig,
    *,
    rows: int | None = None,
    sequence_length: int | None = None,
) -> None:
    """Raises before anything is traced if the model does not divide over the mesh.

    Args:
      model: the model.
      mesh: resolved sizes (no -1).
      rows: rows of one micro-batch, over all devices.
      sequence_length: T.

    Raises:
      ConfigError: each problem with the numbers and the nearest legal ones.
    """
    problems = []

    def divides(name: str, size: int, axis: str, ways: int):
        if size % ways:
            legal = [n for n in range(1, size + 1) if size % n == 0 and n <= 4 * ways]
            problems.append(
                f"{name}={size} must divide by {axis}={ways}; legal {axis}: "
                f"{', '.join(map(str, legal))}"
            )

    divides("ModelConfig.heads", model.heads, "MeshConfig.tensor", mesh.tensor)
    divides("ModelConfig.mlp", model.mlp, "MeshConfig.tensor", mesh.tensor)
    fsdp = mesh.fsdp_outer * mesh.fsdp
    divides(
        "ModelConfig.embed", model.embed, "MeshConfig.fsdp_outer*fsdp*tensor", fsdp * mesh.tensor
    )
    padded = padded_vocab(model)
    divides("padded vocabulary", padded, "MeshConfig.tensor", mesh.tensor)
    if model.kv_heads % mesh.tensor and mesh.tensor % model.kv_heads:
        legal = [
            n
            for n in range(1, model.heads + 1)
            if model.heads % n == 0 and (model.kv_heads % n == 0 or n % model.kv_heads == 0)
        ]
        problems.append(
            f"ModelConfig.kv_heads={model.kv_heads} and MeshConfig.tensor={mesh.tensor}: one must "
            f"divide the other; legal tensor: {', '.join(map(str, legal))}"
        )
    if rows is not None:
        ways = batch_ways(mesh)
        if rows % ways:
            below, above = rows - rows % ways, rows + ways - rows % ways
            problems.append(
                f"rows of a micro-batch (DataConfig.batch_size / TrainConfig.micro_batches) = "
                f"{rows} must divide by MeshConfig data*fsdp_outer*fsdp*dcn_data={ways}; nearest "
                f"legal: {', '.join(str(n) for n in (below, above) if n)}"
            )
    if sequence_length is not None:
        divides("sequence_length", sequence_length, "MeshConfig.sequence", mesh.sequence)
    if problems:
        raise ConfigError(problems)


def padded_vocab(model: ModelConfig) -> int:
    """Rows of the vocabulary in memory: padded so that any usual mesh divides them."""
    return -(-model.vocab_size // model.vocab_multiple) * model.vocab_multiple
