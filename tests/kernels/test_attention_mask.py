"""The mask rule by blocks: never skips a visible pair, never calls a masked block unmasked."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_float64 import visible
from hypothesis import given, settings
from hypothesis import strategies as st
from lemur_kernels.attention.mask import Rows, all_seen, block_ranges, may_see, visible_BTS

WINDOWS = st.one_of(st.none(), st.integers(1, 12), st.just(2**31 - 1))
BLOCK = 4


def tokens(length):
    """Segments and positions in any order, padding anywhere; even negative segments."""
    token = st.tuples(st.integers(-1, 3), st.integers(0, 9))
    return st.lists(token, min_size=length, max_size=length).map(
        lambda pairs: tuple(np.array(x, np.int32)[None] for x in zip(*pairs))
    )


# Lengths of documents, with stretches of padding between them.
packed_documents = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from([0, 0, 0, 1, 5])), min_size=1, max_size=6
)


def packed_row(documents):
    """Segments that grow along the row, positions from 0 in each document; [1, 23] each, so that
    the last block is ragged."""
    segments, positions = np.zeros((1, 23), np.int32), np.zeros((1, 23), np.int32)
    start = 0
    for number, (length, padding) in enumerate(documents, 1):
        end = min(start + length, 23)
        segments[0, start:end] = number
        positions[0, start:end] = np.arange(end - start)
        start = end + padding
    return segments, positions


def by_blocks(pairs_TS, reduce):
    """[T, S] pairs -> [Q, K] over blocks; a ragged end is filled with what changes nothing."""
    fill = reduce is np.all
    T, S = (-n % BLOCK for n in pairs_TS.shape)
    pairs = np.pad(pairs_TS, ((0, T), (0, S)), constant_values=fill)
    pairs = pairs.reshape(pairs.shape[0] // BLOCK, BLOCK, pairs.shape[1] // BLOCK, BLOCK)
    return reduce(pairs, axis=(1, 3))


def verdicts(q, kv, window):
    """may_see, all_seen and the true pairs of one row."""
    (q_segments, q_positions), (kv_segments, kv_positions) = q, kv
    pairs = visible(q_positions[0], kv_positions[0], q_segments[0], kv_segments[0], window)
    rows = Rows(*(jnp.array(x) for x in (q_positions, kv_positions, q_segments, kv_segments)))
    np.testing.assert_array_equal(visible_BTS(rows, window)[0], pairs)
    q_ranges = block_ranges(rows.q_segments_BT, rows.q_positions_BT, BLOCK)
    kv_ranges = block_ranges(rows.kv_segments_BS, rows.kv_positions_BS, BLOCK)
    may, all_ = (f(q_ranges, kv_ranges, window)[0] for f in (may_see, all_seen))
    return np.asarray(may), np.asarray(all_), pairs


@settings(max_examples=300, deadline=None, derandomize=True)
@given(q=tokens(11), kv=tokens(18), window=WINDOWS)
def test_any_tokens_are_judged_safely(q, kv, window):
    """Red when: not_later compares positions alone; the window's shift is forgotten or `>=`; first
    takes the least position of the block and not of its first segment; all_seen forgets padding,
    the segment or the window."""
    may, all_, pairs = verdicts(q, kv, window)
    assert not np.any(by_blocks(pairs, np.any) & ~may)
    assert not np.any(all_ & ~by_blocks(pairs, np.all))
    assert not np.any(all_ & ~may)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(documents=packed_documents, window=WINDOWS)
def test_packed_rows_are_judged_exactly(documents, window):
    """Red when: may_see drops the segments' overlap, the order, or the window's term; all_seen
    wants `<`. Exact: may_see is "some pair is visible"; all_seen is "every pair is visible" for
    blocks without padding."""
    row = packed_row(documents)
    may, all_, pairs = verdicts(row, row, window)
    np.testing.assert_array_equal(may, by_blocks(pairs, np.any))
    whole = np.pad(row[0][0] != 0, (0, -23 % BLOCK)).reshape(-1, BLOCK).all(-1)
    every = by_blocks(pairs, np.all) & whole[:, None] & whole[None]
    np.testing.assert_array_equal(all_, every)


@pytest.mark.parametrize("window", [None, 2])
def test_a_block_of_padding_sees_nothing(window):
    """Red when: block_ranges takes padding for a document of segment 0."""
    zero, one = np.zeros((1, 4), np.int32), np.ones((1, 4), np.int32)
    for q, kv in (((zero, one), (one, one)), ((one, one), (zero, one)), ((zero, one),) * 2):
        may, all_, _ = verdicts(q, kv, window)
        assert not may.any() and not all_.any()
