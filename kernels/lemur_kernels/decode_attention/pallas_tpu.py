"""Decode attention on TPUs: pages fetched by explicit copies, DEPTH - 1 blocks ahead.

A decoding step does about one multiplication per byte of cache, so it takes as long as reading
the cache takes; everything here serves that. Only pages in sight are copied, each once; while
one block is computed, the next DEPTH - 1 are on their way, across the ends of rows, so the
memory system never waits for the matrix unit. Within a block the query heads of a kv head (times
the query tokens) are one matmul against keys and values straight from the page layout, and the
softmax is the online one (FlashAttention-2, arXiv:2307.08691, section 3.1.1), base 2.

Axis key: B rows, N query tokens, H heads, K kv heads, G = H / K, D head dim, P pages in the
cache, M pages in a row's table, Z tokens in a page, C lanes of a page, L lanes of the queries,
of the keys' part and of the values' part, R stacked query rows of an item, T tokens in a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lemur_kernels.decode_attention.needs_tpu import needs_tpu
from lemur_kernels.decode_attention.pages import value_lane
from lemur_kernels.decode_attention.plan import (
    COPIES_PER_TURN,
    CORES,
    LANES,
    MAX_TABLE,
    Items,
    Plan,
    make_items,
    make_plan,
)
from lemur_kernels.decode_attention.reference import pages_of_rows

DEPTH = 3  # block buffers: one computed, one arriving, one queued behind it
LOG2E = 1.4426950408889634
LOWEST = -1e30  # the running maximum before the first visible key; finite, so that no inf - inf


def pallas_tpu(
    q_BNHD, kv_pages_PKZC, *, page_table_BM, lengths_B, new_tokens_B, k_scales_PK, v_scales_PK,
    scale, window, soft_cap, interpret=False,
) -> jax.Array:  # fmt: skip
    """See lemur_kernels.decode_attention.decode_attention.

    Raises:
      ValueError: a page table that scalar memory does not hold.
    """
    B, N, H, D = q_BNHD.shape
    K, Z, C = kv_pages_PKZC.shape[1:]
    M = page_table_BM.shape[1]
    if page_table_BM.size > MAX_TABLE:
        raise ValueError(
            f"page_table_BM has {B} x {M} entries, scalar memory holds {MAX_TABLE}: pass at most "
            f"{MAX_TABLE // M} rows at a time, or use larger pages (now {Z} tokens)"
        )
    if not interpret:
        q_BNHD = needs_tpu(q_BNHD)
        # Protects memory; decode_attention makes such rows NaN.
        page_table_BM = jnp.clip(page_table_BM, 0, kv_pages_PKZC.shape[0] - 1)
    plan = make_plan(B, N, H, K, M, Z, C, kv_pages_PKZC.dtype.itemsize, window)
    if not plan.by_heads and B % CORES:  # an empty row, so that the cores get equally many
        q_BNHD, page_table_BM, lengths_B, new_tokens_B = (
            jnp.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1))
            for x in (q_BNHD, page_table_BM, lengths_B, new_tokens_B)
        )
    items = make_items(plan, K, M, Z, lengths_B, new_tokens_B, window)
    L = max(C // 2, LANES)
    q_BKRL = _stack(q_BNHD, K, plan, L)
    steps = items.row.shape[0] // CORES
    scalars = (*items, page_table_BM.reshape(-1))

    def place(core, step, row, group, tile, *_):
        i = core * steps + step
        return row[i], group[i], tile[i], 0

    def place_scales(core, step, row, group, *_):
        i = core * steps + step
        return row[i], 0, group[i], 0, 0

    queries = pl.BlockSpec((1, plan.heads, plan.rows, L), place)
    inputs, specs = [q_BKRL, kv_pages_PKZC], [queries, pl.BlockSpec(memory_space=pl.ANY)]
    T = plan.pages * Z
    scratch = [
        pltpu.VMEM((DEPTH, plan.pages, plan.heads, Z, C), kv_pages_PKZC.dtype),
        pltpu.SemaphoreType.DMA((DEPTH,)),
        pltpu.SMEM((4,), jnp.int32),
        pltpu.VMEM((plan.heads, plan.rows, LANES), jnp.float32),
        pltpu.VMEM((plan.heads, plan.rows, LANES), jnp.float32),
        pltpu.VMEM((plan.heads, plan.rows, L), jnp.float32),
    ]
    if k_scales_PK is not None:
        scales = _scales_of_rows((k_scales_PK, v_scales_PK), page_table_BM, lengths_B, plan, K, Z)
        inputs.append(scales)
        specs.append(pl.BlockSpec((1, 2, 1, *scales.shape[3:]), place_scales))
        scratch.append(pltpu.VMEM((2, plan.heads, T), jnp.float32))
    kernel = functools.partial(
        _kernel, plan=plan, M=M, G=H // K, scale=scale, window=window, soft_cap=soft_cap,
        quantized=k_scales_PK is not None,
    )  # fmt: skip
    out_BKRL = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(CORES, steps),
            in_specs=specs,
            out_specs=queries,
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(
            q_BKRL.shape, q_BKRL.dtype, manual_axis_type=jax.typeof(q_BKRL).mat
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,  # half of a copy's overhead; ids are clipped above
        ),
        interpret=interpret,
        name="decode_attention",
    )(*scalars, *inputs)
    first = value_lane(D) % L  # with keys and values in one group of lanes, the values' half
    return _unstack(out_BKRL[:B, ..., first : first + D], N, plan, H // K)


def _stack(q_BNHD, K: int, plan: Plan, L: int) -> jax.Array:
    """Queries of a kv head as matmul rows: token-major, padded per tile, [B, K, tiles * R, L]."""
    B, N, H, D = q_BNHD.shape
    pad = plan.tiles * plan.queries - N
    q = jnp.pad(q_BNHD, ((0, 0), (0, pad), (0, 0), (0, L - D)))
    q = q.reshape(B, plan.tiles, plan.queries, K, H // K, L).transpose(0, 3, 1, 2, 4, 5)
    q = q.reshape(B, K, plan.tiles, plan.queries * (H // K), L)
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, plan.rows - q.shape[3]), (0, 0)))
    return q.reshape(B, K, plan.tiles * plan.rows, L)


def _unstack(out_BKRD, N: int, plan: Plan, G: int) -> jax.Array:
    """The inverse of _stack, [B, N, H, D]."""
    B, K, _, D = out_BKRD.shape
    out = out_BKRD.reshape(B, K, plan.tiles, plan.rows, D)[:, :, :, : plan.queries * G]
    out = out.reshape(B, K, plan.tiles, plan.queries, G, D).transpose(0, 2, 3, 1, 4, 5)
    return out.reshape(B, plan.tiles * plan.queries, K * G, D)[:, :N]


def _scales_of_rows(scales, page_table_BM, lengths_B, plan: Plan, K: int, Z: int) -> jax.Array:
    """Scales of each row's pages, f32 [B, 2 (keys, values), groups, heads, M padded to lanes]."""
    B, M = page_table_BM.shape
    used_BM = jnp.arange(M) * Z < lengths_B[:, None]
    parts = [pages_of_rows(x, page_table_BM, used_BM).swapaxes(1, 2) for x in scales]
    x_B2KM = jnp.pad(jnp.stack(parts, 1), ((0, 0), (0, 0), (0, 0), (0, -M % LANES)))
    return x_B2KM.reshape(B, 2, K // plan.heads, plan.heads, -1)


def _kernel(*refs, plan: Plan, M, G, scale, window, soft_cap, quantized):
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

    def query_of_row(shape):
        row = lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.float32)
        return ((row + 0.5) * (1 / G)).astype(jnp.int32)  # row // G; int division is slow

    def masks(j):
        """Which key each row sees [R, T]; which keys of the block some row may see [T, L]."""
        key = j * T + lax.broadcasted_iota(jnp.int32, (plan.rows, T), 1)
        query = position
        if plan.queries > 1:
            query += query_of_row((plan.rows, T))
        # Padded queries would see past the last page in sight, where nothing was fetched.
        query = jnp.minimum(query, position + valid - 1)
        seen = key <= query
        token = j * T + lax.broadcasted_iota(jnp.int32, (T, L), 0)
        fetched = token < position + valid
        if window is not None:
            seen &= key > query - window
            fetched &= token >= low * Z
        return seen, fetched

    def compute(j, slot, masked):
        seen, fetched = masks(j) if masked else (None, None)

        def part(h, lane):
            x = buffers[slot, :, h, :, lane : lane + L].reshape(T, L)
            return x.astype(q_ref.dtype)

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
        for part in range(2):
            place = j * plan.pages
            lane = lax.rem(place, LANES)
            near = scales_ref[0, part, 0, :, pl.ds(pl.multiple_of(place - lane, LANES), LANES)]
            of_pages = pltpu.roll(near, lax.rem(LANES - lane, LANES), 1)  # block's first at lane 0
            for lane in range(0, T, LANES):
                inside = lax.broadcasted_iota(jnp.int32, (plan.heads, LANES), 1)
                x = jnp.broadcast_to(of_pages[:, lane // Z : lane // Z + 1], inside.shape)
                for k in range(1, LANES // Z):
                    page = lane // Z + k
                    x = jnp.where(inside >= k * Z, of_pages[:, page : page + 1], x)
                expanded_ref[part, :, lane : lane + LANES] = x

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
