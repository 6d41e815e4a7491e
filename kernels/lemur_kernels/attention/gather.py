"""Attention when the tokens of a row lie on several devices: every device gathers all keys.

The plain form beside ring.py: one transfer ahead of one kernel call. Only a device's own keys and
values are kept for the backward pass, which gathers them again; their gradients are summed over
the devices in f32, each device receiving its own part alone (JAX's own transpose of the gather
would sum whole dk and dv on every device, in k's dtype). See README.md for bytes and memory.

Axis key: B batch, T query length, S key length, H heads, K kv heads, D head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lemur_kernels.attention import api
from lemur_kernels.attention.mask import Rows


def gather_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: str,
    axis_name: str,
) -> jax.Array:
    """`attention` of this device's queries to the keys of all devices along a mesh axis.

    For use inside shard_map, with queries, keys and their rows all split over the axis, in any
    order of tokens. The queries are a part of the keys, so `attention` is called unpacked.

    Args:
      q_BTHD, k_BSKD, v_BSKD and the rows: this device's part; otherwise as `attention`.
      scale, window, soft_cap, implementation: as `attention`.
      axis_name: the mesh axis.

    Returns:
      out_BTHD in q's dtype, this device's part. Differentiable once with respect to q, k and v.

    Raises:
      ValueError: as `attention`.
    """
    rows = Rows(q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS)
    call = api.prepared(
        q_BTHD, k_BSKD, v_BSKD, rows, False, scale, window, soft_cap, implementation
    )
    return _gather(*call, implementation, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _gather(q_BTHD, k_BSKD, v_BSKD, rows, options, implementation, axis_name):
    return _forward(q_BTHD, k_BSKD, v_BSKD, rows, options, implementation, axis_name)[0]


def _forward(q_BTHD, k_BSKD, v_BSKD, rows, options, implementation, axis_name):
    kernel = api.implementation_named(implementation)
    every_key = _from_all_devices(k_BSKD, v_BSKD, rows, axis_name)
    out_BTHD, lse_BHT = api.saved(*kernel.forward(q_BTHD, *every_key, options))
    return out_BTHD, (q_BTHD, k_BSKD, v_BSKD, rows, out_BTHD, lse_BHT)


def _backward(options, implementation, axis_name, residuals, dout_BTHD):
    residuals, dout_BTHD = api.differentiable_once(residuals, dout_BTHD)
    q_BTHD, k_BSKD, v_BSKD, rows, out_BTHD, lse_BHT = residuals
    kernel = api.implementation_named(implementation)
    every_key = _from_all_devices(k_BSKD, v_BSKD, rows, axis_name)
    dq, *dkv = kernel.backward(q_BTHD, *every_key, options, out_BTHD, lse_BHT, dout_BTHD)
    dk, dv = (
        lax.psum_scatter(x.astype(jnp.float32), axis_name, scatter_dimension=1, tiled=True)
        for x in dkv
    )
    return dq, dk.astype(k_BSKD.dtype), dv.astype(v_BSKD.dtype), None


_gather.defvjp(_forward, _backward)


def _from_all_devices(k_BSKD, v_BSKD, rows: Rows, axis_name: str):
    """k, v and rows with the keys of all devices."""
    own = (k_BSKD, v_BSKD, rows.kv_positions_BS, rows.kv_segments_BS)
    k, v, positions, segments = lax.all_gather(own, axis_name, axis=1, tiled=True)
    return k, v, Rows(rows.q_positions_BT, positions, rows.q_segments_BT, segments)
