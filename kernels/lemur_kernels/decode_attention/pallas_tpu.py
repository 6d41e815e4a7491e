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
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lemur_kernels.decode_attention.kernel import DEPTH, kernel
from lemur_kernels.decode_attention.pages import value_lane
from lemur_kernels.decode_attention.plan import CORES, LANES, MAX_TABLE, Plan, make_items, make_plan
from lemur_kernels.decode_attention.reference import pages_in_use, pages_of_rows
from lemur_kernels.needs_tpu import needs_tpu
from lemur_kernels.x64 import without_x64


@without_x64
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
        q_BNHD = needs_tpu(q_BNHD, "decode_attention", "gathered")
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
        used_BM = pages_in_use(jnp.arange(M) * Z, Z, lengths_B, new_tokens_B, window)
        scales = _scales_of_rows((k_scales_PK, v_scales_PK), page_table_BM, used_BM, plan, K)
        inputs.append(scales)
        specs.append(pl.BlockSpec((1, 2, 1, *scales.shape[3:]), place_scales))
        scratch.append(pltpu.VMEM((2, plan.heads, T), jnp.float32))
    quantized = k_scales_PK is not None
    body = functools.partial(
        kernel, plan=plan, M=M, G=H // K, scale=scale, window=window, soft_cap=soft_cap,
        quantized=quantized, by_bytes=quantized and _unpacks_slowly(),
    )  # fmt: skip
    out_BKRL = pl.pallas_call(
        body,
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


def _unpacks_slowly() -> bool:
    """Whether int8 is better taken apart by shifts: on v4, which unpacks through memory.

    Compiling ahead of time without a mesh of the target's devices, the target is unknown here;
    then the form that every chip takes is used, slower on v4 and with the same result.
    """
    try:
        return pltpu.get_tpu_info().generation <= 4
    except ValueError:  # not a TPU
        return False


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


def _scales_of_rows(scales, page_table_BM, used_BM, plan: Plan, K: int) -> jax.Array:
    """Scales of each row's pages, f32 [B, 2 (keys, values), groups, heads, M padded to lanes]."""
    B, M = page_table_BM.shape
    parts = [pages_of_rows(x, page_table_BM, used_BM).swapaxes(1, 2) for x in scales]
    x_B2KM = jnp.pad(jnp.stack(parts, 1), ((0, 0), (0, 0), (0, 0), (0, -M % LANES)))
    return x_B2KM.reshape(B, 2, K // plan.heads, plan.heads, -1)
