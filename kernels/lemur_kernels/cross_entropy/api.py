"""The public loss function: checks, then the implementation that the caller names.

Axis key: B batch, T length, E embed, V vocab.
"""

import jax
import jax.numpy as jnp

from lemur_kernels.cross_entropy.chunked import chunked
from lemur_kernels.cross_entropy.reference import CrossEntropy, reference

IMPLEMENTATIONS = ("reference", "chunked")


def cross_entropy(
    x_BTE: jax.Array,
    w_EV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int,
    valid_vocab: int | None = None,
    implementation: str,
) -> CrossEntropy:
    """Projection to the vocabulary and weighted cross-entropy, f32 from the logits on.

    Args:
      x_BTE: final hidden states, f32 or bf16.
      w_EV: output projection, x's dtype; the product accumulates in f32.
      targets_BT: int32 ids below valid_vocab. Ids of tokens with weight 0 are not read, but
        must be legal too.
      weights_BT: weight of each token's loss; constants: no gradient flows to them.
      z_loss: coefficient of log(Z)^2 (PaLM, arXiv:2204.02311, section 5).
      chunk_tokens: tokens of each row whose logits exist at a time ("chunked").
      valid_vocab: columns from here on are padding and get probability 0; V when None.
      implementation: "reference" (whole logits) or "chunked" (logits of B * chunk_tokens
        tokens; under differentiation the forward pass computes the gradients too).

    Returns:
      CrossEntropy(loss, z_loss, nll_BT); sums, not means. Differentiable once with respect to
      x and w.

    Raises:
      ValueError: unknown implementation, shapes, dtypes or numbers that do not fit.
    """
    V = w_EV.shape[-1]
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
    if implementation == "chunked":
        return chunked(
            x_BTE, w_EV, targets_BT, weights_BT, float(z_loss), chunk_tokens, valid_vocab
        )
    return reference(x_BTE, w_EV, targets_BT, weights_BT, float(z_loss), valid_vocab)
