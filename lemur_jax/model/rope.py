"""Rotary position embedding and its length extensions, with HF's formulas and rounding.

Dimension key: B batch, T length, H heads, D head dim. HF rotates the two halves of a head
(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); weights of the interleaved layout (Meta, EasyLM) are
permuted by the converter, never here.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angle per position of each pair, and the scale of cos and sin.

    float32 in HF's order of operations: at position 1e5 a different rounding is a visible angle.

    Returns:
      [D/2] float32 radians per position (for `dynamic`: those up to the trained length), scale.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # Rounded once, from float64: that is torch's float32 power in all but one pair of 200. numpy's
    # differs in one of six by a unit in the last place, 2e-4 of a logit at position 4096.
    power = (config.theta ** exponent.astype(np.float64)).astype(np.float32)
    inverse = np.float32(1.0) / power
    if config.kind == "linear":
        return inverse / np.float32(config.factor), 1.0
    if config.kind == "llama3":
        return _llama3(config, inverse), 1.0
    if config.kind == "yarn":
        return _yarn(config, power, head_dim), _yarn_scale(config)
    return inverse, 1.0


def _llama3(config: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, a band between is blended."""
    low, high = np.float32(config.low_freq_factor), np.float32(config.high_freq_factor)
    trained = np.float32(config.original_max_positions)
    factor = np.float32(config.factor)
    one = np.float32(1.0)
    # torch divides a number by a tensor as reciprocal times number, which rounds twice.
    wavelength = one / inverse * np.float32(2 * math.pi)
    smooth = (one / wavelength * trained - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    slowed = np.where(wavelength > trained / low, inverse / factor, inverse)
    in_band = (wavelength >= trained / high) & (wavelength <= trained / low)
    return np.where(in_band, blended, slowed).astype(np.float32)


def _yarn(config: RopeConfig, power: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN (arXiv:2309.00071 section 3.2): blend by how often a pair turns within the length."""

    def dimension(rotations: float) -> float:
        turns = config.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp must have a width
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    kept = (1 - ramp).astype(np.float32)
    one = np.float32(1.0)
    slowed = one / (np.float32(config.factor) * power)
    return (slowed * (one - kept) + one / power * kept).astype(np.float32)


def _yarn_scale(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)


def tables(
    config: RopeConfig, head_dim: int, positions_BT: jax.Array, segment_ids_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position, float32 [B,T,D/2]."""
    inverse, scale = frequencies(config, head_dim)
    if config.kind == "dynamic":
        inverse = _dynamic(config, head_dim, positions_BT, segment_ids_BT)
    angles = positions_BT[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _dynamic(
    config: RopeConfig, head_dim: int, positions_BT: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Dynamic NTK: the base grows with the length of the token's own document. [B,T,D/2].

    HF takes the longest row of the batch; taking each document's own length keeps packing and
    batch-mates from changing a result, and is the same for a single row. As in HF, keys already in
    a cache keep the rotation they were written with.
    """
    length = segment_ids_BT.shape[1]
    following = jnp.concatenate(
        [segment_ids_BT[:, 1:], jnp.full_like(segment_ids_BT[:, :1], -1)], axis=1
    )
    last = jnp.where(segment_ids_BT != following, jnp.arange(length), length - 1)
    end_BT = jax.lax.cummin(last, axis=1, reverse=True)
    size_BT = jnp.take_along_axis(positions_BT, end_BT, axis=1) + 1
    trained = float(config.original_max_positions)
    size_BT = jnp.maximum(size_BT, config.original_max_positions).astype(jnp.float32)
    grown = config.factor * size_BT / trained - (config.factor - 1)
    theta_BT = config.theta * grown ** (head_dim / (head_dim - 2))
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / theta_BT[..., None] ** exponent


def rotate(x_BTHD: jax.Array, cos_BTd: jax.Array, sin_BTd: jax.Array) -> jax.Array:
    """Rotates the two halves of each head; float32 inside, dtype kept."""
    x1, x2 = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTd[:, :, None, :], sin_BTd[:, :, None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x_BTHD.dtype)
