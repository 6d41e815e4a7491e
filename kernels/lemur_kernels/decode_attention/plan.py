"""What each grid step of the TPU kernel does: static sizes, and a table of items made at run time.

An item is one grid step: the queries of one tile of one row against one group of kv heads.

Axis key: B rows, N query tokens, H heads, K kv heads, G = H / K, M pages in a row's table,
Z tokens in a page, C lanes, R stacked query rows of an item, I items of both cores.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CORES = 2  # of a megacore chip (v4, v5p); on the others the same items run one after another
LANES = 128
SUBLANES = 8
# One block's copies take 0.6 to 1.8 k cycles at HBM bandwidth, more than its compute everywhere.
BLOCK_BYTES = 1 << 20
MAX_BLOCK_TOKENS = 1024
MAX_ROWS = 256  # of one matmul: enough to be bound by the matrix unit, not by loading keys
MAX_ROWS_HEADS = 1024  # bounds the f32 accumulators: 3 x 512 KiB at head_dim 128
COPIES_PER_TURN = 8  # page copies started side by side: a chain of scalar instructions each
MAX_TABLE = 200_000  # page ids; scalar memory holds 1 MiB


class Plan(NamedTuple):
    """Static sizes of the kernel."""

    heads: int  # kv heads of an item; one page copy is [heads, Z, C]
    unroll: int  # heads computed side by side, to hide latencies behind one another
    pages: int  # pages of a block
    queries: int  # query tokens of an item
    rows: int  # stacked query rows of an item: queries * G, padded to whole sublanes
    tiles: int  # items along N
    by_heads: bool  # whether the two cores share a row's heads, or the rows


def make_plan(B, N, H, K, M, page_tokens, lanes, itemsize, window) -> Plan:
    """Block sizes from shapes alone.

    The cores share the heads where they can: equal work whatever the lengths.
    """
    G = H // K
    shared = K // CORES if K % CORES == 0 else K
    token_bytes = lanes * itemsize
    fits = [
        n
        for n in range(1, shared + 1)
        if shared % n == 0 and n * max(page_tokens, LANES) * token_bytes <= BLOCK_BYTES
    ]
    heads = max(fits, default=1)
    by_heads = (K // heads) % CORES == 0
    sight = M * page_tokens if window is None else min(M * page_tokens, window + N)
    pages = max(1, LANES // page_tokens)
    while (
        2 * pages * heads * page_tokens * token_bytes <= BLOCK_BYTES
        and 2 * pages * page_tokens <= MAX_BLOCK_TOKENS
        and pages * page_tokens < sight
    ):
        pages *= 2
    most = max(1, min(MAX_ROWS, MAX_ROWS_HEADS // heads) // G)
    tiles = -(-N // most)
    queries = -(-N // tiles)
    rows = -(-queries * G // SUBLANES) * SUBLANES
    unroll = max(n for n in (1, 2, 3, 4) if heads % n == 0 and (n == 1 or n * rows <= MAX_ROWS))
    return Plan(heads, unroll, pages, queries, rows, tiles, by_heads)


class Items(NamedTuple):
    """One entry per grid step, core by core; int32 [I] each."""

    row: jax.Array
    group: jax.Array  # of kv heads
    tile: jax.Array  # of query tokens
    low: jax.Array  # first and
    high: jax.Array  # end of the pages in sight, as places in the row's table; empty: 0, 0
    following: jax.Array  # the core's next item with pages in sight; I: none
    position: jax.Array  # of the item's first query
    valid: jax.Array  # queries


def make_items(plan: Plan, K, M, page_tokens, lengths_B, new_tokens_B, window) -> Items:
    """The run-time table. The number of rows is even unless the cores share the heads."""
    lengths_B = jnp.clip(lengths_B, 0, M * page_tokens)  # never past the end of a row's table
    B, groups = lengths_B.shape[0], K // plan.heads
    if plan.by_heads:
        row_B = jnp.broadcast_to(jnp.arange(B), (CORES, B))
        group = jnp.arange(groups).reshape(CORES, -1)
    else:
        # Longest first, dealt 0 1 1 0 0 1 ...: the cores get about equally many keys.
        sight_B = lengths_B if window is None else jnp.minimum(lengths_B, window + new_tokens_B)
        deal = jnp.argsort(-jnp.where(new_tokens_B > 0, sight_B, 0)).reshape(-1, CORES)
        turned = (jnp.arange(deal.shape[0]) % 2 == 1)[:, None]
        row_B = jnp.where(turned, deal[:, ::-1], deal).T
        group = jnp.broadcast_to(jnp.arange(groups), (CORES, groups))
    shape = (CORES, row_B.shape[1], group.shape[1], plan.tiles)
    tile = jnp.arange(plan.tiles)
    row, group, tile = (
        jnp.broadcast_to(x, shape).reshape(-1).astype(jnp.int32)
        for x in (row_B[:, :, None, None], group[:, None, :, None], tile)
    )
    position = (lengths_B - new_tokens_B)[row] + tile * plan.queries
    valid = jnp.clip(new_tokens_B[row] - tile * plan.queries, 0, plan.queries)
    last = position + valid - 1
    live = (valid > 0) & (last >= 0)
    high = jnp.where(live, last // page_tokens + 1, 0)
    low = jnp.zeros_like(high)
    if window is not None:
        low = jnp.where(live, jnp.maximum(position - window + 1, 0) // page_tokens, 0)
    count = row.shape[0]
    number = jnp.where(live, jnp.arange(count), count).reshape(CORES, -1)
    upcoming = lax.cummin(number, axis=1, reverse=True)
    following = jnp.pad(upcoming[:, 1:], ((0, 0), (0, 1)), constant_values=count).reshape(-1)
    items = (row, group, tile, low, high, following, position, valid)
    return Items(*(x.astype(jnp.int32) for x in items))
