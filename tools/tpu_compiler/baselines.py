"""The public TPU attention kernels, called as their authors intend, with the count of each region.

Regions are named after the kernel's own functions ("@run"), counts follow from their grids and
causal masks: none of the three looks at segment ids to skip a block.
"""

import math

from tpu_compiler.cases import Built, Case

BEST = (1024, 1024, 512)  # of those tried in design/tpu.md, section 3


def splash(case: Case, blocks: tuple[int, int, int] = BEST) -> Built:
    """JAX's splash attention; dq and dk, dv by separate kernels.

    Args:
      blocks: query, key and key-compute block.

    Raises:
      NotImplementedError: what the baseline cannot do or lacks here, in one line; the others too.
    """
    return _splash(case, _fitted(case, blocks), fused=False)


def splash_fused(case: Case, blocks: tuple[int, int, int] = BEST) -> Built:
    """Splash with its fused backward kernel, whose dq comes in parts that XLA sums."""
    if case.direction == "forward":
        raise NotImplementedError("fused is a form of the backward kernel")
    return _splash(case, _fitted(case, blocks), fused=True)


def flash(case: Case, blocks: tuple[int, int, int] = BEST) -> Built:
    """JAX's flash attention; keys and values repeated to every query head, as it needs."""
    return _flash(case, _fitted(case, blocks))


def tokamax(case: Case, blocks: tuple[int, int, int] = BEST) -> Built:
    """tokamax 0.0.12's splash attention; backward with dq_reduction_steps=3."""
    return _tokamax(case, _fitted(case, blocks))


def _fitted(case: Case, blocks: tuple[int, int, int]) -> tuple[int, int, int]:
    if case.kernel != "attention" or case.dtype != "bfloat16" or case.mask == "window":
        raise NotImplementedError(f"no baseline for {case.kernel} {case.dtype} {case.mask}")
    if case.direction == "backward":
        raise NotImplementedError("baselines are compiled forward or forward+backward")
    return tuple(min(block, case.seq) for block in blocks)


def _args(case: Case):
    import jax.numpy as jnp

    S, D = case.seq, case.head_dim
    q, kv = (1, case.heads, S, D), (1, case.kv_heads, S, D)
    return ((q, jnp.bfloat16), (kv, jnp.bfloat16), (kv, jnp.bfloat16), ((1, S), jnp.int32))


def _directed(attend, case: Case):
    import jax

    if case.direction == "forward":
        return attend

    def both(q, k, v, ids):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
        return out, pull(q)

    return both


def _blocks(case: Case, q: int, k: int) -> tuple[int, int, int, int]:
    """Query blocks, key blocks, those on or below the diagonal, those that the diagonal cuts."""
    nq, nk = case.seq // q, case.seq // k
    pairs = [(i, j) for i in range(nq) for j in range(nk) if j * k <= (i + 1) * q - 1]
    cut = sum((j + 1) * k - 1 > i * q for i, j in pairs)
    return nq, nk, len(pairs), cut


def _splash(case: Case, blocks: tuple[int, int, int], fused: bool) -> Built:
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, k, compute = blocks
    sizes = kernel.BlockSizes(
        block_q=q,
        block_kv=k,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=k,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else q,
        block_kv_dq=None if fused else k,
        use_fused_bwd_kernel=fused,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((case.seq, case.seq))] * case.heads)
    attend_row = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def attend(q, k, v, ids):
        return jax.vmap(attend_row)(q, k, v, kernel.SegmentIds(ids, ids))

    nq, nk, run, _ = _blocks(case, q, k)
    H, K = case.heads, case.kv_heads
    forward = {"grid": H * nq * nk, "@body": H * run, "@init": H * nq, "@end": H * nq}
    dq = {"grid": H * nq * nk, "@run": H * run, "@init": H * nq, "@end": H * nq}
    dkv = {"grid": H * nq * nk, "@body": H * run, "@init": K * nk, "@end": K * nk}
    counts = {"_fwd": forward, "_dq": dq, "_dkv": dkv}
    return Built(_directed(attend, case), _args(case), counts)


def _flash(case: Case, blocks: tuple[int, int, int]) -> Built:
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    b, group = blocks[0], case.heads // case.kv_heads
    sizes = kernel.BlockSizes(
        block_q=b,
        block_k_major=b,
        block_k=b,
        block_b=1,
        block_q_major_dkv=b,
        block_k_major_dkv=b,
        block_k_dkv=b,
        block_q_dkv=b,
        block_k_major_dq=b,
        block_k_dq=b,
        block_q_dq=b,
    )

    def attend(q, k, v, ids):
        k, v = jnp.repeat(k, group, 1), jnp.repeat(v, group, 1)
        segments = kernel.SegmentIds(ids, ids)
        scale = 1 / math.sqrt(case.head_dim)
        return kernel.flash_attention(
            q, k, v, segment_ids=segments, causal=True, block_sizes=sizes, sm_scale=scale
        )

    nq, nk, run, _ = _blocks(case, b, b)
    H = case.heads
    each = {"grid": H * nq * nk, "@start_new_sequence": H * nq}
    counts = {
        "_bwd_dq": each | {"@body": H * run, "@end_of_kv_sequence": H * nq},
        "_bwd_dkv": each | {"@k_body": H * run, "@end_of_q_sequence": H * nk},
        "": each | {"@_body": H * run, "@store_output": H * nq},
    }
    return Built(_directed(attend, case), _args(case), counts)


def _tokamax(case: Case, blocks: tuple[int, int, int]) -> Built:
    import jax

    try:
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_kernel as kernel,
        )
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_mask as masks,
        )
    except ImportError as error:
        raise NotImplementedError(f"tokamax is not installed ({error})") from error
    q, k, compute = blocks
    config = kernel.SplashConfig(
        block_q=q,
        block_kv=k,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=k,
        block_kv_dkv_compute=compute,
        dq_reduction_steps=3,
    )
    mask = masks.CausalMask((case.seq, case.seq))
    attend_row = kernel.make_splash_mha(mask, config=config, q_seq_shards=1)

    def attend(q, k, v, ids):
        return jax.vmap(attend_row)(q, k, v, kernel.SegmentIds(ids, ids))

    nq, nk, run, cut = _blocks(case, q, k)
    H = case.heads
    # one unscoped body, compiled twice: with and without the causal mask
    body = {
        "grid": H * run,
        "@body": H * (run - cut),
        "@body+@causal_mask_function": H * cut,
    }
    forward = body | {"@init": H * nq, "@end": H * nq}
    # "@_" writes dk, dv: two regions share H nk runs, in a ratio that half each understates
    backward = body | {"@init": H * nk, "@_": H * nk / 2}
    return Built(_directed(attend, case), _args(case), {"_fwd": forward, "_dkv": backward})
