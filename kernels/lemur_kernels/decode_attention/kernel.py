"""The body of the TPU kernel: one grid step is one item of plan.py.

Axis key: B rows, G query heads of a kv head, K kv heads, P pages in the cache, M pages in a row's
table, Z tokens in a page, C lanes of a page, L lanes of the queries, of the keys' part and of the
values' part, R stacked query rows of an item, T tokens in a block.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lemur_kernels.decode_attention.plan import COPIES_PER_TURN, CORES, LANES, Items, Plan

DEPTH = 3  # block buffers: one computed, one arriving, one queued behind it
LOG2E = 1.4426950408889634
LOWEST = -1e30  # the running maximum before the first visible key; finite, so that no inf - inf


def kernel(*refs, plan: Plan, M, G, scale, window, soft_cap, quantized, by_bytes):
    """refs: the items and the page table (scalar memory), queries and pages, the scales with int8,
    the output, then scratch as pallas_tpu lists it."""
    scalars, refs = refs[:9], refs[9:]
    items, table = Items(*scalars[:8]), scalars[8]
    q_ref, pages_ref, *refs = refs
    scales_ref = refs.pop(0) if quantized else None
    out_ref, buffers, arrived, cursor, top_ref, total_ref, sum_ref, *refs = refs
    expanded_ref = refs[0] if quantized else None
    Z, C = buffers.shape[3:]
    T, L = plan.pages * Z, q_ref.shape[-1]
    exact = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None

    step = pl.program_id(1)
    item = pl.program_id(0) * pl.num_programs(1) + step
    end_of_items = CORES * pl.num_programs(1)
    low, high, position, valid = (
        x[item] for x in (items.low, items.high, items.position, items.valid)
    )

    def first_block(i):
        return lax.div(items.low[jnp.minimum(i, end_of_items - 1)], plan.pages)

    def start_copies(i, j, slot):
        """Starts the copies of block j of item i: only pages in sight, each into its place."""
        base, group, first = items.row[i] * M, items.group[i], j * plan.pages

        def start(place):
            source = pages_ref.at[
                table[base + first + place], pl.ds(group * plan.heads, plan.heads)
            ]
            pltpu.make_async_copy(source, buffers.at[slot, place], arrived.at[slot]).start()

        def several(n, _):
            for place in range(per_turn):
                start(n * per_turn + place)

        begin, end = in_sight(i, j)
        per_turn = min(COPIES_PER_TURN, plan.pages)
        full = end - begin == plan.pages
        pl.when(full)(lambda: lax.fori_loop(0, plan.pages // per_turn, several, None))
        pl.when(jnp.logical_not(full))(
            lambda: lax.fori_loop(begin, end, lambda place, _: start(place), None)
        )

    def await_copies(j, slot):
        """A wait counts bytes, so one for a whole block is as good as one per page."""

        def wait(buffer):
            pltpu.make_async_copy(buffer, buffer, arrived.at[slot]).wait()

        begin, end = in_sight(item, j)
        full = end - begin == plan.pages
        pl.when(full)(lambda: wait(buffers.at[slot]))
        pl.when(jnp.logical_not(full))(
            lambda: lax.fori_loop(begin, end, lambda place, _: wait(buffers.at[slot, place]), None)
        )

    def in_sight(i, j):
        """Places in block j of the first and the end of item i's pages in sight."""
        first = j * plan.pages
        return (
            jnp.maximum(items.low[i] - first, 0),
            jnp.minimum(items.high[i] - first, plan.pages),
        )

    # The cursor runs DEPTH - 1 blocks ahead of the computation and over the same blocks.
    # [0] buffer to fill next, [1] buffer to compute next, [2] item and [3] block to fetch next.
    def fetch_next():
        slot, i, j = cursor[0], cursor[2], cursor[3]

        @pl.when(i < end_of_items)
        def _():
            start_copies(i, j, slot)
            cursor[0] = jnp.where(slot == DEPTH - 1, 0, slot + 1)
            done = (j + 1) * plan.pages >= items.high[i]
            cursor[2] = jnp.where(done, items.following[i], i)
            cursor[3] = jnp.where(done, first_block(items.following[i]), j + 1)

    @pl.when(step == 0)
    def _():
        start = jnp.where(high > 0, item, items.following[item])
        cursor[0], cursor[1], cursor[2], cursor[3] = 0, 0, start, first_block(start)
        lax.fori_loop(0, DEPTH - 1, lambda _, __: fetch_next(), None)

    top_ref[...] = jnp.full_like(top_ref, LOWEST)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)

    def token(column):
        """The token of a block that column c of the scores belongs to, for numbers and arrays."""
        if not by_bytes:
            return column
        # 32-bit word r of a lane holds tokens 4r..4r+3, and byte i of all words is one piece.
        return (column & (T // 4 - 1)) * 4 + (column >> (T // 4).bit_length() - 1)

    def from_int8(x_TL):
        """q's dtype; by bytes: shifts within a word instead of unpacking across sublanes."""
        if not by_bytes:
            return x_TL.astype(q_ref.dtype)
        words = pltpu.bitcast(x_TL, jnp.int32)
        pieces = [(words << 24 - 8 * i) >> 24 for i in range(4)]
        return jnp.concatenate([x.astype(jnp.float32).astype(q_ref.dtype) for x in pieces])

    def query_of_row(shape):
        row = lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.float32)
        return ((row + 0.5) * (1 / G)).astype(jnp.int32)  # row // G; int division is slow

    def masks(j):
        """Which key each row sees [R, T]; which keys of the block some row may see [T, L]."""
        key = j * T + token(lax.broadcasted_iota(jnp.int32, (plan.rows, T), 1))
        query = position
        if plan.queries > 1:
            query += query_of_row((plan.rows, T))
        # Padded queries would see past the last page in sight, where nothing was fetched.
        query = jnp.minimum(query, position + valid - 1)
        seen = key <= query
        key_of_row = j * T + token(lax.broadcasted_iota(jnp.int32, (T, L), 0))
        fetched = key_of_row < position + valid
        if window is not None:
            seen &= key > query - window
            fetched &= key_of_row >= low * Z
        return seen, fetched

    def compute(j, slot, masked):
        seen, fetched = masks(j) if masked else (None, None)

        def part(h, lane):
            x = buffers[slot, :, h, :, lane : lane + L].reshape(T, L)
            return from_int8(x) if quantized else x

        def scores(h):
            s = lax.dot_general(
                q_ref[0, h], part(h, 0), (((1,), (1,)), ((), ())),
                precision=exact, preferred_element_type=jnp.float32,
            )  # fmt: skip
            if quantized:
                s *= expanded_ref[0, pl.ds(h, 1)]
            if soft_cap is None:
                s *= scale * LOG2E
            else:
                s = jnp.tanh(s * (scale / soft_cap)) * (soft_cap * LOG2E)
            return jnp.where(seen, s, -jnp.inf) if masked else s

        def probabilities(h, s):
            """exp2(s - top); the sums are kept lane by lane and added up once, at the end."""
            before = top_ref[h][:, :1]
            top = jnp.maximum(before, s.max(1, keepdims=True))
            p = jnp.exp2(s - top)
            shrink = jnp.exp2(before - top)
            lanes = sum(p[:, c : c + LANES] for c in range(0, T, LANES))
            total_ref[h] = total_ref[h] * shrink + lanes
            top_ref[h] = jnp.broadcast_to(top, top_ref.shape[1:])
            if quantized:
                p *= expanded_ref[1, pl.ds(h, 1)]
            return p, shrink

        def add_values(h, p, shrink):
            v = part(h, C - L)
            if masked:
                v = jnp.where(fetched, v, jnp.zeros_like(v))  # 0 * NaN would be NaN
            v = jnp.dot(p.astype(v.dtype), v, precision=exact, preferred_element_type=jnp.float32)
            sum_ref[h] = sum_ref[h] * shrink + v

        def side_by_side(group, _):
            heads = [group * plan.unroll + u for u in range(plan.unroll)]
            s = [scores(h) for h in heads]
            p = [probabilities(h, x) for h, x in zip(heads, s)]
            for h, x in zip(heads, p):
                add_values(h, *x)

        if plan.heads == plan.unroll:
            side_by_side(0, None)
        else:
            lax.fori_loop(0, plan.heads // plan.unroll, side_by_side, None)

    def expand_scales(j):
        """[heads, pages] -> [heads, T]: each page's scale in the lanes of its tokens."""
        run = min(Z // 4 if by_bytes else Z, LANES)  # columns in a row of one page
        for part in range(2):
            place = j * plan.pages
            lane = lax.rem(place, LANES)
            near = scales_ref[0, part, 0, :, pl.ds(pl.multiple_of(place - lane, LANES), LANES)]
            of_pages = pltpu.roll(near, lax.rem(LANES - lane, LANES), 1)  # block's first at lane 0
            for first in range(0, T, LANES):
                lanes = lax.broadcasted_iota(jnp.int32, (plan.heads, LANES), 1)
                x = None
                for start in range(0, LANES, run):
                    page = token(first + start) // Z
                    of_page = jnp.broadcast_to(of_pages[:, page : page + 1], lanes.shape)
                    x = of_page if x is None else jnp.where(lanes >= start, of_page, x)
                expanded_ref[part, :, first : first + LANES] = x

    def block(j, _):
        fetch_next()
        slot = cursor[1]
        await_copies(j, slot)
        cursor[1] = jnp.where(slot == DEPTH - 1, 0, slot + 1)
        if quantized:
            expand_scales(j)
        whole = (j + 1) * T - 1 <= position
        if window is not None:
            whole &= j * T > position + valid - 1 - window
        pl.when(whole)(lambda: compute(j, slot, masked=False))
        pl.when(jnp.logical_not(whole))(lambda: compute(j, slot, masked=True))

    lax.fori_loop(first_block(item), lax.div(high + plan.pages - 1, plan.pages), block, None)

    total = total_ref[...].sum(-1, keepdims=True)
    out = sum_ref[...] / jnp.where(total == 0, 1, total)
    if plan.queries > 1:
        out = jnp.where(query_of_row(out.shape[1:]) < valid, out, 0)
    out_ref[0] = out.astype(out_ref.dtype)
