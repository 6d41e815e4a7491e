"""Weights: declared once, with shape and logical axes; everything else is derived from that.

The model's trees are nested flax modules whose leaves are `nnx.Param`; a leaf under `layers` has a
leading L in front of the axes it was declared with. On disk and in converter tables a weight has a
flat name such as `layers/wq`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax import sharding


def weight(
    key: jax.Array | None,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: str,
    stddev: float | None = None,
) -> nnx.Param:
    """One weight: normal with `stddev`, or constant: ones for a norm's scale, zeros for a bias."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and axes {axes} must have the same length")
    if stddev is not None:
        value = (stddev * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    elif axes == ("norm",):
        value = jnp.ones(shape, dtype)
    else:
        value = jnp.zeros(shape, dtype)
    return nnx.Param(value, axes=axes, declared_shape=shape)


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def axes_of(param: nnx.Param) -> tuple[str | None, ...]:
    """Logical axes of a leaf, `layers` in front where it is stacked.

    Optimizer states are trees of the same Params. A leaf that has not the shape of its parameter
    (Adafactor's factored moments, sums over one axis) is small, and replicated.
    """
    metadata, shape = param.get_metadata(), param.get_value().shape
    if shape == metadata["declared_shape"]:
        return metadata["axes"]
    if shape[1:] == metadata["declared_shape"]:
        return ("layers", *metadata["axes"])
    return (None,) * len(shape)


def whole(param: nnx.Param, dtype: str) -> jax.Array:
    """A weight in the compute dtype as its layer multiplies with it: cast, then gathered."""
    return sharding.gathered(param[...].astype(dtype), param.get_metadata()["axes"])


def _leaf_sharding(leaf: Any, mesh: Mesh) -> Any:
    if not _is_param(leaf):
        return NamedSharding(mesh, PartitionSpec())
    shape = leaf.get_value().shape
    return leaf.replace(sharding.sharding(axes_of(leaf), mesh, shape))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The same tree (abstract or not) with a NamedSharding in place of each array."""
    return jax.tree.map(lambda leaf: _leaf_sharding(leaf, mesh), tree, is_leaf=_is_param)


def _name(path: tuple) -> str:
    parts = []
    for key in path:
        for attribute in ("name", "key", "idx"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
    if parts[-1] == "value":  # the array inside a Param
        parts.pop()
    return "/".join(parts)


def flatten(tree: Any) -> dict[str, Any]:
    """Flat names -> arrays, e.g. {"layers/wq": [L,E,H,D]}. Works for optimizer states too."""
    flat = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return flat


def unflatten(like: Any, flat: dict[str, Any]) -> Any:
    """The tree `like` with its leaves taken by name from `flat`; the names must agree exactly."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [_name(path) for path, _ in paths]
    missing, extra = set(names) - set(flat), set(flat) - set(names)
    if missing or extra:
        raise KeyError(f"missing weights: {sorted(missing)}; unknown weights: {sorted(extra)}")
    return jax.tree_util.tree_unflatten(structure, [flat[name] for name in names])


def abstract_with_shardings(tree: Any, mesh: Mesh) -> Any:
    """ShapeDtypeStructs that carry where each array goes: the target of a restore."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings(tree, mesh),
    )


@dataclasses.dataclass(frozen=True)
class Size:
    """Parameters and bytes of a tree, in all and without the embedding table and the head."""

    parameters: int
    bytes: int
    without_vocabulary: int


def size(tree: Any) -> Size:
    """Counts a (possibly abstract) model."""
    flat = flatten(tree)
    count = {name: leaf.size for name, leaf in flat.items()}
    return Size(
        parameters=sum(count.values()),
        bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in flat.values()),
        without_vocabulary=sum(n for name, n in count.items() if name not in ("table", "head")),
    )
