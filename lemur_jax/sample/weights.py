"""Weights as decoding wants to read them: cast once, one block for each layer."""

import dataclasses
import math

import jax

from lemur_jax.config import ModelConfig
from lemur_jax.model import attention, param
from lemur_jax.model.decoder import Block, Decoder, abstract, unstack


def for_sampling(model: Decoder, dtype: str | None = None, backend: str | None = None) -> Decoder:
    """The model that the sampler runs: weights in the compute dtype, layers unstacked.

    A decode step reads every weight once, so a master copy in float32 would double its time, and
    slicing stacked layers would copy each of them at every token. Norm scales stay float32.

    Args:
      model: layers stacked or not; not changed, and its arrays are shared where nothing differs.
      dtype: to compute in; `model.config.dtype` when None.
      backend: that the model will run on; the default one when None.
    """
    config = sampling_config(model.config, dtype, backend)
    stacked = isinstance(model.layers, Block)
    like = jax.eval_shape(unstack, abstract(config)) if not stacked else abstract(config)
    flat = {name: _cast(name, leaf, config.dtype) for name, leaf in param.flatten(model).items()}
    model = param.unflatten(like, flat)
    return unstack(model) if stacked else model


def sampling_config(
    config: ModelConfig, dtype: str | None, backend: str | None = None
) -> ModelConfig:
    """The config of `for_sampling`'s result: one dtype, a kernel of the backend, no remat.

    Raises:
      ConfigError: the dtype is unknown, or the config names a kernel that this backend lacks.
    """
    dtype = dtype or config.dtype
    config = dataclasses.replace(
        config,
        dtype=dtype,
        param_dtype=dtype,
        remat="none",
        remat_saved=(),
        remat_offloaded=(),
    )
    kernel = attention.resolve_implementation(config, backend or jax.default_backend())
    return dataclasses.replace(config, attention=kernel)


def _cast(name: str, leaf: jax.Array, dtype: str) -> jax.Array:
    return leaf if name.endswith("norm") else leaf.astype(dtype)


# Matrices by the number of leading dimensions that a product sums over. The table is looked up.
_INPUT_DIMENSIONS = {
    **dict.fromkeys(("wq", "wk", "wv", "w_gate", "w_up", "w_down", "head"), 1),
    "wo": 2,
}
# Above this the matrices are not copied.
MOST_COPIED_BYTES = 4 << 30


class OutputMajor:
    """A model's leaves with every matrix stored [outputs, inputs], for decoding one row on CPU.

    XLA's CPU compiler computes a product with one vector on one core when the matrix is
    [inputs, outputs] and on all cores when it is [outputs, inputs]. A step of the decode
    benchmark's 12.6M model takes 3.3 ms instead of 3.8 (lower quartiles of 600 interleaved chunks
    on four shared cores; the products alone 1.6 instead of 2.8, fastest of 12). For two rows or
    more [inputs, outputs] is the faster: 3.7 and 5.4 ms for the products of eight rows.

    Attributes:
      leaves: in the order of jax.tree.leaves(model).
    """

    def __init__(self, model: Decoder):
        self._shapes: list[tuple[int, ...] | None] = []
        self.leaves: list[jax.Array] = []
        for name, leaf in param.flatten(model).items():
            dimensions = _INPUT_DIMENSIONS.get(name.split("/")[-1])
            self._shapes.append(leaf.shape if dimensions else None)
            if dimensions:
                leaf = leaf.reshape(math.prod(leaf.shape[:dimensions]), -1).T
            self.leaves.append(leaf)

    @staticmethod
    def helps(model: Decoder, batch: int) -> bool:
        """Whether decoding is faster so, and the second copy in memory is affordable."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        return batch == 1 and jax.default_backend() == "cpu" and size <= MOST_COPIED_BYTES

    def as_model_reads(self, leaves: list[jax.Array]) -> list[jax.Array]:
        """The leaves in their own shapes, inside jit: the compiler folds it into the products."""
        return [
            leaf if shape is None else leaf.T.reshape(shape)
            for leaf, shape in zip(leaves, self._shapes)
        ]
