"""The forward kernel for TPUs: FlashAttention-2 over a list of block pairs.

Scores are held keys first, s[key, query]. The sum over keys then runs down the sublanes (plain
vector adds, no cross-lane work), the log-sum-exp comes out as a row, and the second product,
v^T p, has the probabilities as its stationary operand, which fills a 256 wide matrix unit.

Two forms of softmax (static): without a running maximum, when the caller checks the sum
afterwards and repeats what left the safe range (pallas_tpu.py), and with it ("online").

Axis key: T and S all queries and all keys of the batch, row after row; H heads, K kv heads,
G = H / K, D head dim; C block of keys, Q block of queries, h heads and n kv heads of one step.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lemur_kernels.attention import steps as st
from lemur_kernels.attention.mask import Options
from lemur_kernels.attention.tilings import Tiling, kv_heads_per_step

LOG2_E = math.log2(math.e)
MASKED_SCORE = -1e30  # exp2 of it is 0 whatever finite number is subtracted
LOWEST_MAXIMUM = -1e29  # above MASKED_SCORE: a row with nothing visible yet keeps probability 0
RANGE = 80  # binary orders of magnitude on either side of 1
NT = (((1,), (1,)), ((), ()))  # x y^T
NN = (((1,), (0,)), ((), ()))  # x y
KINDS = {
    st.FULL: "full",
    st.DIAGONAL: "diagonal",
    st.EDGE: "edge",
    st.CORNER: "corner",
    st.MASKED: "masked",
}


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries [q, q + queries) against keys [k, k + keys) of a pair of blocks.

    `q` and `k` may be known at run time only. `diagonal`: the last `queries` keys are the queries
    themselves. `writes`: the first tile of these queries, whose results replace what is there.
    """

    q: int | jax.Array
    queries: int
    k: int | jax.Array
    keys: int
    diagonal: bool
    writes: bool

    @property
    def query_slice(self):
        return pl.ds(self.q, self.queries)

    @property
    def key_slice(self):
        return pl.ds(self.k, self.keys)


def static_tiles(tiling: Tiling, diagonal: bool) -> list[Tile]:
    """The tiles of a pair of blocks; of one on the diagonal only those with something visible."""
    width = tiling.trapezoid if diagonal else tiling.strip
    out = []
    for q in range(0, tiling.block, width):
        end = q + width if diagonal else tiling.block
        for k in range(0, end, tiling.strip):
            keys = min(tiling.strip, end - k)
            out.append(Tile(q, width, k, keys, diagonal and k + keys == end, diagonal and k == 0))
    return out


def each_tile(kind: int, tiling: Tiling, first_keys, place, first_index, visit):
    """Calls `visit(list of tiles, name of the region)` for all tiles of a pair of blocks in which
    something is visible.

    Full blocks and single documents on the diagonal are one static list. Where documents begin
    or end inside the pair, the tiles are squares, found at run time.

    Args:
      first_keys: ref in scalar memory, least first key of each square's queries in its row.
      first_index: the row's index of the block's first key.
    """
    if kind in (st.FULL, st.DIAGONAL, st.MASKED):
        visit(static_tiles(tiling, kind == st.DIAGONAL), KINDS[kind])
        return
    side = tiling.square
    squares = tiling.block // side

    name = KINDS[kind]

    def strip(r, _):
        with jax.named_scope(f"{name}_strip"):
            q = pl.multiple_of(r * side, side)
            first = first_keys[st.query_block(place) * squares + r] - first_index
            start = lax.shift_right_logical(jnp.maximum(first, 0), jnp.int32(side.bit_length() - 1))
            end = r if kind == st.CORNER else squares
            if kind == st.CORNER:  # meets the strip's queries for the first time
                visit([Tile(q, side, q, side, True, True)], name)
            lax.fori_loop(start, end, functools.partial(square, q), 0)
        return 0

    def square(q, c, _):
        with jax.named_scope(f"{name}_squares"):
            k = pl.multiple_of(c * side, side)
            visit([Tile(q, side, k, side, False, False)], f"{name}_square")
        return 0

    lax.fori_loop(0, squares, strip, 0)


def dot(x, y, dimensions):
    """A product accumulated in f32, exact to f32 when the operands are f32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, dimensions, precision, jnp.float32)


def softmax_scale(options: Options) -> float:
    """Factor from a product of q and k (after a soft cap: of the cap) to a base 2 exponent."""
    return (options.soft_cap or options.scale) * LOG2_E


def exponents(s_CQ, options: Options):
    """Base 2 exponents of the raw products."""
    if options.soft_cap is not None:
        s_CQ = jnp.tanh(s_CQ * (options.scale / options.soft_cap))
    return s_CQ * softmax_scale(options)


def mask_tile(s_CQ, tile: Tile, kind: int, marks, first_index, options: Options):
    """Scores with MASKED_SCORE where nothing is visible.

    `marks` are refs, see `mark_specs`; `first_index` is the row's index of the block's first key.
    """
    if kind in (st.EDGE, st.CORNER):
        key_CQ = tile.k + lax.broadcasted_iota(jnp.int32, s_CQ.shape, 0)
        first_1Q = marks[0][:, tile.query_slice] - first_index
        s_CQ = jnp.where(key_CQ >= first_1Q, s_CQ, MASKED_SCORE)
    if kind == st.MASKED:
        q_segments, q_positions, kv_segments, kv_positions = marks
        columns = tile.query_slice

        def across(ref):  # [C, 128] -> [C, queries]: equal lanes, so tiling them is free
            wide = [ref[tile.key_slice]] * -(-tile.queries // 128)
            return jnp.concatenate(wide, 1)[:, : tile.queries]

        positions_1Q, positions_CQ = q_positions[:, columns], across(kv_positions)
        visible = (across(kv_segments) == q_segments[:, columns]) & (positions_CQ <= positions_1Q)
        if options.window is not None:
            visible &= positions_1Q - positions_CQ < options.window
        s_CQ = jnp.where(visible, s_CQ, MASKED_SCORE)
    if tile.diagonal:
        above = tile.keys - tile.queries
        square = s_CQ[above:]
        seen = lax.broadcasted_iota(jnp.int32, square.shape, 0) <= lax.broadcasted_iota(
            jnp.int32, square.shape, 1
        )
        square = jnp.where(seen, square, MASKED_SCORE)
        s_CQ = jnp.concatenate([s_CQ[:above], square]) if above else square
    return s_CQ


def all_heads(scope: str, tiling: Tiling, kind: int, tiles: list[Tile], products, gather):
    """Runs `gather(head, tile, products(head, tile))` for every head and tile.

    The matrix unit works on the products of tiles to come while the vector unit works on this
    tile's exponents: the compiler keeps the order of the source.
    """
    depth = tiling.depth if kind == st.FULL else tiling.diagonal_depth
    unroll = tiling.square_unroll if kind in (st.EDGE, st.CORNER) else tiling.unroll

    def some_heads(step, _):
        with jax.named_scope(scope):
            work = [(step * unroll + u, tile) for u in range(unroll) for tile in tiles]
            ahead = [products(*item) for item in work[:depth]]
            for i, item in enumerate(work):
                if i + depth < len(work):
                    ahead.append(products(*work[i + depth]))
                gather(*item, ahead.pop(0))
        return 0

    lax.fori_loop(0, tiling.heads // unroll, some_heads, 0)


def is_safe(lse):
    """Whether a sum of exponentials without a running maximum was safe. NaN is not."""
    return jnp.abs(lse * LOG2_E) <= RANGE


def kinds_of(options: Options) -> list[int]:
    packed = [st.FULL, st.DIAGONAL, st.EDGE, st.CORNER]
    return packed if options.packed else [st.FULL, st.MASKED]


def div(x, n: int):
    """x // n of a number known at run time and not negative, without the sign's case."""
    return lax.div(x, jnp.int32(n))


def _kernel(
    places, actions, first_keys, q_ref, k_ref, vt_ref, *refs,
    options: Options, tiling: Tiling, online: bool, marks: int, group: int, row_blocks: int,
):  # fmt: skip
    mark_refs, refs = refs[:marks], refs[marks:]
    repeats = online and options.packed
    if repeats:
        (earlier_out_ref, earlier_lse_ref), refs = refs[:2], refs[2:]
    out_ref, lse_ref, acc_ref, sum_ref, *max_ref = refs
    action, place = actions[pl.program_id(1)], places[pl.program_id(1)]
    first_index = (st.key_block(place) - st.row(action) * row_blocks) * tiling.block
    group = min(group, tiling.heads)
    # Packed rows meet their diagonal first, so it can write where the others add.
    writes_first = options.packed and not online

    if not writes_first:

        @pl.when(st.is_first(action))
        def _():
            with jax.named_scope("start"):
                acc_ref[...] = jnp.zeros_like(acc_ref)
                sum_ref[...] = jnp.zeros_like(sum_ref)
                if online:
                    max_ref[0][...] = jnp.full_like(max_ref[0], LOWEST_MAXIMUM)

    def scores(head, t: Tile):
        return dot(k_ref[div(head, group), t.key_slice], q_ref[head, t.query_slice], NT)

    def gather(kind, head, t: Tile, s_CQ):
        queries = t.query_slice
        s_CQ = exponents(s_CQ, options)
        s_CQ = mask_tile(s_CQ, t, kind, mark_refs, first_index, options)
        if online:
            old_1Q = max_ref[0][head, :, queries]
            new_1Q = jnp.maximum(old_1Q, s_CQ.max(0, keepdims=True))
            max_ref[0][head, :, queries] = new_1Q
            shrink_1Q = jnp.exp2(old_1Q - new_1Q)
            sum_ref[head, :, queries] *= shrink_1Q
            acc_ref[head, :, queries] *= shrink_1Q
            s_CQ -= new_1Q
        p_CQ = jnp.exp2(s_CQ)
        sum_8Q = p_CQ.reshape(t.keys // 8, 8, t.queries).sum(0)
        vt_DC = vt_ref[div(head, group), :, t.key_slice]
        out_DQ = dot(vt_DC, p_CQ.astype(vt_DC.dtype), NN)
        if writes_first and t.writes:
            sum_ref[head, :, queries] = sum_8Q
            acc_ref[head, :, queries] = out_DQ
        else:
            sum_ref[head, :, queries] += sum_8Q
            acc_ref[head, :, queries] += out_DQ

    def attend(kind):
        def visit(tiles, scope):
            all_heads(scope, tiling, kind, tiles, scores, functools.partial(gather, kind))

        each_tile(kind, tiling, first_keys, place, first_index, visit)

    for kind in kinds_of(options):

        @pl.when(st.kind(action) == kind)
        def _(kind=kind):
            attend(kind)

    @pl.when(st.kind(action) == st.EMPTY)
    def _():
        def one_head(head, _):
            with jax.named_scope("empty"):
                out_ref[head] = jnp.zeros(out_ref.shape[1:], out_ref.dtype)
                lse_ref[head] = jnp.full(lse_ref.shape[1:], jnp.inf, jnp.float32)
            return 0

        lax.fori_loop(0, tiling.heads, one_head, 0)  # a loop is skipped; plain stores are masked

    @pl.when(st.is_last(action) & (st.kind(action) != st.EMPTY))
    def _():
        def one_head(head, _):
            with jax.named_scope("finish"):
                sum_1Q = sum_ref[head].sum(0, keepdims=True)
                some_1Q = sum_1Q > 0
                share_1Q = jnp.where(some_1Q, 1 / jnp.where(some_1Q, sum_1Q, 1), 0)
                out_DQ = (acc_ref[head] * share_1Q).astype(out_ref.dtype)
                exponent_1Q = jnp.log2(jnp.where(some_1Q, sum_1Q, 1))
                if online:
                    exponent_1Q += max_ref[0][head]
                lse_1Q = jnp.where(some_1Q, exponent_1Q / LOG2_E, jnp.inf)
                if repeats:
                    # The bits of a safe query must not tell of an unsafe one beside it.
                    earlier_1Q = earlier_lse_ref[head]
                    safe_1Q = is_safe(earlier_1Q)
                    lse_1Q = jnp.where(safe_1Q, earlier_1Q, lse_1Q)
                    earlier_DQ = earlier_out_ref[head].astype(jnp.float32).T
                    out_DQ = jnp.where(safe_1Q, earlier_DQ, out_DQ.astype(jnp.float32))
                out_ref[head] = out_DQ.astype(out_ref.dtype).T
                lse_ref[head] = lse_1Q
            return 0

        lax.fori_loop(0, tiling.heads, one_head, 0)


def mark_specs(options: Options, block: int) -> list[pl.BlockSpec]:
    """Block specs of what the masks read: pallas_tpu.marks."""

    def q_row(_, e, places, *scalars):
        return 0, st.query_block(places[e])

    def kv_column(_, e, places, *scalars):
        return st.key_block(places[e]), 0

    if options.packed:
        return [pl.BlockSpec((1, block), q_row)]
    # One buffer: 256 KiB each at 512 tokens, which v4 has no room to hold twice.
    column = pl.BlockSpec((block, 128), kv_column, pipeline_mode=pl.Buffered(1))
    return [pl.BlockSpec((1, block), q_row)] * 2 + [column] * 2


def forward(
    q_HTD, k_KSD, vt_KDS, marks, first_keys, *, steps: st.Steps, options: Options, tiling: Tiling,
    row_tokens: int, earlier=None, interpret=False,
):  # fmt: skip
    """(out_HTD in q's dtype, lse_H1T f32) of the query blocks that `steps` names.

    `row_tokens`: keys of one row, whole blocks. `earlier`: (out, lse) of a first pass, which keep
    their safe queries and what `steps` does not name; asks for the online form. Rows that are not
    packed always take the online form.
    """
    H, T, D = q_HTD.shape
    h, group, block = tiling.heads, H // k_KSD.shape[0], tiling.block
    n = kv_heads_per_step(h, group)
    online = earlier is not None or not options.packed

    def kv_head(head):
        return div(div(head * h, group), n)

    def q_index(head, e, places, *scalars):
        return head, st.query_block(places[e]), 0

    def k_index(head, e, places, *scalars):
        return kv_head(head), st.key_block(places[e]), 0

    def vt_index(head, e, places, *scalars):
        return kv_head(head), 0, st.key_block(places[e])

    def lse_index(head, e, places, *scalars):
        return head, 0, st.query_block(places[e])

    q_spec = pl.BlockSpec((h, block, D), q_index)
    lse_spec = pl.BlockSpec((h, 1, block), lse_index)
    specs = [
        q_spec,
        pl.BlockSpec((n, block, D), k_index),
        pl.BlockSpec((n, D, block), vt_index),
        *mark_specs(options, block),
    ]
    arrays = [q_HTD, k_KSD, vt_KDS, *marks]
    aliases = {}
    if earlier is not None:
        aliases = {3 + len(arrays) + i: i for i in range(2)}
        once = pl.Buffered(1)
        specs += [
            pl.BlockSpec((h, block, D), q_index, pipeline_mode=once),
            pl.BlockSpec((h, 1, block), lse_index, pipeline_mode=once),
        ]
        arrays += earlier
    scratch = [
        pltpu.VMEM((h, D, block), jnp.float32),
        pltpu.VMEM((h, 8, block), jnp.float32),
    ]
    if online:
        scratch.append(pltpu.VMEM((h, 1, block), jnp.float32))
    kernel = functools.partial(
        _kernel,
        options=options,
        tiling=tiling,
        online=online,
        marks=len(marks),
        group=group,
        row_blocks=row_tokens // block,
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(H // h, steps.count),
            in_specs=specs,
            out_specs=[q_spec, lse_spec],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((H, T, D), q_HTD.dtype),
            jax.ShapeDtypeStruct((H, 1, T), jnp.float32),
        ],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiling.vmem_bytes
        ),
        interpret=interpret,
        name="lemur_attention_online" if online else "lemur_attention_forward",
    )(steps.places_E, steps.actions_E, first_keys, *arrays)
