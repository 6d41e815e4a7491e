"""The meaning of attention: the mask rule and a softmax, in the fewest lines, all in f32.

Memory O(T S) per head, forward and backward: this is the definition, not the fast way.

Axis key: B batch, T query length, S key length, H heads, K kv heads, G = H / K, D head dim.
"""

import jax
import jax.numpy as jnp

from lemur_kernels.attention.mask import Options, Rows, visible_BTS


def forward(q_BTHD, k_BSKD, v_BSKD, rows: Rows, options: Options) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the visible keys; a row with no visible key gives 0 and lse +inf."""
    B, T, H, D = q_BTHD.shape
    scores_BKGTS = _scores_BKGTS(q_BTHD, k_BSKD, rows, options)
    top_BKGT1 = scores_BKGTS.max(-1, keepdims=True)
    top_BKGT1 = jnp.where(top_BKGT1 == -jnp.inf, 0, top_BKGT1)
    weights_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
    total_BKGT1 = weights_BKGTS.sum(-1, keepdims=True)
    empty_BKGT1 = total_BKGT1 == 0
    weights_BKGTS = weights_BKGTS / jnp.where(empty_BKGT1, 1, total_BKGT1)
    out_BTKGD = jnp.einsum("BKGTS,BSKD->BTKGD", weights_BKGTS, v_BSKD.astype(jnp.float32))
    lse_BKGT1 = jnp.where(empty_BKGT1, jnp.inf, top_BKGT1 + jnp.log(total_BKGT1))
    return out_BTKGD.reshape(B, T, H, D).astype(q_BTHD.dtype), lse_BKGT1.reshape(B, H, T)


def backward(q_BTHD, k_BSKD, v_BSKD, rows, options, out_BTHD, lse_BHT, dout_BTHD):
    """The gradient by JAX's own rules, of a sum whose gradient is attention's.

    With p = exp(score - lse) and delta = dout . out held constant, attention's gradient is
    dv = p dout and dscore = p (dout . v - delta): that of sum(p (dout . v - delta)).
    """
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    dout_BTKGD = dout_BTHD.reshape(B, T, K, H // K, D).astype(jnp.float32)
    out_BTKGD = out_BTHD.reshape(B, T, K, H // K, D).astype(jnp.float32)
    delta_BKGT = jnp.einsum("BTKGD,BTKGD->BKGT", dout_BTKGD, out_BTKGD)
    lse_BKGT = lse_BHT.reshape(B, K, H // K, T)

    def total(q_BTHD, k_BSKD, v_BSKD):
        scores_BKGTS = _scores_BKGTS(q_BTHD, k_BSKD, rows, options)
        p_BKGTS = jnp.exp(scores_BKGTS - lse_BKGT[..., None])
        dp_BKGTS = jnp.einsum("BTKGD,BSKD->BKGTS", dout_BTKGD, v_BSKD.astype(jnp.float32))
        return jnp.sum(p_BKGTS * (dp_BKGTS - delta_BKGT[..., None]))

    return jax.grad(total, (0, 1, 2))(q_BTHD, k_BSKD, v_BSKD)


def _scores_BKGTS(q_BTHD, k_BSKD, rows: Rows, options: Options) -> jax.Array:
    """Scaled and capped scores, -inf where the key is hidden."""
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q_BTKGD = q_BTHD.reshape(B, T, K, H // K, D).astype(jnp.float32)
    scores_BKGTS = jnp.einsum("BTKGD,BSKD->BKGTS", q_BTKGD, k_BSKD.astype(jnp.float32))
    scores_BKGTS *= options.scale
    if options.soft_cap is not None:
        scores_BKGTS = options.soft_cap * jnp.tanh(scores_BKGTS / options.soft_cap)
    visible_B11TS = visible_BTS(rows, options.window)[:, None, None]
    return jnp.where(visible_B11TS, scores_BKGTS, -jnp.inf)
