"""Who may attend to whom: the mask rule, token by token and block by block.

Axis key: B batch, T query length, S key length, N blocks of tokens, Q query blocks, K key blocks.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

INT_MAX = jnp.iinfo(jnp.int32).max
INT_MIN = jnp.iinfo(jnp.int32).min


class Rows(NamedTuple):
    """Where each token stands. int32; segment 0 is padding or a free cache slot, and -2^31 is no
    document's: pallas_tpu.marks gives it to queries that see nothing.

    A position is the token's place in its document, so 0 <= position < 2^31.
    """

    q_positions_BT: jax.Array
    kv_positions_BS: jax.Array
    q_segments_BT: jax.Array
    kv_segments_BS: jax.Array


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of a call; api.attention documents each field."""

    packed: bool
    scale: float
    window: int | None = None
    soft_cap: float | None = None


def visible_BTS(rows: Rows, window: int | None = None) -> jax.Array:
    """Which key each query may attend to (bool): the only definition of "may attend".

    Same non-zero segment, position not later, and with a window less than `window` positions
    back: a query sees itself and the `window - 1` tokens before it.
    """
    q_positions_BT1, kv_positions_B1S = (
        rows.q_positions_BT[:, :, None],
        rows.kv_positions_BS[:, None],
    )
    q_segments_BT1, kv_segments_B1S = rows.q_segments_BT[:, :, None], rows.kv_segments_BS[:, None]
    visible_BTS = (q_segments_BT1 == kv_segments_B1S) & (q_segments_BT1 != 0)
    visible_BTS &= kv_positions_B1S <= q_positions_BT1
    if window is not None:
        visible_BTS &= q_positions_BT1 - kv_positions_B1S < window
    return visible_BTS


class BlockRanges(NamedTuple):
    """Of each block of tokens, the least and greatest (segment, position) pair in lexicographic
    order, padding left out; int32. A block of nothing but padding has least > greatest.

    `padded_BN` (bool) says that the block holds at least one token of padding.
    """

    first_segment_BN: jax.Array
    first_position_BN: jax.Array
    last_segment_BN: jax.Array
    last_position_BN: jax.Array
    padded_BN: jax.Array


def block_ranges(segments_BT: jax.Array, positions_BT: jax.Array, block: int) -> BlockRanges:
    """The ranges of consecutive blocks of `block` tokens; a ragged last block counts as padded."""
    B, T = segments_BT.shape
    fill = ((0, 0), (0, -T % block))
    segments_BNQ = jnp.pad(segments_BT, fill).reshape(B, -1, block)
    positions_BNQ = jnp.pad(positions_BT, fill).reshape(B, -1, block)
    real_BNQ = segments_BNQ != 0
    first_BN = jnp.min(segments_BNQ, -1, where=real_BNQ, initial=INT_MAX)
    last_BN = jnp.max(segments_BNQ, -1, where=real_BNQ, initial=INT_MIN)
    in_first_BNQ = real_BNQ & (segments_BNQ == first_BN[..., None])
    in_last_BNQ = real_BNQ & (segments_BNQ == last_BN[..., None])
    return BlockRanges(
        first_BN,
        jnp.min(positions_BNQ, -1, where=in_first_BNQ, initial=INT_MAX),
        last_BN,
        jnp.max(positions_BNQ, -1, where=in_last_BNQ, initial=INT_MIN),
        ~real_BNQ.all(-1),
    )


def may_see(q: BlockRanges, kv: BlockRanges, window: int | None = None) -> jax.Array:
    """Whether some query of a block may see some key of a block, bool [B, Q, K].

    False is a proof for any input: if i sees j, then both are in one segment s and
    least(kv) <= (s, position j) <= (s, position i) <= greatest(q), and the segments' ranges
    overlap; with a window also greatest(kv) >= (s, position j) > (s, position i - window) >=
    least(q) moved back by the window. True is exact, as tight as the tokens themselves, when rows
    are packed with segments that do not decrease along the row and queries and keys are the same
    tokens; segments in another order can only make it True too often.
    """
    q_first, q_first_at = q.first_segment_BN[:, :, None], q.first_position_BN[:, :, None]
    q_last, q_last_at = q.last_segment_BN[:, :, None], q.last_position_BN[:, :, None]
    kv_first, kv_first_at = kv.first_segment_BN[:, None], kv.first_position_BN[:, None]
    kv_last, kv_last_at = kv.last_segment_BN[:, None], kv.last_position_BN[:, None]
    # Also False where either block is nothing but padding: first is INT_MAX, last INT_MIN.
    not_later = (kv_first < q_last) | ((kv_first == q_last) & (kv_first_at <= q_last_at))
    if window is None:
        near = kv_last >= q_first
    else:
        near = (kv_last > q_first) | ((kv_last == q_first) & (kv_last_at > q_first_at - window))
    return not_later & near


def all_seen(q: BlockRanges, kv: BlockRanges, window: int | None = None) -> jax.Array:
    """Whether every query of a block sees every key of a block, bool [B, Q, K]: no mask needed.

    Exact for blocks of one segment without padding; False for all others.
    """
    one_segment = (q.first_segment_BN == q.last_segment_BN) & ~q.padded_BN
    one_kv_segment = (kv.first_segment_BN == kv.last_segment_BN) & ~kv.padded_BN
    seen = one_segment[:, :, None] & one_kv_segment[:, None]
    seen &= q.first_segment_BN[:, :, None] == kv.first_segment_BN[:, None]
    seen &= kv.last_position_BN[:, None] <= q.first_position_BN[:, :, None]
    if window is not None:
        seen &= q.last_position_BN[:, :, None] - kv.first_position_BN[:, None] < window
    return seen
