"""Attention when the tokens of a row lie on several devices: keys and values go around a ring.

Each device keeps its queries. The keys and values, with their positions and segments, move to the
next device n - 1 times, and each device merges what its queries see of every visitor, in f32, by
the log-sum-exp (Ring Attention, arXiv:2310.01889). A step's transfer is issued before its
computation, which does not need it, so that the two can overlap. In the backward pass the f32
gradients of a visitor travel with it, one step behind, and come home after n moves.

A visitor of which no query here can see any key costs its transfer only. The mask rule knows
tokens by position and segment, so any order of tokens over the devices gives the same result; the
order decides how evenly the work is spread. See README.md for bytes and balance.

Axis key: B batch, T query length, S key length, H heads, K kv heads, D head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lemur_kernels.attention import api
from lemur_kernels.attention.mask import Options, Rows, block_ranges, may_see

# Tokens of one block in the test that skips a visitor. Devices that hold several stretches of a
# row need blocks no longer than a stretch for the test to be sharp.
SKIP_BLOCK = 128


def ring_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    packed: bool,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: str,
    axis_name: str,
) -> jax.Array:
    """`attention` of this device's queries to the keys of all devices along a mesh axis.

    For use inside shard_map, with queries, keys and their rows all split over the axis.

    Args:
      q_BTHD, k_BSKD, v_BSKD and the rows: this device's part; otherwise as `attention`.
      packed: `attention`'s promise, for the tokens of one device by themselves. It holds when
        each device has one unbroken stretch of a packed row.
      scale, window, soft_cap, implementation: as `attention`.
      axis_name: the mesh axis.

    Returns:
      out_BTHD in q's dtype, this device's part. Each device's share is rounded to q's dtype before
      the f32 merge. Differentiable once with respect to q, k and v.

    Raises:
      ValueError: as `attention`.
    """
    rows = Rows(q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS)
    call = api.prepared(
        q_BTHD, k_BSKD, v_BSKD, rows, packed, scale, window, soft_cap, implementation
    )
    return _ring(*call, implementation, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _ring(q_BTHD, k_BSKD, v_BSKD, rows, options, implementation, axis_name):
    return _forward(q_BTHD, k_BSKD, v_BSKD, rows, options, implementation, axis_name)[0]


def _forward(q_BTHD, k_BSKD, v_BSKD, rows, options, implementation, axis_name):
    kernel = api.implementation_named(implementation)
    can_see = _skip_test(rows, options)
    visitor_options = Options(False, options.scale, options.window, options.soft_cap)

    def visit(merged, visitor):
        """Merges what the queries see of a visitor's keys."""

        def look(merged):
            k, v, visitor_rows = _as_seen_from(rows, visitor)
            return _merge(merged, kernel.forward(q_BTHD, k, v, visitor_rows, visitor_options))

        return lax.cond(can_see(visitor), look, lambda merged: merged, merged)

    own = (k_BSKD, v_BSKD, rows.kv_positions_BS, rows.kv_segments_BS)
    steps = lax.axis_size(axis_name) - 1
    visitor = _pass_on(own, axis_name) if steps else None
    out_BTHD, lse_BHT = kernel.forward(q_BTHD, k_BSKD, v_BSKD, rows, options)
    merged = out_BTHD.astype(jnp.float32), lse_BHT
    if steps > 1:

        def step(carry, _):
            merged, visitor = carry
            next_visitor = _pass_on(visitor, axis_name)
            return (visit(merged, visitor), next_visitor), None

        (merged, visitor), _ = lax.scan(step, (merged, visitor), length=steps - 1)
    if steps:
        merged = visit(merged, visitor)
    out_BTHD, lse_BHT = api.saved(merged[0].astype(q_BTHD.dtype), merged[1])
    return out_BTHD, (q_BTHD, k_BSKD, v_BSKD, rows, out_BTHD, lse_BHT)


def _backward(options, implementation, axis_name, residuals, dout_BTHD):
    residuals, dout_BTHD = api.differentiable_once(residuals, dout_BTHD)
    q_BTHD, k_BSKD, v_BSKD, rows, out_BTHD, lse_BHT = residuals
    kernel = api.implementation_named(implementation)
    can_see = _skip_test(rows, options)
    visitor_options = Options(False, options.scale, options.window, options.soft_cap)

    def visit(visitor):
        """What the queries' use of a visitor gives to dq, dk and dv. The sums are made outside:
        the sums that are still on their way must not hold up the computation."""

        def look():
            k, v, visitor_rows = _as_seen_from(rows, visitor)
            return tuple(
                kernel.backward(
                    q_BTHD, k, v, visitor_rows, visitor_options, out_BTHD, lse_BHT, dout_BTHD
                )
            )

        def skip():
            return jnp.zeros_like(q_BTHD), jnp.zeros_like(visitor[0]), jnp.zeros_like(visitor[1])

        return lax.cond(can_see(visitor), look, skip)

    own = (k_BSKD, v_BSKD, rows.kv_positions_BS, rows.kv_segments_BS)
    steps = lax.axis_size(axis_name) - 1
    visitor = _pass_on(own, axis_name) if steps else None
    gradients = kernel.backward(q_BTHD, k_BSKD, v_BSKD, rows, options, out_BTHD, lse_BHT, dout_BTHD)
    dq, *left = (x.astype(jnp.float32) for x in gradients)  # `left`: dk, dv of the last visitor
    if steps > 1:

        def step(carry, _):
            dq, left, visitor = carry
            next_visitor = _pass_on(visitor, axis_name)
            arrived, (dq_part, *parts) = _pass_on(left, axis_name), visit(visitor)
            return (dq + dq_part, _sums(arrived, parts), next_visitor), None

        (dq, left, visitor), _ = lax.scan(step, (dq, left, visitor), length=steps - 1)
    if steps:
        arrived, (dq_part, *parts) = _pass_on(left, axis_name), visit(visitor)
        dq, left = dq + dq_part, _pass_on(_sums(arrived, parts), axis_name)  # home
    dk, dv = left
    return dq.astype(q_BTHD.dtype), dk.astype(k_BSKD.dtype), dv.astype(v_BSKD.dtype), None


_ring.defvjp(_forward, _backward)


def _pass_on(tree, axis_name: str):
    """Sends to the next device, receives from the one before."""
    n = lax.axis_size(axis_name)
    return lax.ppermute(tree, axis_name, [(i, (i + 1) % n) for i in range(n)])


def _sums(f32_arrays, parts):
    return [array + part.astype(jnp.float32) for array, part in zip(f32_arrays, parts)]


def _as_seen_from(rows: Rows, visitor):
    k_BSKD, v_BSKD, positions_BS, segments_BS = visitor
    return k_BSKD, v_BSKD, Rows(rows.q_positions_BT, positions_BS, rows.q_segments_BT, segments_BS)


def _skip_test(rows: Rows, options: Options):
    """A function of a visitor: whether some query here may see some of its keys."""
    q_ranges = block_ranges(rows.q_segments_BT, rows.q_positions_BT, SKIP_BLOCK)

    def can_see(visitor):
        _, _, positions_BS, segments_BS = visitor
        kv_ranges = block_ranges(segments_BS, positions_BS, SKIP_BLOCK)
        return may_see(q_ranges, kv_ranges, options.window).any()

    return can_see


def _merge(one, other):
    """Softmax over the union of two sets of keys; (out, lse) each, the first out in f32."""
    (out_BTHD, lse_BHT), (other_BTHD, other_lse_BHT) = one, other
    a, b = (jnp.where(x == jnp.inf, -jnp.inf, x) for x in (lse_BHT, other_lse_BHT))
    top = jnp.maximum(a, b)
    top = jnp.where(top == -jnp.inf, 0, top)
    a, b = jnp.exp(a - top), jnp.exp(b - top)
    total = a + b
    empty = total == 0
    total = jnp.where(empty, 1, total)
    share_a, share_b = ((x / total).swapaxes(1, 2)[..., None] for x in (a, b))
    merged_BTHD = share_a * out_BTHD + share_b * other_BTHD.astype(jnp.float32)
    return merged_BTHD, jnp.where(empty, jnp.inf, top + jnp.log(total))
