"""The public loss function: checks, then the implementation that the caller names.

Axis key: B batch, T length, E embed, V vocab.
"""

import jax
import jax.numpy as jnp

from lemur_kernels.cross_entropy import shards
from lemur_kernels.cross_entropy.chunked import Chunked
from lemur_kernels.cross_entropy.forward_gradient import Setting, losses
from lemur_kernels.cross_entropy.reference import CrossEntropy, reference
from lemur_kernels.target import target_device

IMPLEMENTATIONS = ("reference", "chunked", "pallas_tpu")


def cross_entropy(
    x_BTE: jax.Array,
    w_EV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int,
    valid_vocab: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str,
    chip: str | None = None,
    interpret=False,
) -> CrossEntropy:
    """Projection to the vocabulary and weighted cross-entropy, f32 from the logits on.

    Args:
      x_BTE: final hidden states, f32 or bf16.
      w_EV: output projection, x's dtype; the product accumulates in f32.
      targets_BT: int32 ids below valid_vocab. Ids of tokens with weight 0 are not read, but
        must be legal too.
      weights_BT: weight of each token's loss; constants: no gradient flows to them.
      z_loss: coefficient of log(Z)^2 (PaLM, arXiv:2204.02311, section 5).
      chunk_tokens: tokens of each row whose logits ("chunked") or bf16 probabilities
        ("pallas_tpu", only under differentiation) exist at a time in HBM.
      valid_vocab: columns from here on are padding and get probability 0; all exist when None.
      axis_name: inside shard_map, the mesh axis that splits w's columns in order: w_EV is this
        device's part, everything else is the same on all of its devices, and ids and valid_vocab
        count columns of the whole. Each device returns the whole loss; its gradient by w is that
        of its part, by x (a sum over the devices) what JAX makes of a replicated argument.
      implementation: "reference" (whole logits), "chunked" (logits of B * chunk_tokens tokens, in
        XLA) or "pallas_tpu" (f32 logits in VMEM only). Under differentiation the forward pass of
        the last two computes the gradients too.
      chip: "pallas_tpu" only: which chip's blocks, of blocks.CHIPS; the default device's when None.
      interpret: "pallas_tpu" only: pallas_call's argument of that name, to run on a CPU.

    Returns:
      CrossEntropy(loss, z_loss, nll_BT); sums, not means. Differentiable once with respect to
      x and w.

    Raises:
      ValueError: unknown implementation, shapes, dtypes or numbers that do not fit; no TPU.
    """
    V = w_EV.shape[-1] * shards.count(axis_name)
    valid_vocab = V if valid_vocab is None else valid_vocab
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; legal: {IMPLEMENTATIONS}")
    if x_BTE.ndim != 3 or w_EV.ndim != 2 or x_BTE.shape[-1] != w_EV.shape[0]:
        raise ValueError(
            f"cross_entropy takes x [B,T,E] and w [E,V]; got {list(x_BTE.shape)} and "
            f"{list(w_EV.shape)}"
        )
    if x_BTE.dtype != w_EV.dtype:
        raise ValueError(f"x and w must share a dtype; got {x_BTE.dtype} and {w_EV.dtype}")
    for name, value in (("targets_BT", targets_BT), ("weights_BT", weights_BT)):
        if value.shape != x_BTE.shape[:2]:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, x has {list(x_BTE.shape)}; "
                f"pass {list(x_BTE.shape[:2])}"
            )
    if not jnp.issubdtype(targets_BT.dtype, jnp.integer):
        raise ValueError(f"targets_BT is {targets_BT.dtype}; pass integers")
    if not 1 <= valid_vocab <= V:
        raise ValueError(f"valid_vocab={valid_vocab} must be in 1..{V} (the columns of w)")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
    if implementation != "pallas_tpu" and (chip is not None or interpret):
        raise ValueError(
            f"chip={chip!r} and interpret={interpret!r} are for implementation='pallas_tpu', not "
            f"{implementation!r}: remove them"
        )
    arrays = (x_BTE, w_EV, targets_BT, weights_BT)
    if implementation == "reference":
        return reference(*arrays, float(z_loss), valid_vocab, axis_name)
    setting = Setting(float(z_loss), chunk_tokens, valid_vocab, axis_name)
    if implementation == "chunked":
        return losses(Chunked(), *arrays, setting)
    # Imported only when named: Pallas is slow to import.
    from lemur_kernels.cross_entropy.blocks import chip_of
    from lemur_kernels.cross_entropy.pallas_tpu import PallasTpu

    chip = chip_of(target_device()) if chip is None else chip
    return losses(PallasTpu(chip, interpret), *arrays, setting)
