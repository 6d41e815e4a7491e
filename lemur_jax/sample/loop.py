"""The compiled part of sampling: prefill, and a loop of decode steps. Pure functions of arrays.

Dimension key: B batch, P prompt bucket, S cache bucket, V vocab (padded), C tokens of a chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lemur_jax.model.cache import KVCache, empty_cache
from lemur_jax.model.decoder import Decoder
from lemur_jax.sample.methods import Chain


class Rows(NamedTuple):
    """What does not change while a batch is decoded; one entry for each row.

    Attributes:
      seed: [B] uint32; with `sample` and the token's index it makes the key of each draw.
      sample: [B] uint32, which of a request's samples this is.
      limit: [B] int32, new tokens at most; 0 for a row that only fills up the batch.
      stop_ids: [B,K] int32, tokens that end the row; filled up with -1.
      chain: sampling transforms with numbers [B].
    """

    seed: jax.Array
    sample: jax.Array
    limit: jax.Array
    stop_ids: jax.Array
    chain: Chain


class DecodeState(NamedTuple):
    """Everything that a decode step needs and changes.

    A step feeds `token` and draws the next one. Worked example: prompts [5,6,7] and [5] in a
    bucket of 4; both have drawn one token (9 and 2) after prefill, and 2 is a stop id:

      token [9,2]   position [3,1]   generated [1,1]   done [F,T]   cache.end 4

    After one step, which draws 8 for the first row:

      token [8,2]   position [4,1]   generated [2,1]   done [F,T]   cache.end 5

    Attributes:
      cache: keys and values of every token but `token`.
      token: [B] int32, the last token that was drawn: the next one to be fed.
      position: [B] int32, of `token` in its row: prompt tokens + generated - 1.
      generated: [B] int32, new tokens drawn so far, `token` included.
      done: [B] bool. A done row keeps its token, position and count; what the step computes for it
        is thrown away. It is done when `token` is a stop id, when `generated` has reached the
        row's limit, or when the caller says so (a stop string).
      seen_BV: [B,V] bool, tokens of the prompt and of what was generated.
    """

    cache: KVCache
    token: jax.Array
    position: jax.Array
    generated: jax.Array
    done: jax.Array
    seen_BV: jax.Array


class Drawn(NamedTuple):
    """New tokens of one prefill (C = 1) or chunk.

    Attributes:
      tokens: [B,C] int32; entries from `count` on mean nothing.
      logprobs: [B,C] float32, log-probability of each token under the model's own distribution
        (before any transform, temperature 1); 0 where they were not asked for.
      count: [B] int32, how many of the columns are the row's.
      done: [B] bool, after the last of them.
    """

    tokens: jax.Array
    logprobs: jax.Array
    count: jax.Array
    done: jax.Array


def prefill(
    model: Decoder, tokens_BP: jax.Array, lengths_B: jax.Array, rows: Rows, want_logprobs: jax.Array
) -> tuple[DecodeState, Drawn]:
    """Reads the prompts and draws the first token of each row.

    Args:
      model: decoder with unstacked layers.
      tokens_BP: [B,P] int32, right-padded.
      lengths_B: [B] int32, at least 1.
      rows: the batch.
      want_logprobs: scalar bool; traced, so that asking for them compiles nothing.

    Returns:
      A state whose cache is full (S = P; see `lengthen`), and one column of tokens.
    """
    batch, bucket = tokens_BP.shape
    column = jnp.broadcast_to(jnp.arange(bucket, dtype=jnp.int32), tokens_BP.shape)
    real_BP = column < lengths_B[:, None]
    cache = empty_cache(model.config, batch, bucket, stacked=False)
    x_BPE, cache = model.hidden(
        tokens_BP, jnp.where(real_BP, column, 0), real_BP.astype(jnp.int32), cache
    )
    # Only the last state of each row goes through the head: a V-wide product for 1 of P tokens.
    last_B1E = jnp.take_along_axis(x_BPE, lengths_B[:, None, None] - 1, axis=1)
    logits_BV = model.logits(last_B1E)[:, 0]
    seen_BV = jnp.zeros(logits_BV.shape, jnp.bool_)
    seen_BV = seen_BV.at[jnp.arange(batch)[:, None], tokens_BP].max(real_BP)
    state = DecodeState(
        cache=cache,
        token=jnp.zeros((batch,), jnp.int32),
        position=lengths_B - 1,
        generated=jnp.zeros((batch,), jnp.int32),
        done=rows.limit == 0,
        seen_BV=seen_BV,
    )
    state, token, logprob = _draw(state, logits_BV, cache, rows, want_logprobs)
    return state, Drawn(token[:, None], logprob[:, None], state.generated, state.done)


def lengthen(state: DecodeState, slots: int) -> DecodeState:
    """The same state with room for `slots` tokens in its cache. Free slots have segment 0."""

    def grow(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, slots - x.shape[axis])
        return jnp.pad(x, widths)

    cache = state.cache
    return state._replace(
        cache=cache._replace(
            k=tuple(grow(k, 1) for k in cache.k),
            v=tuple(grow(v, 1) for v in cache.v),
            positions=grow(cache.positions, 1),
            segment_ids=grow(cache.segment_ids, 1),
        )
    )


def decode(
    read_model: Callable[[], Decoder],
    state: DecodeState,
    rows: Rows,
    stopped_B: jax.Array,
    steps: jax.Array,
    want_logprobs: jax.Array,
    capacity: int,
) -> tuple[DecodeState, Drawn]:
    """Decodes up to `steps` tokens for each row; fewer when all rows are done.

    Args:
      read_model: gives the decoder, unstacked; called inside the loop, so that a layout of weights
        that it undoes becomes part of the products and is not a copy made before the loop.
      state: donated by the caller: its buffers become the result's.
      rows: the batch.
      stopped_B: [B] bool, rows that the caller ends before the first step.
      steps: scalar int32, at most `capacity`; traced, so that any chunk size is one program.
      want_logprobs: scalar bool.
      capacity: C, static.
    """
    batch = state.token.shape[0]
    state = state._replace(done=state.done | stopped_B)
    before = state.generated

    def unfinished(carry):
        step, state, _, _ = carry
        return (step < steps) & ~jnp.all(state.done)

    def one_step(carry):
        step, state, tokens_BC, logprobs_BC = carry
        ones = jnp.ones((batch, 1), jnp.int32)
        logits_B1V, cache = read_model()(
            state.token[:, None], state.position[:, None], ones, state.cache
        )
        state, token, logprob = _draw(state, logits_B1V[:, 0], cache, rows, want_logprobs)
        write = jax.lax.dynamic_update_slice
        tokens_BC = write(tokens_BC, token[:, None], (0, step))
        logprobs_BC = write(logprobs_BC, logprob[:, None], (0, step))
        return step + 1, state, tokens_BC, logprobs_BC

    start = (
        jnp.int32(0),
        state,
        jnp.zeros((batch, capacity), jnp.int32),
        jnp.zeros((batch, capacity), jnp.float32),
    )
    _, state, tokens_BC, logprobs_BC = jax.lax.while_loop(unfinished, one_step, start)
    # A row's tokens are the first columns: it is not done until it is, then never again.
    return state, Drawn(tokens_BC, logprobs_BC, state.generated - before, state.done)


def _draw(state, logits_BV, cache, rows, want_logprobs):
    """The state after one more token, that token [B] and its log-probability [B]."""
    keys_B = jax.vmap(_key)(rows.seed, rows.sample, state.generated)
    token = rows.chain.draw(logits_BV, state.seen_BV, keys_B)
    token = jnp.where(state.done, state.token, token)
    logprob = jax.lax.cond(
        want_logprobs,
        lambda: _logprob(logits_BV, token),
        lambda: jnp.zeros(token.shape, jnp.float32),
    )
    active = ~state.done
    generated = state.generated + active
    stops = jnp.any(token[:, None] == rows.stop_ids, axis=-1)
    state = DecodeState(
        cache=cache,
        token=token,
        position=state.position + active,
        generated=generated,
        done=state.done | stops | (generated >= rows.limit),
        seen_BV=state.seen_BV.at[jnp.arange(token.shape[0]), token].set(True),
    )
    return state, token, logprob


def _logprob(logits_BV, token_B):
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _key(seed: jax.Array, sample: jax.Array, index: jax.Array) -> jax.Array:
    """The key of one draw: nothing but (seed, sample, index of the new token) decides it."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), index)
