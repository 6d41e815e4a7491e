"""Attention on TPUs: layouts, padding, the block list and the two kernels.

The forward pass of packed rows first runs without a running maximum: probabilities are
exp2(score) unscaled, and the f32 sum says afterwards whether that was safe. A query whose sum left
2^-80 .. 2^80 (scores beyond about 55 in either direction) makes its block of queries run
again, by a second call of the same kernel with the running maximum over a list of just these
blocks: empty in ordinary training, when it costs no grid step. Safe queries keep their results.

Axis key: B batch, T query length, S key length, H heads, K kv heads, D head dim, Q query blocks.
"""

import functools

import jax
import jax.numpy as jnp

from lemur_kernels.attention import shapes, tpu_backward, tpu_forward
from lemur_kernels.attention import steps as st
from lemur_kernels.attention.mask import INT_MIN, Options, Rows
from lemur_kernels.attention.tilings import Tiling, kv_heads_per_step
from lemur_kernels.attention.tpu_forward import LOG2_E
from lemur_kernels.target import target_device
from lemur_kernels.x64 import without_x64


@without_x64
def forward(q_BTHD, k_BSKD, v_BSKD, rows: Rows, options: Options, *, tiling=None, interpret=False):
    """See lemur_kernels.attention.api; (out_BTHD, lse_BHT). `tiling` is for measurements and, with
    `interpret`, for tests; the certified one when None."""
    tiling = tiling or certified_tiling(q_BTHD, k_BSKD, "forward")
    B, T, block = *q_BTHD.shape[:2], tiling.block
    out_HTD, lse_H1T = forward_heads_first(
        *(heads_first(x, block) for x in (q_BTHD, k_BSKD, v_BSKD)),
        padded_rows(rows, block),
        options,
        tiling,
        interpret=interpret,
    )
    lse_BHT = lse_H1T.reshape(lse_H1T.shape[0], B, -1).swapaxes(0, 1)
    return tokens_first(out_HTD, B, T), lse_BHT[..., :T]


@without_x64
def backward(
    q_BTHD, k_BSKD, v_BSKD, rows: Rows, options: Options, out_BTHD, lse_BHT, dout_BTHD, *,
    tiling=None, interpret=False,
):  # fmt: skip
    """See lemur_kernels.attention.api; (dq_BTHD, dk_BSKD, dv_BSKD)."""
    tiling = tiling or certified_tiling(q_BTHD, k_BSKD, "backward")
    B, T, S, block = *q_BTHD.shape[:2], k_BSKD.shape[1], tiling.block
    lse_BHT = jnp.pad(lse_BHT, ((0, 0), (0, 0), (0, -T % block)), constant_values=jnp.inf)
    dq_HTD, dk_KSD, dv_KSD = backward_heads_first(
        *(heads_first(x, block) for x in (q_BTHD, k_BSKD, v_BSKD)),
        padded_rows(rows, block),
        options,
        heads_first(out_BTHD, block),
        lse_BHT.swapaxes(0, 1).reshape(lse_BHT.shape[1], 1, -1),
        heads_first(dout_BTHD, block),
        tiling,
        interpret=interpret,
    )
    return tokens_first(dq_HTD, B, T), tokens_first(dk_KSD, B, S), tokens_first(dv_KSD, B, S)


def forward_heads_first(
    q_HTD, k_KSD, v_KSD, rows: Rows, options: Options, tiling: Tiling, *, interpret=False
):
    """(out_HTD, lse_H1T) of arrays with all rows' tokens on one axis, whole blocks each."""
    kind_BQN, needed_BQN = st.kinds(rows, options, tiling.block)
    call = functools.partial(
        tpu_forward.forward,
        q_HTD,
        k_KSD,
        v_KSD.swapaxes(1, 2),
        marks(rows, options),
        least_first_keys(rows, options, tiling.square),
        options=options,
        tiling=tiling,
        row_tokens=rows.kv_segments_BS.shape[1],
        interpret=interpret,
    )
    first = call(steps=st.steps(kind_BQN, needed_BQN, packed=options.packed))
    if not options.packed:
        return first
    again_BQ = _unsafe_blocks(first[1], rows.q_segments_BT, tiling.block)
    repeat = st.steps(kind_BQN, needed_BQN & again_BQ[..., None], packed=True)
    return call(steps=repeat, earlier=first)


def backward_heads_first(
    q_HTD, k_KSD, v_KSD, rows: Rows, options: Options, out_HTD, lse_H1T, dout_HTD, tiling: Tiling,
    *, interpret=False,
):  # fmt: skip
    """(dq_HTD, dk_KSD, dv_KSD); layouts as in forward_heads_first."""
    group = q_HTD.shape[0] // k_KSD.shape[0]
    chains = k_KSD.shape[0] // kv_heads_per_step(tiling.heads, group)
    return tpu_backward.backward(
        q_HTD,
        k_KSD,
        k_KSD.swapaxes(1, 2),
        v_KSD,
        out_HTD,
        dout_HTD,
        lse_H1T * LOG2_E,
        marks(rows, options),
        least_first_keys(rows, options, tiling.square),
        st.kinds(rows, options, tiling.block),
        options,
        tiling,
        chains=chains * tiling.split,
        row_tokens=rows.kv_segments_BS.shape[1],
        interpret=interpret,
    )


def heads_first(x_BTHD, block: int):
    """[B, T, H, D] -> [H, B T', D], T' whole blocks."""
    x_BTHD = jnp.pad(x_BTHD, ((0, 0), (0, -x_BTHD.shape[1] % block), (0, 0), (0, 0)))
    return x_BTHD.transpose(2, 0, 1, 3).reshape(x_BTHD.shape[2], -1, x_BTHD.shape[3])


def tokens_first(x_HTD, B: int, T: int):
    """[H, B T', D] -> [B, T, H, D], the tokens that padded the blocks dropped."""
    return x_HTD.reshape(x_HTD.shape[0], B, -1, x_HTD.shape[2]).transpose(1, 2, 0, 3)[:, :T]


def padded_rows(rows: Rows, block: int) -> Rows:
    """Whole blocks; the added tokens have segment 0."""
    return Rows(*(jnp.pad(x, ((0, 0), (0, -x.shape[1] % block))) for x in rows))


def marks(rows: Rows, options: Options) -> list[jax.Array]:
    """What the kernels' masks read: rows [1, B T] of queries, columns [B S, 128] of keys."""
    if options.packed:
        return [st.first_keys(rows, options.window).reshape(1, -1)]

    def row(x_BT):
        return x_BT.reshape(1, -1)

    def column(x_BS):
        return jnp.tile(x_BS.reshape(-1, 1), (1, 128))

    # A query of segment 0 sees nothing: no key has the reserved segment -2^31.
    segments_BT = jnp.where(rows.q_segments_BT == 0, INT_MIN, rows.q_segments_BT)
    return [
        row(segments_BT),
        row(rows.q_positions_BT),
        column(rows.kv_segments_BS),
        column(rows.kv_positions_BS),
    ]


def least_first_keys(rows: Rows, options: Options, square: int) -> jax.Array:
    """Least first key of each `square` queries, int32 [B T / square]; one 0 if not packed."""
    if not options.packed:
        return jnp.zeros(1, jnp.int32)
    return st.first_keys(rows, options.window).reshape(-1, square).min(-1)


def _unsafe_blocks(lse_H1T, segments_BT, block: int) -> jax.Array:
    """Blocks of queries with a sum out of range for some head, bool [B, Q]. NaN is unsafe."""
    unsafe_T = ~tpu_forward.is_safe(lse_H1T[:, 0]).all(0)
    unsafe_BT = unsafe_T.reshape(segments_BT.shape) & (segments_BT != 0)
    return unsafe_BT.reshape(unsafe_BT.shape[0], -1, block).any(-1)


def certified_tiling(q_BTHD, k_BSKD, direction: str) -> Tiling:
    """The certified tiling of a direction for the chip that this is traced for: the mesh's, which
    may be one that is not attached (ahead-of-time compilation), or else the default device's.

    Raises:
      ValueError: not a TPU, or a shape outside certified.csv; names the nearest one inside.
    """
    shape = shapes.Shape(
        chip=shapes.chip_of(target_device().device_kind),
        direction=direction,
        dtype=q_BTHD.dtype.name,
        head_dim=q_BTHD.shape[3],
        heads=q_BTHD.shape[2],
        kv_heads=k_BSKD.shape[2],
        seq=max(q_BTHD.shape[1], k_BSKD.shape[1]),
    )
    return Tiling(**shapes.certificate_for(shape).blocks)
