"""Attention on NVIDIA GPUs for packed rows of short documents: Pallas kernels through Triton.

cuDNN's kernel (cudnn.py) skips blocks by causality and by a window but not by segment, and wants
the documents as a bias of T S numbers. Here the blocks of keys that a block of queries needs are
found in XLA, from segments and positions (mask.may_see), and the kernel's loop runs over these
alone: work is the sum of the documents' own blocks, memory O(T + S). Blocks that need no mask
(mask.all_seen) have a loop of their own. Not one speed was measured: there was no GPU.

Why Triton: of Pallas' two GPU backends it alone compiles for Ampere and Hopper, 16 and 32 bit, in
every jax from 0.10 on, and its kernels run on a CPU with interpret=True. Mosaic GPU, which JAX
wants to keep, has only Hopper's and Blackwell's matrix instructions in jax 0.10 (Ampere's came
with 0.11), and its Hopper form is another program (TMA, barriers, warp specialisation). jax 0.11
warns that the Triton backend "will be removed in a future JAX version": when it is, this file's
three kernels have to be written for Mosaic GPU; what is outside them stays.

Running softmax and recomputation from the log-sum-exp as in FlashAttention-2 (arXiv:2307.08691);
dk and dv gather over the queries and the heads of a group in one program, dq over keys in
another: no atomics, so the same bits every time.

Axis key: B batch, T query length, S key length, H heads, K kv heads, G = H / K, D head dim (padded
to a power of 2 in the kernels); Q block of queries, C block of keys, M blocks of queries, N blocks
of keys.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lemur_kernels.attention.mask import Options, Rows, all_seen, block_ranges, may_see

LOG2_E = math.log2(math.e)
MAX_HEAD_DIM = 256
# Contracted axes of a product: both operands as they are, or the right one transposed.
NN, NT = ((1,), (0,)), ((1,), (1,))


class Tiling(NamedTuple):
    """Tokens of a block of queries and of keys, powers of 2 from 16 on; warps; pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiling_for(direction: str, dtype, head_dim: int) -> Tiling:
    """Blocks that fit an A100's and an H100's shared memory (163 and 227 KiB) and registers.

    By what Triton 3.9 and ptxas say of the compiled kernels, without a measurement.
    """
    wide, long = jnp.dtype(dtype).itemsize == 4, head_dim > 128
    if wide:  # without tensor cores: see _dot
        return Tiling(32, 16 if long else 32, 8, 1)
    if long:
        return Tiling(64, 32, 8, 2)
    return Tiling(128 if direction == "forward" else 64, 64, 4 if head_dim <= 64 else 8, 2)


def forward(
    q_BTHD, k_BSKD, v_BSKD, rows: Rows, options: Options, *, tiling=None, interpret=False
) -> tuple[jax.Array, jax.Array]:
    """See api.py. `tiling` is for measurements and tests, tiling_for's when None; `interpret`
    runs on any backend.

    Raises:
      ValueError: the backend or a head_dim that the kernels do not take.
    """
    _check(q_BTHD, interpret)
    B, T, H, D = q_BTHD.shape
    group = H // k_BSKD.shape[2]
    tiling = tiling or tiling_for("forward", q_BTHD.dtype, D)
    width, per_row = _width(D), _whole(rows)
    out_spec = pl.BlockSpec((None, tiling.queries, None, width), lambda i, b, h: (b, i, h, 0))
    lse_spec = pl.BlockSpec((None, None, tiling.queries), lambda i, b, h: (b, h, i))
    return _call(
        functools.partial(_forward_kernel, options=options, tiling=tiling, head_dim=D),
        tiling,
        (pl.cdiv(T, tiling.queries), B, H),
        [
            (_spans(rows, options, tiling), _SPAN),
            (q_BTHD, _heads(q_BTHD, width, 1)),
            (k_BSKD, _heads(k_BSKD, width, group)),
            (v_BSKD, _heads(v_BSKD, width, group)),
            *per_row,
        ],
        [
            (jax.ShapeDtypeStruct(q_BTHD.shape, q_BTHD.dtype), out_spec),
            (jax.ShapeDtypeStruct((B, H, T), jnp.float32), lse_spec),
        ],
        interpret,
        "forward",
    )


def backward(
    q_BTHD, k_BSKD, v_BSKD, rows: Rows, options: Options, out_BTHD, lse_BHT, dout_BTHD, *,
    tiling=None, interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """See api.py."""
    _check(q_BTHD, interpret)
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    group = H // K
    tiling = tiling or tiling_for("backward", q_BTHD.dtype, D)
    width, per_row = _width(D), _whole(rows)
    delta_BTH = jnp.sum(out_BTHD.astype(jnp.float32) * dout_BTHD.astype(jnp.float32), -1)
    delta_BHT, lse_BHT = delta_BTH.swapaxes(1, 2), lse_BHT * LOG2_E
    settings = {"options": options, "tiling": tiling, "head_dim": D}
    one_head = pl.BlockSpec((None, None, T), lambda i, b, h: (b, h, 0))
    [dq_BTHD] = _call(
        functools.partial(_dq_kernel, **settings),
        tiling,
        (pl.cdiv(T, tiling.queries), B, H),
        [
            (_spans(rows, options, tiling), _SPAN),
            (q_BTHD, _heads(q_BTHD, width, 1)),
            (k_BSKD, _heads(k_BSKD, width, group)),
            (v_BSKD, _heads(v_BSKD, width, group)),
            (dout_BTHD, _heads(dout_BTHD, width, 1)),
            (lse_BHT, one_head),
            (delta_BHT, one_head),
            *per_row,
        ],
        [(q_BTHD, pl.BlockSpec((None, tiling.queries, None, width), lambda i, b, h: (b, i, h, 0)))],
        interpret,
        "dq",
    )
    all_heads = pl.BlockSpec((None, T, group, width), lambda i, b, k: (b, 0, k, 0))
    group_rows = pl.BlockSpec((None, group, T), lambda i, b, k: (b, k, 0))
    dkv_spec = pl.BlockSpec((None, tiling.keys, None, width), lambda i, b, k: (b, i, k, 0))
    dk_BSKD, dv_BSKD = _call(
        functools.partial(_dkv_kernel, group=group, **settings),
        tiling,
        (pl.cdiv(S, tiling.keys), B, K),
        [
            (_spans(rows, options, tiling, by_keys=True), _SPAN),
            (q_BTHD, all_heads),
            (k_BSKD, _heads(k_BSKD, width, 1)),
            (v_BSKD, _heads(v_BSKD, width, 1)),
            (dout_BTHD, all_heads),
            (lse_BHT, group_rows),
            (delta_BHT, group_rows),
            *per_row,
        ],
        [(k_BSKD, dkv_spec), (v_BSKD, dkv_spec)],
        interpret,
        "dkv",
    )
    return dq_BTHD, dk_BSKD, dv_BSKD


def _forward_kernel(
    span_ref, q_ref, k_ref, v_ref, *refs, options: Options, tiling: Tiling, head_dim: int
):
    rows, (out_ref, lse_ref) = Rows(*refs[:4]), refs[4:]
    start = pl.program_id(0) * tiling.queries
    q_QD = _tokens(q_ref, start, tiling.queries, head_dim)
    at_Q1, in_Q1 = (x[:, None] for x in _query_marks(rows, start, tiling))

    def attend(masked, i, carry):
        acc_QD, top_Q, total_Q = carry
        k_CD = _tokens(k_ref, i * tiling.keys, tiling.keys, head_dim, ragged=masked)
        s_QC = _exponents(_dot(q_QD, k_CD, NT), options)[0]
        if masked:
            at_1C, in_1C = (x[None] for x in _key_marks(rows, i * tiling.keys, tiling))
            s_QC = jnp.where(_visible(at_Q1, at_1C, in_Q1, in_1C, options), s_QC, -jnp.inf)
        new_Q = jnp.maximum(top_Q, s_QC.max(-1))
        # Only a row with no visible key yet: exp2(-inf - -inf) would be NaN.
        base_Q = jnp.where(new_Q == -jnp.inf, 0.0, new_Q) if masked else new_Q
        p_QC, shrink_Q = jnp.exp2(s_QC - base_Q[:, None]), jnp.exp2(top_Q - base_Q)
        v_CD = _tokens(v_ref, i * tiling.keys, tiling.keys, head_dim, ragged=masked)
        acc_QD = acc_QD * shrink_Q[:, None] + _dot(p_QC.astype(v_CD.dtype), v_CD, NN)
        return acc_QD, new_Q, total_Q * shrink_Q + p_QC.sum(-1)

    nothing_Q = jnp.full(tiling.queries, -jnp.inf, jnp.float32)
    carry = jnp.zeros(q_QD.shape, jnp.float32), nothing_Q, jnp.zeros_like(nothing_Q)
    acc_QD, top_Q, total_Q = _each_block(span_ref, attend, carry)
    empty_Q = total_Q == 0
    total_Q = jnp.where(empty_Q, 1.0, total_Q)
    _put(out_ref, acc_QD / total_Q[:, None], start, q_ref.shape[0], head_dim)
    lse_Q = jnp.where(empty_Q, jnp.inf, top_Q / LOG2_E + jnp.log(total_Q))
    plgpu.store(lse_ref, lse_Q, mask=_inside(start, tiling.queries, q_ref.shape[0]))


def _dq_kernel(
    span_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs,
    options: Options, tiling: Tiling, head_dim: int,
):  # fmt: skip
    rows, dq_ref = Rows(*refs[:4]), refs[4]
    start = pl.program_id(0) * tiling.queries
    q_QD = _tokens(q_ref, start, tiling.queries, head_dim)
    dout_QD = _tokens(dout_ref, start, tiling.queries, head_dim)
    lse_Q1 = _row(lse_ref, start, tiling.queries, jnp.inf)[:, None]
    delta_Q1 = _row(delta_ref, start, tiling.queries)[:, None]
    at_Q1, in_Q1 = (x[:, None] for x in _query_marks(rows, start, tiling))

    def gather(masked, i, dq_QD):
        k_CD, v_CD = (
            _tokens(x, i * tiling.keys, tiling.keys, head_dim, ragged=masked)
            for x in (k_ref, v_ref)
        )
        s_QC, slope_QC = _exponents(_dot(q_QD, k_CD, NT), options)
        p_QC = jnp.exp2(s_QC - lse_Q1)
        if masked:
            at_1C, in_1C = (x[None] for x in _key_marks(rows, i * tiling.keys, tiling))
            p_QC = jnp.where(_visible(at_Q1, at_1C, in_Q1, in_1C, options), p_QC, 0.0)
        ds_QC = p_QC * (_dot(dout_QD, v_CD, NT) - delta_Q1) * slope_QC
        return dq_QD + _dot(ds_QC.astype(k_CD.dtype), k_CD, NN)

    dq_QD = _each_block(span_ref, gather, jnp.zeros(q_QD.shape, jnp.float32))
    _put(dq_ref, dq_QD * options.scale, start, q_ref.shape[0], head_dim)


def _dkv_kernel(
    span_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs,
    options: Options, tiling: Tiling, head_dim: int, group: int,
):  # fmt: skip
    """Scores are held keys first, so that p and ds are left operands as they are."""
    rows, (dk_ref, dv_ref) = Rows(*refs[:4]), refs[4:]
    start = pl.program_id(0) * tiling.keys
    k_CD, v_CD = (_tokens(x, start, tiling.keys, head_dim) for x in (k_ref, v_ref))
    at_C1, in_C1 = (x[:, None] for x in _key_marks(rows, start, tiling))

    def one_head(head, carry):
        def gather(masked, i, carry):
            dk_CD, dv_CD = carry
            first = i * tiling.queries
            q_QD, dout_QD = (
                _tokens(x, first, tiling.queries, head_dim, head, ragged=masked)
                for x in (q_ref, dout_ref)
            )
            lse_1Q = _row(lse_ref, first, tiling.queries, jnp.inf, head)[None]
            delta_1Q = _row(delta_ref, first, tiling.queries, head=head)[None]
            s_CQ, slope_CQ = _exponents(_dot(k_CD, q_QD, NT), options)
            p_CQ = jnp.exp2(s_CQ - lse_1Q)
            if masked:
                at_1Q, in_1Q = (x[None] for x in _query_marks(rows, first, tiling))
                p_CQ = jnp.where(_visible(at_1Q, at_C1, in_1Q, in_C1, options), p_CQ, 0.0)
            ds_CQ = p_CQ * (_dot(v_CD, dout_QD, NT) - delta_1Q) * slope_CQ
            dk_CD += _dot(ds_CQ.astype(q_QD.dtype), q_QD, NN)
            dv_CD += _dot(p_CQ.astype(dout_QD.dtype), dout_QD, NN)
            return dk_CD, dv_CD

        return _each_block(span_ref, gather, carry)

    zeros_CD = jnp.zeros(k_CD.shape, jnp.float32)
    dk_CD, dv_CD = lax.fori_loop(0, group, one_head, (zeros_CD, zeros_CD))
    _put(dk_ref, dk_CD * options.scale, start, k_ref.shape[0], head_dim)
    _put(dv_ref, dv_CD, start, k_ref.shape[0], head_dim)


# ---- inside the kernels


def _each_block(span_ref, body, carry):
    """`body(masked, block, carry)` over a span: what needs no mask first, then the rest."""
    first, seen, unseen, last = (span_ref[i] for i in range(4))
    carry = lax.fori_loop(seen, unseen, functools.partial(body, False), carry)

    def around(i, carry):
        return body(True, jnp.where(i < seen, i, i + unseen - seen), carry)

    return lax.fori_loop(first, last - (unseen - seen), around, carry)


def _exponents(s, options: Options):
    """Scores in base 2 from products, and the derivative of the cap."""
    if options.soft_cap is None:
        return s * (options.scale * LOG2_E), 1.0
    tanh = jnp.tanh(s * (options.scale / options.soft_cap))
    return tanh * (options.soft_cap * LOG2_E), 1.0 - tanh * tanh


def _visible(q_at, kv_at, q_in, kv_in, options: Options):
    """mask.visible_BTS of two blocks; positions (at) and segments (in) broadcast as they come."""
    visible = (q_in == kv_in) & (q_in != 0) & (kv_at <= q_at)
    if options.window is not None:
        visible &= q_at - kv_at < options.window
    return visible


def _dot(x, y, contracted):
    # Without a precision the tensor cores would round f32 to TF32's 11 bits.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _inside(start, block: int, length: int):
    return start + jnp.arange(block) < length


def _tokens(ref, start, block: int, head_dim: int, head=None, ragged: bool = True):
    """[block, D] of one head; zeros past the array's end, which only `ragged` blocks cross."""
    tokens = pl.ds(start, block)
    part = ref.at[tokens] if head is None else ref.at[tokens, head]
    length, width = ref.shape[0], ref.shape[-1]
    mask = None
    if ragged and length % block:
        mask = jnp.broadcast_to(_inside(start, block, length)[:, None], (block, width))
    if head_dim < width:
        real = jnp.broadcast_to(jnp.arange(width)[None] < head_dim, (block, width))
        mask = real if mask is None else mask & real
    return plgpu.load(part, mask=mask, other=None if mask is None else 0.0)


def _row(ref, start, block: int, fill=0.0, head=None):
    """[block] of one number a token; `fill` past the array's end."""
    part = ref.at[pl.ds(start, block)] if head is None else ref.at[head, pl.ds(start, block)]
    if ref.shape[-1] % block == 0:
        return plgpu.load(part)
    return plgpu.load(part, mask=_inside(start, block, ref.shape[-1]), other=fill)


def _query_marks(rows: Rows, start, tiling: Tiling):
    return [_row(x, start, tiling.queries, 0) for x in (rows.q_positions_BT, rows.q_segments_BT)]


def _key_marks(rows: Rows, start, tiling: Tiling):
    return [_row(x, start, tiling.keys, 0) for x in (rows.kv_positions_BS, rows.kv_segments_BS)]


def _put(ref, x_QD, start, length: int, head_dim: int):
    """Stores the part of a block that lies inside the array."""
    real = _inside(start, x_QD.shape[0], length)[:, None]
    real = real & (jnp.arange(x_QD.shape[1]) < head_dim)[None]
    plgpu.store(ref, x_QD.astype(ref.dtype), mask=real)


# ---- around the kernels

_SPAN = pl.BlockSpec((None, None, 4), lambda i, b, h: (b, i, 0))


def _spans(rows: Rows, options: Options, tiling: Tiling, *, by_keys: bool = False) -> jax.Array:
    """Which blocks each block needs, int32 [B, M, 4]: first <= seen <= unseen <= last.

    All needed ones lie in [first, last); those in [seen, unseen) need no mask. `by_keys`: the
    blocks of queries that each block of keys needs, [B, N, 4].
    """
    q = block_ranges(rows.q_segments_BT, rows.q_positions_BT, tiling.queries)
    kv = block_ranges(rows.kv_segments_BS, rows.kv_positions_BS, tiling.keys)
    needed_BMN, seen_BMN = may_see(q, kv, options.window), all_seen(q, kv, options.window)
    if by_keys:
        needed_BMN, seen_BMN = needed_BMN.swapaxes(1, 2), seen_BMN.swapaxes(1, 2)
    block_N = jnp.arange(needed_BMN.shape[-1], dtype=jnp.int32)
    last_BM = jnp.max(jnp.where(needed_BMN, block_N + 1, 0), -1)
    first_BM = jnp.min(jnp.where(needed_BMN, block_N, last_BM[..., None]), -1)
    seen_BM = jnp.min(jnp.where(seen_BMN, block_N, last_BM[..., None]), -1)
    later_BMN = ~seen_BMN & (block_N > seen_BM[..., None])
    unseen_BM = jnp.min(jnp.where(later_BMN, block_N, last_BM[..., None]), -1)
    return jnp.stack([first_BM, seen_BM, jnp.minimum(unseen_BM, last_BM), last_BM], -1)


def _width(head_dim: int) -> int:
    return max(16, pl.next_power_of_2(head_dim))


def _heads(x_BTHD, width: int, group: int):
    """All tokens of one head for each program; `group` query heads share a kv head."""
    T = x_BTHD.shape[1]
    return pl.BlockSpec((None, T, None, width), lambda i, b, h: (b, 0, lax.div(h, group), 0))


def _whole(rows: Rows):
    return [(x, pl.BlockSpec((None, x.shape[1]), lambda i, b, h: (b, 0))) for x in rows]


def _call(kernel, tiling: Tiling, grid, inputs, outputs, interpret: bool, name: str):
    arrays, in_specs = zip(*inputs)
    shapes, out_specs = zip(*outputs)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=list(in_specs),
        out_specs=list(out_specs),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name=f"lemur_attention_{name}",
    )(*arrays)


def _check(q_BTHD, interpret: bool) -> None:
    backend = jax.default_backend()
    if not interpret and backend not in ("gpu", "cuda"):
        raise ValueError(
            f"attention implementation='pallas_gpu' needs an NVIDIA GPU, the backend is "
            f"{backend!r}; use implementation='chunked'"
        )
    if q_BTHD.shape[3] > MAX_HEAD_DIM:
        raise ValueError(
            f"attention implementation='pallas_gpu' takes head_dim up to {MAX_HEAD_DIM}, got "
            f"{q_BTHD.shape[3]}; use implementation='chunked'"
        )
