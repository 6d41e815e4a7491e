"""The meaning of attention: the mask rule and a softmax, in the fewest lines.

Axis key: B batch, T query length, S key length, H heads, K kv heads, G = H / K, D head dim.
"""

import jax
import jax.numpy as jnp


def visible_BTS(
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
) -> jax.Array:
    """Which key each query may attend to: same non-zero segment, position not later (bool)."""
    same_segment = q_segments_BT[:, :, None] == kv_segments_BS[:, None, :]
    not_later = kv_positions_BS[:, None, :] <= q_positions_BT[:, :, None]
    return same_segment & not_later & (q_segments_BT != 0)[:, :, None]


def reference(q_BTHD, k_BSKD, v_BSKD, visible_BTS, scale: float) -> jax.Array:
    """Softmax attention over the visible keys, all in f32; a row with no visible key gives 0.

    Memory O(T S) per head, forward and backward: this is the definition, not the fast way.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q_BTKGD = q_BTHD.reshape(B, T, K, H // K, D).astype(jnp.float32)
    scores_BKGTS = jnp.einsum("BTKGD,BSKD->BKGTS", q_BTKGD, k_BSKD.astype(jnp.float32)) * scale
    mask_B11TS = visible_BTS[:, None, None]
    # `where=` leaves hidden keys out of the maximum and the sum and gives them probability 0;
    # `initial=0` keeps the maximum finite in a row with no visible key.
    top_BKGT1 = scores_BKGTS.max(-1, keepdims=True, where=mask_B11TS, initial=-jnp.inf)
    top_BKGT1 = jax.lax.stop_gradient(jnp.where(top_BKGT1 == -jnp.inf, 0, top_BKGT1))
    weights_BKGTS = jnp.exp(jnp.where(mask_B11TS, scores_BKGTS - top_BKGT1, -jnp.inf))
    total_BKGT1 = weights_BKGTS.sum(-1, keepdims=True)
    weights_BKGTS = weights_BKGTS / jnp.where(total_BKGT1 == 0, 1, total_BKGT1)
    out_BTKGD = jnp.einsum("BKGTS,BSKD->BTKGD", weights_BKGTS, v_BSKD.astype(jnp.float32))
    return out_BTKGD.reshape(B, T, H, D).astype(q_BTHD.dtype)
