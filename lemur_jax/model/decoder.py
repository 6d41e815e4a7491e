"""The Llama decoder (arXiv:2307.09288, arXiv:2407.21783).

Pre-norm blocks of grouped-query attention with rotary positions and a gated MLP, RMSNorm, no
dropout. One signature serves packed training, ragged prefill and decode; the layers are scanned.

Dimension key: B batch, T query length, S key length, E embed, H heads, K kv heads, D head dim,
F mlp, V vocab (padded), L layers.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from lemur_kernels.product import einsum_f32

from lemur_jax.config import ModelConfig
from lemur_jax.model import attention, rope
from lemur_jax.model.block import CHECKPOINT_NAMES, Block, rms_norm
from lemur_jax.model.cache import KVCache
from lemur_jax.model.param import weight, whole
from lemur_jax.sharding import constrain, padded_vocab


def remat(body, config: ModelConfig):
    """`body` with the activations that the policy names kept and the others recomputed."""
    policies = jax.checkpoint_policies
    if config.remat == "none":
        return body

    def names(activations):
        return [name for a in activations for name in CHECKPOINT_NAMES[a]]

    chosen = {
        "full": None,
        # By name: jax's own policy for products does not see into a custom_vjp (block.dense).
        "dots": policies.save_only_these_names("product"),
        "named": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=names(config.remat_saved),
            names_which_can_be_offloaded=names(config.remat_offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[config.remat]
    # prevent_cse is for bodies outside a scan; inside one it only blocks fusion.
    return jax.checkpoint(body, policy=chosen, prevent_cse=False)


class Decoder(nnx.Module):
    """Embedding table, L blocks, final norm, head.

    `layers` is one Block whose weights are stacked [L, ...] and scanned; `unstack` gives a tuple of
    blocks for the sampler, where slicing stacked weights would copy them at every token.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        table_key, head_key, layers_key = jax.random.split(key, 3)
        vocab, std = padded_vocab(config), config.initializer_range
        self.config = config
        self.table = weight(
            table_key,
            (vocab, config.embed),
            ("table_vocab", "table_embed"),
            config.param_dtype,
            std,
        )
        self.layers = jax.vmap(functools.partial(Block, config))(
            jax.random.split(layers_key, config.layers)
        )
        self.norm = weight(None, (config.embed,), ("norm",), config.param_dtype)
        if not config.tie_embeddings:
            self.head = weight(
                head_key, (config.embed, vocab), ("embed", "vocab"), config.param_dtype, std
            )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Logits [B,T,V] float32 of the next token, -inf for padded vocabulary; and the new cache.

        Args:
          tokens_BT: int32.
          positions_BT: int32, from 0 in each document.
          segment_ids_BT: int32, 0 for padding.
          cache: tokens seen before; these are appended to it.
        """
        x_BTE, cache = self.hidden(tokens_BT, positions_BT, segment_ids_BT, cache)
        return self.logits(x_BTE), cache

    def hidden(self, tokens_BT, positions_BT, segment_ids_BT, cache=None):
        """Final normed states [B,T,E] and the new cache; arguments as in `__call__`."""
        c = self.config
        tokens_BT = constrain(tokens_BT, "batch", "length")
        table = constrain(whole(self.table, c.dtype), "table_vocab", "lookup_embed")
        x = constrain(table[tokens_BT], "batch", "length", "lookup_embed")
        x = constrain(x, "batch", "length", "act_embed")
        cos, sin = rope.tables(c.rope, c.head_dim, positions_BT, segment_ids_BT)
        if cache is None:
            x = self._train(x, cos, sin, positions_BT, segment_ids_BT)
        else:
            x, cache = self._extend(x, cos, sin, positions_BT, segment_ids_BT, cache)
        return rms_norm(x, self.norm[...], c.norm_eps), cache

    def logits(self, x_BTE: jax.Array) -> jax.Array:
        """Projects states to the vocabulary: [B,T,V] float32, padded rows -inf."""
        logits = einsum_f32("BTE,EV->BTV", x_BTE, self.head_EV())
        logits = constrain(logits, "batch", "length", "act_vocab")
        exists = jnp.arange(logits.shape[-1]) < self.config.vocab_size
        return jnp.where(exists, logits, -jnp.inf)

    def head_EV(self) -> jax.Array:
        """The output projection [E,V] in the compute dtype; the transposed table when tied."""
        if self.config.tie_embeddings:
            return whole(self.table, self.config.dtype).T
        return whole(self.head, self.config.dtype)

    def _train(self, x, cos, sin, positions, segment_ids):
        def body(x, block):
            x = checkpoint_name(x, "layer_input")
            q, k, v = block.qkv(x, cos, sin)
            attended = attention.self_attention(
                q,
                k,
                v,
                positions,
                segment_ids,
                self.config.attention,
                self.config.sequence_attention,
            )
            return block.finish(x, attended), None

        if isinstance(self.layers, Block):
            body = remat(body, self.config)
            return jax.lax.scan(body, x, self.layers, unroll=self.config.scan_unroll)[0]
        for block in self.layers:
            x, _ = body(x, block)
        return x

    def _extend(self, x, cos, sin, positions, segment_ids, cache):
        slot = cache.end
        write = jax.lax.dynamic_update_slice
        kv_positions = write(cache.positions, positions, (0, slot))
        kv_segments = write(cache.segment_ids, segment_ids, (0, slot))

        def body(x, block_and_cache):
            block, k_cache, v_cache = block_and_cache
            q, k, v = block.qkv(x, cos, sin)
            k_cache = write(k_cache, k, (0, slot, 0, 0))
            v_cache = write(v_cache, v, (0, slot, 0, 0))
            attended = attention.cached_attention(
                q, k_cache, v_cache, positions, segment_ids, kv_positions, kv_segments,
                self.config.attention,
            )  # fmt: skip
            return block.finish(x, attended), (k_cache, v_cache)

        if isinstance(self.layers, Block):
            x, (k, v) = jax.lax.scan(body, x, (self.layers, cache.k, cache.v))
        else:
            pairs = []
            for block, k_cache, v_cache in zip(self.layers, cache.k, cache.v, strict=True):
                x, pair = body(x, (block, k_cache, v_cache))
                pairs.append(pair)
            k, v = (tuple(side) for side in zip(*pairs))
        end = cache.end + x.shape[1]
        return x, KVCache(k, v, kv_positions, kv_segments, end)


def abstract(config: ModelConfig) -> Decoder:
    """The model with ShapeDtypeStructs for weights: no memory, no time."""
    return jax.eval_shape(functools.partial(Decoder, config), jax.random.key(0))


def unstack(model: Decoder) -> Decoder:
    """The same model with one Block for each layer; arrays are split, not shared."""
    layers = tuple(
        jax.tree.map(lambda w, i=i: w[i], model.layers) for i in range(model.config.layers)
    )
    split = jax.tree.map(lambda w: w, model)
    split.layers = nnx.data(layers)
    return split
