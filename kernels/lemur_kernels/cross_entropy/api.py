"""The public loss function: checks, then the implementation that the caller names.

Axis key: B batch, T length, E embed, V vocab.
"""

import jax
import jax.numpy as jnp

from lemur_kernels import arguments
from lemur_kernels.cross_entropy import shards
from lemur_kernels.cross_entropy.chunked import Chunked
from lemur_kernels.cross_entropy.forward_gradient import Setting, losses
from lemur_kernels.cross_entropy.reference import CrossEntropy, reference
from lemur_kernels.target import target_device
from lemur_kernels.varying import refuse_varying

IMPLEMENTATIONS = ("reference", "chunked", "pallas_tpu")
XLA_DTYPES = ("float32", "bfloat16", "float16")
DTYPES = {"reference": XLA_DTYPES, "chunked": XLA_DTYPES, "pallas_tpu": ("float32", "bfloat16")}
WEIGHT_DTYPES = (*XLA_DTYPES, "bool", "int8", "int16", "int32", "uint8", "uint16", "uint32")


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
      x_BTE: final hidden states, f32, bf16 or (not "pallas_tpu") f16.
      w_EV: output projection, x's dtype; the product accumulates in f32.
      targets_BT: integer ids in 0..valid_vocab - 1. An id out of range makes its nll_BT, loss,
        z_loss and gradients NaN; that of a token with weight 0 never matters, its nll_BT is 0.
      weights_BT: weight of each token's loss; constants: no gradient flows to them.
      z_loss: coefficient of log(Z)^2 (PaLM, arXiv:2204.02311, section 5).
      chunk_tokens: tokens of each row whose logits ("chunked") or bf16 probabilities
        ("pallas_tpu", only under differentiation) exist at a time in HBM.
      valid_vocab: columns from here on are padding and get probability 0; all exist when None.
        What they hold does not matter as long as it is finite (0 * NaN would reach x's gradient).
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
      NotImplementedError: the gradient of "pallas_tpu" is differentiated again.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; legal: {IMPLEMENTATIONS}")
    arguments.array("x_BTE", x_BTE, "BTE", DTYPES[implementation])
    arguments.array("w_EV", w_EV, "EV", DTYPES[implementation])
    if x_BTE.shape[-1] != w_EV.shape[0]:
        raise ValueError(
            f"cross_entropy takes x [B,T,E] and w [E,V]; got {list(x_BTE.shape)} and "
            f"{list(w_EV.shape)}"
        )
    if x_BTE.dtype != w_EV.dtype:
        raise ValueError(f"x and w must share a dtype; got {x_BTE.dtype} and {w_EV.dtype}")
    arguments.array("weights_BT", weights_BT, "BT", WEIGHT_DTYPES)
    if weights_BT.shape != x_BTE.shape[:2]:
        raise ValueError(
            f"weights_BT has shape {list(weights_BT.shape)}, x has {list(x_BTE.shape)}; "
            f"pass {list(x_BTE.shape[:2])}"
        )
    arguments.integers("targets_BT", targets_BT, x_BTE.shape[:2])
    V = w_EV.shape[1] * shards.count(axis_name)
    if valid_vocab is None:
        valid_vocab = V
    valid_vocab = arguments.integer("valid_vocab", valid_vocab, 1, V, fix="(the columns of w)")
    chunk_tokens = arguments.integer("chunk_tokens", chunk_tokens, 1)
    z_loss = arguments.number("z_loss", z_loss, least=0)
    if implementation != "pallas_tpu" and (chip is not None or interpret):
        raise ValueError(
            f"chip={chip!r} and interpret={interpret!r} are for implementation='pallas_tpu', not "
            f"{implementation!r}: remove them"
        )
    legal_BT = (targets_BT >= 0) & (targets_BT < valid_vocab)
    wrong_BT = ~legal_BT & (weights_BT != 0)
    targets_BT = jnp.where(legal_BT, targets_BT, 0).astype(jnp.int32)
    weights_BT = jnp.where(wrong_BT, jnp.nan, weights_BT.astype(jnp.float32))
    arrays = (x_BTE, w_EV, targets_BT, weights_BT)
    if implementation == "reference":
        found = reference(*arrays, z_loss, valid_vocab, axis_name)
    else:
        if implementation == "pallas_tpu":
            refuse_varying(implementation, *arrays)
        form = Chunked() if implementation == "chunked" else _pallas_tpu(chip, interpret)
        found = losses(form, *arrays, Setting(z_loss, chunk_tokens, valid_vocab, axis_name))
    illegal = jnp.where(wrong_BT, jnp.nan, 0.0)
    return found._replace(nll_BT=jnp.where(legal_BT, found.nll_BT, illegal))


def _pallas_tpu(chip: str | None, interpret):
    # Imported only when named: Pallas is slow to import.
    from lemur_kernels.cross_entropy.blocks import chip_of
    from lemur_kernels.cross_entropy.pallas_tpu import PallasTpu

    return PallasTpu(chip_of(target_device()) if chip is None else chip, interpret)
