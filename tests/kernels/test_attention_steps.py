"""The TPU kernels' list of block pairs, their tiles and masks, against the token rule.

Axis key: B batch, T query length, S key length, Q query blocks, N key blocks, E entries.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hst
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from lemur_kernels.attention import pallas_tpu, tpu_forward
from lemur_kernels.attention import steps as st
from lemur_kernels.attention.counts import region_counts
from lemur_kernels.attention.mask import Options, Rows, visible_BTS
from lemur_kernels.attention.tilings import Tiling

BLOCK, T, B = 8, 40, 2
TILING = Tiling(
    block=BLOCK, heads=1, unroll=1, square_unroll=1, strip=4, trapezoid=2, square=2,
    depth=1, diagonal_depth=1,
)  # fmt: skip
WINDOWS = hst.one_of(hst.none(), hst.integers(1, 20), hst.just(2**31 - 1))

# Lengths of documents, with stretches of padding after them: up to whole blocks of it.
documents = hst.lists(
    hst.tuples(hst.integers(1, 30), hst.sampled_from([0, 0, 0, 1, 9])), min_size=0, max_size=7
)


def packed_tokens(documents_of_rows) -> Rows:
    """Rows of documents; every other segment id is large, so that they do not grow."""
    segments, positions = (np.zeros((len(documents_of_rows), T), np.int32) for _ in range(2))
    for row, pairs in enumerate(documents_of_rows):
        start = 0
        for number, (length, padding) in enumerate(pairs, 1):
            end = min(start + length, T)
            segments[row, start:end] = number if number % 2 else 100 - number
            positions[row, start:end] = np.arange(end - start)
            start = end + padding
    return Rows(*map(jnp.asarray, (positions, positions, segments, segments)))


def any_tokens(length):
    """Segments and positions of one row in any order, or one run of a single document."""
    token = hst.tuples(hst.integers(0, 2), hst.integers(0, 30))
    tokens = hst.lists(token, min_size=length, max_size=length)
    run = hst.integers(0, 60).map(lambda at: [(1, at + i) for i in range(length)])
    return hst.one_of(tokens, run)


def unpacked_rows(queries, keys) -> Rows:
    (q_segments, q_positions), (kv_segments, kv_positions) = (
        np.asarray(x, np.int32).transpose(2, 0, 1) for x in (queries, keys)
    )
    return Rows(*map(jnp.asarray, (q_positions, kv_positions, q_segments, kv_segments)))


def blocks_of(visible_BTS):
    """[B, Q, N, block, block]"""
    B, T, S = visible_BTS.shape
    cut = visible_BTS.reshape(B, T // BLOCK, BLOCK, S // BLOCK, BLOCK)
    return cut.transpose(0, 1, 3, 2, 4)


@functools.partial(jax.jit, static_argnums=(2, 3))
def listed_for(rows, window, packed, parts):
    options = Options(packed, 1.0, window)  # the window traced: not one program for each
    return st.steps(*st.kinds(rows, options, BLOCK), packed=options.packed, parts=parts)


def entries(rows, options, parts):
    """The real entries as dicts of Python numbers, and the static size of the list."""
    places, actions, count = (
        np.asarray(x) for x in listed_for(rows, options.window, options.packed, parts)
    )
    read = ("query_block", "key_block"), (
        "kind", "is_first", "is_last", "opens_row", "closes_row", "row", "part",
    )  # fmt: skip
    columns = {name: getattr(st, name)(places) for name in read[0]}
    columns |= {name: getattr(st, name)(actions) for name in read[1]}
    listed = [{k: v[e].item() for k, v in columns.items()} for e in range(count)]
    return listed, len(places)


def check_list(rows, options, parts):
    """Everything that the kernels take for granted of the list."""
    visible = np.asarray(visible_BTS(rows, options.window))
    blocks_BQNii = blocks_of(visible)
    rows_, Q, N = blocks_BQNii.shape[:3]
    listed, size = entries(rows, options, parts)
    assert 0 < len(listed) <= size
    seen, order = {}, []
    for e in listed:
        b, q, n = e["row"], e["query_block"] - e["row"] * Q, e["key_block"] - e["row"] * N
        assert 0 <= q < Q and 0 <= n < N
        pair = (b, e["part"], q, n)
        assert pair not in seen, "a pair twice"
        seen[pair] = e["kind"]
        order.append((b, e["part"], q, -n))
        block = blocks_BQNii[b, q, n]
        triangle = np.tril(np.ones((BLOCK, BLOCK), bool))
        match e["kind"]:
            case st.EMPTY:
                assert not blocks_BQNii[b, q].any()
            case st.FULL:
                assert block.all()
            case st.DIAGONAL:
                assert options.packed and q == n and np.array_equal(block, triangle)
            case st.EDGE:
                assert options.packed and n < q and block.any() and not block.all()
            case st.CORNER:
                assert options.packed and q == n and block.any()
                assert not np.array_equal(block, triangle)
            case st.MASKED:
                assert not options.packed
    assert order == sorted(order)
    for part in range(parts):
        for b, q, n in np.argwhere(blocks_BQNii.any((-1, -2))):
            assert (b, part, q, n) in seen, "a visible pair is missing"
        for b in range(rows_):
            for q in range(Q):  # each query block is met, or its result would not be written
                kinds = [seen[b, part, q, n] for n in range(N) if (b, part, q, n) in seen]
                assert kinds and (st.EMPTY not in kinds or len(kinds) == 1)

    def runs(key):
        keys = [key(e) for e in listed]
        starts = [i == 0 or keys[i] != keys[i - 1] for i in range(len(keys))]
        return starts, [*starts[1:], True]

    first, last = runs(lambda e: (e["row"], e["part"], e["query_block"]))
    opens, closes = runs(lambda e: e["row"])
    for flag, want in zip(
        ("is_first", "is_last", "opens_row", "closes_row"), (first, last, opens, closes)
    ):
        assert [e[flag] for e in listed] == want, flag
    return listed


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=hst.tuples(documents, documents), window=WINDOWS, parts=hst.sampled_from([1, 3]))
def test_packed_lists_hold_what_is_visible_and_nothing_else(rows, window, parts):
    """Red when: packed_kinds compares `>=` for needed or edge, forgets the window's -1, takes max
    for least, makes the diagonal EDGE, or drops EMPTY; steps orders keys forwards, loses a part,
    marks `ends` without the count, or opens a row once for each part."""
    rows = packed_tokens(rows)
    listed = check_list(rows, Options(True, 1.0, window), parts)
    # Exact: only pairs with something visible are listed, besides one for each EMPTY block.
    needed = blocks_of(np.asarray(visible_BTS(rows, window))).any((-1, -2))
    assert sum(e["kind"] != st.EMPTY for e in listed) == parts * needed.sum()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    queries=hst.tuples(any_tokens(16), any_tokens(16)),
    keys=hst.tuples(any_tokens(24), any_tokens(24)),
    window=WINDOWS,
    parts=hst.sampled_from([1, 3]),
)
def test_unpacked_lists_hold_all_that_is_visible(queries, keys, window, parts):
    """Red when: general_kinds calls a block FULL that may_see alone allows, drops EMPTY, or marks
    EMPTY blocks at every key block."""
    check_list(unpacked_rows(queries, keys), Options(False, 1.0, window), parts)


def test_the_largest_numbers_fit_an_entry():
    """Red when: a field of an entry is one bit narrower, or kinds checks another limit."""
    kind = jnp.full((4096, 1, 1), st.CORNER)
    listing = jax.jit(st.steps, static_argnames=("packed", "parts"))
    listed = listing(kind, jnp.ones((4096, 1, 1), bool), packed=True)
    last = int(listed.actions_E[-1])
    assert (st.row(last), st.part(last), st.kind(last)) == (4095, 0, st.CORNER)
    many = listing(kind[:1], jnp.ones((1, 1, 1), bool), packed=True, parts=2047)
    last = int(many.actions_E[-1])
    assert (st.row(last), st.part(last), st.kind(last)) == (0, 2046, st.CORNER)
    assert last > 0
    blocks = st._MAX_BLOCKS - 1
    assert st.query_block(jnp.int32(blocks << 16 | blocks)) == blocks
    assert st.key_block(jnp.int32(blocks << 16 | blocks)) == blocks


@pytest.mark.parametrize(
    ("B", "T", "got"), [(4097, 8, "4097 rows"), (1, (2**15 + 1) * 8, "32769 blocks")]
)
def test_too_large_a_batch_is_refused(B, T, got):
    """Red when: steps.kinds checks neither rows nor blocks."""
    row = jax.ShapeDtypeStruct((B, T), jnp.int32)
    with pytest.raises(ValueError, match=f"at most 4096 rows and 32768 blocks of 8.*{got}.*split"):
        jax.eval_shape(lambda *r: st.kinds(Rows(*r), Options(True, 1.0), 8), row, row, row, row)


# The names that each_tile gives its regions.
SCOPES = ("full", "diagonal", "edge_square", "corner", "corner_square", "masked")


@functools.partial(jax.jit, static_argnums=1)
def walked(rows: Rows, options: Options):
    """What the kernels' walk over the list visits: (times_ST, shown_ST, calls of each of SCOPES).

    times counts the tiles in which a pair of tokens lies, shown those whose mask lets it pass;
    all rows on one axis. The walk is the kernels' own: steps, each_tile, mask_tile.
    """
    listed = st.steps(*st.kinds(rows, options, BLOCK), packed=options.packed)
    rows_, S = rows.kv_segments_BS.shape
    marks = pallas_tpu.marks(rows, options)

    def kernel(places, actions, first_keys, *refs):
        mark_refs, (times, shown, calls) = refs[: len(marks)], refs[len(marks) :]
        entry = pl.program_id(1)

        @pl.when(entry == 0)
        def _():
            for ref in (times, shown, calls):
                ref[...] = jnp.zeros_like(ref)

        place, action = places[entry], actions[entry]
        first_index = (st.key_block(place) - st.row(action) * (S // BLOCK)) * BLOCK

        def visit(kind, tiles, scope):
            calls[SCOPES.index(scope)] += 1
            for t in tiles:
                keys = pl.ds(st.key_block(place) * BLOCK + t.k, t.keys)
                queries = pl.ds(st.query_block(place) * BLOCK + t.q, t.queries)
                nothing = jnp.zeros((t.keys, t.queries))
                masked = tpu_forward.mask_tile(nothing, t, kind, mark_refs, first_index, options)
                times[keys, queries] += 1
                shown[keys, queries] += (masked == 0).astype(jnp.int32)

        for kind in tpu_forward.kinds_of(options):

            @pl.when(st.kind(action) == kind)
            def _(kind=kind):
                tpu_forward.each_tile(
                    kind, TILING, first_keys, place, first_index, functools.partial(visit, kind)
                )

    shape = (rows_ * S, rows.q_segments_BT.size)
    outs = [jax.ShapeDtypeStruct(s, jnp.int32) for s in (shape, shape, (len(SCOPES),))]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(1, listed.count),
            in_specs=tpu_forward.mark_specs(options, BLOCK),
            out_specs=[pl.BlockSpec(shape, lambda *_: (0, 0))] * 2
            + [pl.BlockSpec((len(SCOPES),), lambda *_: (0,))],
        ),
        out_shape=outs,
        interpret=True,
    )(
        listed.places_E,
        listed.actions_E,
        pallas_tpu.least_first_keys(rows, options, TILING.square),
        *marks,
    )


def check_walk(rows, options):
    times_ST, shown_ST, calls = (np.asarray(x) for x in walked(rows, options))
    visible = np.asarray(visible_BTS(rows, options.window))
    want = np.zeros_like(shown_ST)
    T, S = visible.shape[1:]
    for b, row in enumerate(visible):
        want[b * S : (b + 1) * S, b * T : (b + 1) * T] = row.T
    np.testing.assert_array_equal(shown_ST, want)
    assert times_ST.max() <= 1
    return dict(zip(SCOPES, calls.tolist()))


@pytest.mark.parametrize("window", [None, 11])
def test_packed_tiles_show_each_visible_pair_once_and_counts_agree(window):
    """Red when: each_tile starts a square late or ends a CORNER's squares early; mask_tile shifts
    the triangle or reads first keys with `>`; static_tiles cuts a diagonal's keys off; counts
    miss a square."""
    options = Options(True, 1.0, window)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(documents_of_rows=hst.tuples(documents, documents))
    def check(documents_of_rows):
        rows = packed_tokens(documents_of_rows)
        calls = check_walk(rows, options)
        counts = region_counts(rows, options, TILING, heads=3, backward=False)
        for scope, name in (
            ("full", "full"),
            ("diagonal", "diagonal"),
            ("edge_square", "edge_strip/edge_squares/edge_square"),
            ("corner", "corner_strip/corner"),
            ("corner_square", "corner_strip/corner_squares/corner_square"),
        ):
            assert counts[name] == 3 * calls[scope], name

    check()


@pytest.mark.parametrize("window", [None, 11])
def test_unpacked_tiles_show_each_visible_pair_once(window):
    """Red when: mask_tile drops segments, order or window of MASKED; a query of segment 0 sees
    keys of segment 0 (pallas_tpu.marks); static_tiles leaves a strip out."""
    options = Options(False, 1.0, window)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        queries=hst.tuples(any_tokens(16), any_tokens(16)),
        keys=hst.tuples(any_tokens(24), any_tokens(24)),
    )
    def check(queries, keys):
        rows = unpacked_rows(queries, keys)
        calls = check_walk(rows, options)
        counts = region_counts(rows, options, TILING, heads=3, backward=False)
        assert [counts[n] for n in ("full", "masked")] == [3 * calls[n] for n in ("full", "masked")]

    check()


@pytest.mark.parametrize(("strip", "trapezoid"), [(128, 128), (512, 128), (512, 256), (1024, 256)])
def test_static_tiles_cover_block_and_triangle(strip, trapezoid):
    """Red when: a diagonal tile ends before its last query, or two tiles overlap. Sizes of the
    certified kinds, in units of a token."""
    tiling = dataclasses.replace(TILING, block=1024, strip=strip, trapezoid=trapezoid)
    for diagonal in (False, True):
        times = np.zeros((1024, 1024), int)  # [query, key]
        written = np.zeros(1024, int)
        for t in tpu_forward.static_tiles(tiling, diagonal):
            times[t.q : t.q + t.queries, t.k : t.k + t.keys] += 1
            if t.writes:
                assert not written[t.q : t.q + t.queries].any(), "writes over what was added"
                written[t.q : t.q + t.queries] = 1
            assert written[t.q : t.q + t.queries].all() == diagonal, "adds before it writes"
            assert not t.diagonal or (t.keys >= t.queries and t.k + t.keys == t.q + t.queries)
        assert times.max() == 1
        assert written.all() == diagonal and written.any() == diagonal
        if not diagonal:
            assert times.all()
        else:
            assert times[np.tril_indices(1024)].all()
            assert times.sum() == sum(
                (q + trapezoid) * trapezoid for q in range(0, 1024, trapezoid)
            )
