"""The list of block pairs that a TPU kernel visits, computed on the device from the segment ids.

A grid step of the kernels is one pair (block of queries, block of keys). Pairs in which nothing is
visible are not in the list, so they cost neither a copy nor a step; the list's length is the
grid's extent, a number known at run time only. Each entry says what the pair needs:

  FULL      everything is visible: no mask
  DIAGONAL  the triangle on and below the diagonal is visible (packed rows)
  EDGE      each query sees the keys from its first one on (packed: a document starts, or a window
            ends, inside the pair)
  CORNER    DIAGONAL and EDGE
  MASKED    segments and positions decide token by token (rows that are not packed)
  EMPTY     the queries see no key at all: their results are 0

Axis key: B batch, T query length, S key length, Q query blocks, N key blocks, E entries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lemur_kernels.attention.mask import Options, Rows, all_seen, block_ranges, may_see

EMPTY, FULL, DIAGONAL, EDGE, CORNER, MASKED = range(6)
_FIRST, _LAST, _OPENS, _CLOSES = 3, 4, 5, 6  # bits above the kind
_ROW, _PART = 8, 20
_MAX_BLOCKS, _MAX_ROWS, _MAX_PARTS = 1 << 15, 1 << 12, 1 << 11


class Steps(NamedTuple):
    """Entries in the order of the grid: by row, part, query block; key blocks from the last back.

    places_E: int32, query block << 16 | key block, both counted through all rows.
    actions_E: int32, part << 20 | row << 8 | flags | kind; the flags say that the entry is the
      first or last of its query block, or that it opens or closes a row.
    count: int32 scalar, how many entries are real; the rest repeat nothing and are never run.
    """

    places_E: jax.Array
    actions_E: jax.Array
    count: jax.Array


def query_block(place):
    return place >> 16


def key_block(place):
    return place & 0xFFFF


def kind(action):
    return action & 7


def is_first(action):
    return (action >> _FIRST) & 1 == 1


def is_last(action):
    return (action >> _LAST) & 1 == 1


def opens_row(action):
    return (action >> _OPENS) & 1 == 1


def closes_row(action):
    return (action >> _CLOSES) & 1 == 1


def row(action):
    return (action >> _ROW) & (_MAX_ROWS - 1)


def part(action):
    return action >> _PART


def first_keys(rows: Rows, window: int | None) -> jax.Array:
    """Index of the first key that each query of packed rows sees, int32 [B, T]; T where none.

    Packed rows are contiguous documents, so query i sees exactly the keys first_keys[i] .. i.
    """
    segments_BT = rows.q_segments_BT
    T = segments_BT.shape[1]
    index_T = jnp.arange(T, dtype=jnp.int32)
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start_BT = jax.lax.cummax(jnp.where(segments_BT != before_BT, index_T, 0), axis=1)
    if window is not None:
        start_BT = jnp.maximum(start_BT, index_T - (window - 1))
    return jnp.where(segments_BT == 0, T, start_BT)


def packed_kinds(first_keys_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """(kind, needed) of each pair of blocks of packed rows, int32 and bool [B, Q, Q]."""
    B, T = first_keys_BT.shape
    blocks_BQ = first_keys_BT.reshape(B, -1, block)
    least_BQ1, most_BQ1 = blocks_BQ.min(-1)[..., None], blocks_BQ.max(-1)[..., None]
    index_Q = jnp.arange(T // block)
    on_diagonal_QN = index_Q[:, None] == index_Q
    needed_BQN = (index_Q[:, None] >= index_Q) & ((index_Q + 1) * block > least_BQ1)
    edge_BQN = most_BQ1 > index_Q * block
    kind_BQN = jnp.where(edge_BQN, EDGE, FULL)
    kind_BQN = jnp.where(on_diagonal_QN, jnp.where(edge_BQN, CORNER, DIAGONAL), kind_BQN)
    empty_BQ1 = least_BQ1 == T
    kind_BQN = jnp.where(empty_BQ1, EMPTY, kind_BQN)
    return kind_BQN, jnp.where(empty_BQ1, on_diagonal_QN, needed_BQN)


def general_kinds(rows: Rows, window: int | None, block: int) -> tuple[jax.Array, jax.Array]:
    """(kind, needed) of each pair of blocks of any rows, int32 and bool [B, Q, N]."""
    q = block_ranges(rows.q_segments_BT, rows.q_positions_BT, block)
    kv = block_ranges(rows.kv_segments_BS, rows.kv_positions_BS, block)
    needed_BQN = may_see(q, kv, window)
    kind_BQN = jnp.where(all_seen(q, kv, window), FULL, MASKED)
    empty_BQ1 = ~needed_BQN.any(-1, keepdims=True)
    kind_BQN = jnp.where(empty_BQ1, EMPTY, kind_BQN)
    first_N = jnp.arange(needed_BQN.shape[-1]) == 0
    return kind_BQN, jnp.where(empty_BQ1, first_N, needed_BQN)


def kinds(rows: Rows, options: Options, block: int) -> tuple[jax.Array, jax.Array]:
    """(kind, needed) of each pair of blocks, int32 and bool [B, Q, N]; lengths are whole blocks.

    Raises:
      ValueError: more rows or blocks than an entry can name.
    """
    B, T = rows.q_segments_BT.shape
    blocks = B * max(T, rows.kv_segments_BS.shape[1]) // block
    if B > _MAX_ROWS or blocks > _MAX_BLOCKS:
        raise ValueError(
            f"attention implementation='pallas_tpu' takes at most {_MAX_ROWS} rows and "
            f"{_MAX_BLOCKS} blocks of {block} tokens on a device, got {B} rows and {blocks} "
            "blocks; split the batch"
        )
    if options.packed:
        return packed_kinds(first_keys(rows, options.window), block)
    return general_kinds(rows, options.window, block)


def steps(kind_BQN: jax.Array, needed_BQN: jax.Array, *, packed: bool, parts: int = 1) -> Steps:
    """The entries of the needed pairs; `parts` repeats each row's entries for parts of its heads.

    Static size: all pairs, or those on and below the diagonal for packed rows.
    """
    B, Q, N = needed_BQN.shape
    assert parts < _MAX_PARTS
    shape = (B, parts, Q, N)
    # Key blocks run backwards, so that a packed query block begins on its diagonal.
    needed = jnp.broadcast_to(needed_BQN[:, None, :, ::-1], shape).reshape(-1)
    size = B * parts * (Q * (Q + 1) // 2 if packed else Q * N)
    (pair_E,) = jnp.nonzero(needed, size=size, fill_value=0)
    count = needed.sum(dtype=jnp.int32)
    row_E, part_E, q_E, back_E = jnp.unravel_index(pair_E, shape)
    kv_E = N - 1 - back_E
    # Where a run of equal keys starts and ends among the real entries.
    entry_E = jnp.arange(size)
    group_E = (row_E * parts + part_E) * Q + q_E

    def starts(x_E):
        return jnp.pad(x_E[1:] != x_E[:-1], (1, 0), constant_values=True)

    def ends(x_E):
        return jnp.pad(x_E[1:] != x_E[:-1], (0, 1), constant_values=True) | (entry_E == count - 1)

    actions_E = kind_BQN[row_E, q_E, kv_E].astype(jnp.int32)
    for flag, bit in (
        (starts(group_E), _FIRST),
        (ends(group_E), _LAST),
        (starts(row_E), _OPENS),
        (ends(row_E), _CLOSES),
    ):
        actions_E |= flag.astype(jnp.int32) << bit
    actions_E |= (row_E << _ROW | part_E << _PART).astype(jnp.int32)
    places_E = ((row_E * Q + q_E) << 16 | (row_E * N + kv_E)).astype(jnp.int32)
    return Steps(places_E, actions_E, count)
