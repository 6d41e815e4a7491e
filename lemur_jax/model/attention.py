"""Who may attend to whom, and which kernel computes it.

The mask rule, defined once, in lemur_kernels.attention.mask: key j is visible to query i iff both
have the same non-zero segment id and position[j] <= position[i]. Packed training, ragged prefill
and decode differ only in the positions and segment ids they pass.

Dimension key: B batch, T query length, S key length, H heads, K kv heads, D head dim.
"""

import functools

import jax
import jax.numpy as jnp
from lemur_kernels.attention import attention, shapes
from lemur_kernels.attention.gather import gather_attention
from lemur_kernels.attention.ring import ring_attention

from lemur_jax import sharding
from lemur_jax.config import ConfigError, ModelConfig


def resolve_implementation(
    config: ModelConfig,
    backend: str,
    *,
    device_kind: str | None = None,
    tensor: int = 1,
    tokens: int = 1,
) -> str:
    """The kernel that "auto" means on a backend ("cpu", "gpu", "tpu"), decided before tracing.

    Args:
      device_kind, tensor, tokens: as `outside_table`, on a TPU.

    Raises:
      ConfigError: a named kernel does not exist on this backend.
    """
    kernels = {"cudnn": "gpu", "pallas_gpu": "gpu", "pallas_tpu": "tpu"}
    needed = kernels.get(config.attention, backend)
    if needed != backend:
        raise ConfigError(
            [
                f"ModelConfig.attention={config.attention!r} needs a {needed.upper()}, the backend "
                f"is {backend!r}: use 'auto'"
            ]
        )
    if config.attention != "auto":
        return config.attention
    # cuDNN's kernel has no float32 form. For rows of many short documents "pallas_gpu" is meant: it
    # skips blocks by segment, which cuDNN cannot. Neither was measured, so it has to be named.
    if backend == "gpu" and config.dtype != "float32":
        return "cudnn"
    if backend == "tpu":
        shape = {"device_kind": device_kind, "tensor": tensor, "tokens": tokens}
        return "chunked" if outside_table(config, backend, **shape) else "pallas_tpu"
    return "chunked"


def outside_table(
    config: ModelConfig, backend: str, *, device_kind: str | None, tensor: int = 1, tokens: int = 1
) -> str | None:
    """Why "auto" is not "pallas_tpu" on a TPU, whose kernels are compiled ahead for some shapes.

    Args:
      config: with `attention` unresolved.
      device_kind: `jax.Device.device_kind`; None asks for the dtype alone.
      tensor: ways that heads are split; each device has its own, as `self_attention` gives them.
      tokens: of the longest row of keys that a kernel call sees.

    Returns:
      None where the kernels run, and where nobody asked for "auto" on a TPU.
    """
    if config.attention != "auto" or backend != "tpu":
        return None
    if config.dtype == "float16":
        return "a TPU's matrix unit has no float16 form"
    if device_kind is None:
        return None
    try:
        for direction in ("forward", "backward"):
            shape = shapes.Shape(
                chip=shapes.chip_of(device_kind),
                direction=direction,
                dtype=config.dtype,
                head_dim=config.head_dim,
                heads=max(1, config.heads // tensor),
                kv_heads=max(1, config.kv_heads // tensor),  # 1: see _spread_kv_heads
                seq=tokens,
            )
            shapes.certificate_for(shape)
    except ValueError as error:
        return str(error)
    return None


def describe(config: ModelConfig, sequence_ways: int, reason: str | None = None) -> str:
    """How attention is computed, for a line at the start of a run.

    Args:
      config: with `attention` resolved.
      sequence_ways: how many devices share a row.
      reason: of `outside_table`.
    """
    found = config.attention
    if sequence_ways > 1:
        found += f", {config.sequence_attention} over {sequence_ways} parts of a row"
    return f"{found} ({reason})" if reason else found


def row_tokens(config: ModelConfig, sequence_length: int, sequence_ways: int) -> int:
    """Tokens of the longest row of keys that a kernel call sees in training."""
    return sequence_length // (sequence_ways if config.sequence_attention == "ring" else 1)


def self_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    implementation: str,
    sequence_attention: str = "gather",
) -> jax.Array:
    """Attention of a packed row to itself; runs on each device's rows, heads and query tokens.

    When the mesh splits the tokens of a row, each device holds an unbroken part of them, and
    either gathers all keys and values ("gather") or sends its own around ("ring").
    """
    k_BTKD, v_BTKD = (_spread_kv_heads(x) for x in (k_BTKD, v_BTKD))
    if sharding.axis_size("length") == 1:
        attend = functools.partial(attention, packed=True)
    elif sequence_attention == "ring":
        axis = sharding.mesh_axis("length")
        attend = functools.partial(ring_attention, packed=True, axis_name=axis)
    else:
        attend = functools.partial(gather_attention, axis_name=sharding.mesh_axis("length"))

    def kernel(q, k, v, positions, segments):
        return attend(
            q,
            k,
            v,
            q_positions_BT=positions,
            kv_positions_BS=positions,
            q_segments_BT=segments,
            kv_segments_BS=segments,
            implementation=implementation,
        )

    heads, tokens = ("batch", "length", "act_heads", None), ("batch", "length")
    run = sharding.per_device(kernel, (heads, heads, heads, tokens, tokens), heads)
    return run(q_BTHD, k_BTKD, v_BTKD, positions_BT, segment_ids_BT)


def cached_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_positions_BT: jax.Array,
    q_segments_BT: jax.Array,
    kv_positions_BS: jax.Array,
    kv_segments_BS: jax.Array,
    implementation: str,
) -> jax.Array:
    """Attention of new tokens to a cache that already holds them."""
    # The fused kernels are for many queries: cuDNN's takes no arbitrary positions, and all have
    # blocks of queries where a decode step, which is bound by memory bandwidth, has one.
    if implementation in ("cudnn", "pallas_gpu", "pallas_tpu"):
        implementation = "chunked"
    return attention(
        q_BTHD,
        k_BSKD,
        v_BSKD,
        q_positions_BT=q_positions_BT,
        kv_positions_BS=kv_positions_BS,
        q_segments_BT=q_segments_BT,
        kv_segments_BS=kv_segments_BS,
        packed=False,
        implementation=implementation,
    )


def _spread_kv_heads(x_BTKD: jax.Array) -> jax.Array:
    """Repeats kv heads when the tensor axis is wider than their number, so that each device's
    query heads find their own: no more than one head for each device, never H."""
    ways, kv_heads = sharding.axis_size("act_heads"), x_BTKD.shape[2]
    if ways <= kv_heads:
        return x_BTKD
    return jnp.repeat(x_BTKD, ways // kv_heads, axis=2)
