"""What attention's tests compare with: the mask rule, the softmax and its gradient in float64.

Axis key: B batch, T query length, S key length, H heads, K kv heads, D head dim.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Attended(NamedTuple):
    out: np.ndarray  # BTHD
    lse: np.ndarray  # BHT, +inf for a row that sees nothing
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def visible(q_positions, kv_positions, q_segments, kv_segments, window=None) -> np.ndarray:
    """The mask rule for one row, [T, S]."""
    q_positions, kv_positions, q_segments, kv_segments = (
        np.asarray(x, np.int64) for x in (q_positions, kv_positions, q_segments, kv_segments)
    )
    back = q_positions[:, None] - kv_positions[None]
    near = (back >= 0) & (back < (np.inf if window is None else window))
    return near & (q_segments[:, None] == kv_segments[None]) & (q_segments[:, None] != 0)


def float64(q, k, v, dout, rows, *, scale=None, window=None, soft_cap=None) -> Attended:
    """Attention and its gradient, head by head.

    Args:
      q, k, v, dout: [B,T,H,D], [B,S,K,D] twice, [B,T,H,D]; dout None gives gradients of 0.
      rows: q_positions, kv_positions, q_segments, kv_segments.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    dout = np.zeros_like(q) if dout is None else np.asarray(dout, np.float64)
    B, T, H, D = q.shape
    group = H // k.shape[2]
    scale = D**-0.5 if scale is None else scale
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    lse = np.full((B, H, T), np.inf)
    for b in range(B):
        sees = visible(*(row[b] for row in rows), window)
        some = sees.any(-1)
        for h in range(H):
            g = h // group
            scores, slope = q[b, :, h] @ k[b, :, g].T * scale, 1.0
            if soft_cap is not None:
                slope = 1 - np.tanh(scores / soft_cap) ** 2
                scores = soft_cap * np.tanh(scores / soft_cap)
            scores = np.where(sees, scores, -np.inf)
            top = np.where(some, scores.max(-1, initial=-np.inf), 0)
            p = np.exp(scores - top[:, None])
            lse[b, h, some] = (top + np.log(np.where(some, p.sum(-1), 1)))[some]
            p /= np.where(some, p.sum(-1), 1)[:, None]
            out[b, :, h] = p @ v[b, :, g]
            dp = dout[b, :, h] @ v[b, :, g].T
            ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * slope
            dq[b, :, h] = ds @ k[b, :, g] * scale
            dk[b, :, g] += ds.T @ q[b, :, h] * scale
            dv[b, :, g] += p.T @ dout[b, :, h]
    return Attended(out, lse, dq, dk, dv)


def packed_rows(*lengths_of_rows, T):
    """Positions and segments [B, T] of rows packed with documents of the given lengths."""
    positions = np.zeros((len(lengths_of_rows), T), np.int32)
    segments = np.zeros_like(positions)
    for row, lengths in enumerate(lengths_of_rows):
        start = 0
        for number, length in enumerate(lengths, 1):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = number
            start += length
    return jnp.array(positions), jnp.array(segments)


def draw(seed, *shapes, dtype=jnp.float32):
    rng = np.random.default_rng(seed)  # in numpy: jax.random compiles for each shape
    return [jnp.asarray(rng.normal(size=s).astype(np.float32).astype(dtype)) for s in shapes]


def qkv(B=2, T=40, H=6, K=2, D=8, S=None, seed=0, **kw):
    """q, k, v and dout."""
    S = T if S is None else S
    return draw(seed, (B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D), **kw)
