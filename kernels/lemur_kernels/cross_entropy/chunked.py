"""Cross-entropy whose f32 logits exist for a few tokens of each row at a time, in plain XLA.

Axis key: B batch, C tokens of a row in one chunk, E embed, V vocab (of this device).
"""

import dataclasses

import jax.numpy as jnp

from lemur_kernels.cross_entropy import shards
from lemur_kernels.cross_entropy.forward_gradient import Chunk, Setting
from lemur_kernels.cross_entropy.reference import logits_BTV


@dataclasses.dataclass(frozen=True)
class Chunked:
    """An Implementation of forward_gradient."""

    def values(self, chunk: Chunk, setting: Setting):
        return self._logits_and_values(chunk, setting)[2:]

    def logits_gradient(self, chunk: Chunk, setting: Setting, token_weights):
        logits_BCV, column_BC, log_z_BC, nll_BC = self._logits_and_values(chunk, setting)
        p_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
        of_p_BC, of_target_BC = token_weights(log_z_BC)
        is_target_BCV = column_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
        dlogits_BCV = of_p_BC[..., None] * p_BCV - jnp.where(
            is_target_BCV, of_target_BC[..., None], 0
        )
        # 16-bit inputs take 16-bit cotangents, as their product's own transpose would.
        return log_z_BC, nll_BC, dlogits_BCV.astype(chunk.x_BCE.dtype)

    def _logits_and_values(self, chunk: Chunk, setting: Setting):
        V, axis = chunk.w_EV.shape[1], setting.axis_name
        first, limit = shards.columns(V, setting.valid_vocab, axis)
        logits_BCV = logits_BTV(chunk.x_BCE, chunk.w_EV, limit)
        top_BC = shards.maximum(logits_BCV.max(-1), axis)
        total_BC = jnp.exp(logits_BCV - top_BC[..., None]).sum(-1)
        column_BC = shards.local_targets(chunk.targets_BC, first, V)
        target_BC = jnp.take_along_axis(logits_BCV, jnp.maximum(column_BC, 0)[..., None], axis=-1)[
            ..., 0
        ]
        target_BC = jnp.where(column_BC >= 0, target_BC, 0)
        total_BC, target_BC = shards.sums((total_BC, target_BC), axis)
        log_z_BC = top_BC + jnp.log(total_BC)
        return logits_BCV, column_BC, log_z_BC, log_z_BC - target_BC
