"""The tables: which tensor of another checkpoint is which weight of ours.

Dimension key (lower case in patterns): e embed, h heads, k kv heads, d head dim, f mlp, v vocab;
j pairs of a head, r the two parts of a pair (d = r j as we and Hugging Face order them: first all
first parts, then all second ones; Meta and EasyLM interleave them: d = j r).
A torch Linear holds [out, in]; ours hold [in, out] with heads split.
"""

from lemur_jax.config import ModelConfig
from lemur_jax.convert.rules import Rule

HF_LLAMA = (
    Rule("table", "model.embed_tokens.weight", "v e -> v e"),
    Rule("layers/attention_norm", "model.layers.{}.input_layernorm.weight", "e -> e"),
    Rule("layers/wq", "model.layers.{}.self_attn.q_proj.weight", "(h d) e -> e h d"),
    Rule("layers/wk", "model.layers.{}.self_attn.k_proj.weight", "(k d) e -> e k d"),
    Rule("layers/wv", "model.layers.{}.self_attn.v_proj.weight", "(k d) e -> e k d"),
    Rule("layers/wo", "model.layers.{}.self_attn.o_proj.weight", "e (h d) -> h d e"),
    Rule("layers/mlp_norm", "model.layers.{}.post_attention_layernorm.weight", "e -> e"),
    Rule("layers/w_gate", "model.layers.{}.mlp.gate_proj.weight", "f e -> e f"),
    Rule("layers/w_up", "model.layers.{}.mlp.up_proj.weight", "f e -> e f"),
    Rule("layers/w_down", "model.layers.{}.mlp.down_proj.weight", "e f -> f e"),
    Rule("norm", "model.norm.weight", "e -> e"),
    Rule("head", "lm_head.weight", "v e -> e v"),
)
HF_ATTENTION_BIAS = (
    Rule("layers/bq", "model.layers.{}.self_attn.q_proj.bias", "(h d) -> h d"),
    Rule("layers/bk", "model.layers.{}.self_attn.k_proj.bias", "(k d) -> k d"),
    Rule("layers/bv", "model.layers.{}.self_attn.v_proj.bias", "(k d) -> k d"),
    Rule("layers/bo", "model.layers.{}.self_attn.o_proj.bias", "e -> e"),
)
HF_MLP_BIAS = (
    Rule("layers/b_gate", "model.layers.{}.mlp.gate_proj.bias", "f -> f"),
    Rule("layers/b_up", "model.layers.{}.mlp.up_proj.bias", "f -> f"),
    Rule("layers/b_down", "model.layers.{}.mlp.down_proj.bias", "e -> e"),
)

# Some checkpoints with tied embeddings store the shared matrix under both names.
HF_TIED_HEAD = Rule("table", "lm_head.weight", "v e -> v e")
HF_TIED_HEAD_OF = "model.embed_tokens.weight"

# Buffers of old checkpoints that follow from the config: checked, then dropped.
HF_INVERSE_FREQUENCIES = "rotary_emb.inv_freq"


META = (
    Rule("table", "tok_embeddings.weight", "v e -> v e"),
    Rule("layers/attention_norm", "layers.{}.attention_norm.weight", "e -> e"),
    Rule("layers/wq", "layers.{}.attention.wq.weight", "(h j r) e -> e h (r j)"),
    Rule("layers/wk", "layers.{}.attention.wk.weight", "(k j r) e -> e k (r j)"),
    Rule("layers/wv", "layers.{}.attention.wv.weight", "(k d) e -> e k d"),
    Rule("layers/wo", "layers.{}.attention.wo.weight", "e (h d) -> h d e"),
    Rule("layers/mlp_norm", "layers.{}.ffn_norm.weight", "e -> e"),
    Rule("layers/w_gate", "layers.{}.feed_forward.w1.weight", "f e -> e f"),
    Rule("layers/w_up", "layers.{}.feed_forward.w3.weight", "f e -> e f"),
    Rule("layers/w_down", "layers.{}.feed_forward.w2.weight", "e f -> f e"),
    Rule("norm", "norm.weight", "e -> e"),
    Rule("head", "output.weight", "v e -> e v"),
)
META_INVERSE_FREQUENCIES = "rope.freqs"
# Axis along which Meta's model parallelism splits a tensor; the others are in every file.
META_SPLIT = {
    "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0,
}  # fmt: skip

EASYLM = (
    Rule("table", "transformer/wte/embedding", "v e -> v e"),
    Rule("layers/attention_norm", "transformer/h/{}/attention_norm/kernel", "e -> e"),
    Rule("layers/wq", "transformer/h/{}/attention/wq/kernel", "e (h j r) -> e h (r j)"),
    Rule("layers/wk", "transformer/h/{}/attention/wk/kernel", "e (k j r) -> e k (r j)"),
    Rule("layers/wv", "transformer/h/{}/attention/wv/kernel", "e (k d) -> e k d"),
    Rule("layers/wo", "transformer/h/{}/attention/wo/kernel", "(h d) e -> h d e"),
    Rule("layers/mlp_norm", "transformer/h/{}/ffn_norm/kernel", "e -> e"),
    Rule("layers/w_gate", "transformer/h/{}/feed_forward/w1/kernel", "e f -> e f"),
    Rule("layers/w_up", "transformer/h/{}/feed_forward/w3/kernel", "e f -> e f"),
    Rule("layers/w_down", "transformer/h/{}/feed_forward/w2/kernel", "f e -> f e"),
    Rule("norm", "transformer/ln_f/kernel", "e -> e"),
    Rule("head", "lm_head/kernel", "e v -> e v"),
)


def hf_llama(config: ModelConfig) -> tuple[Rule, ...]:
    """The rows that exist for this config, in the order in which HF writes its tensors."""
    rows = HF_LLAMA
    if config.tie_embeddings:
        rows = tuple(rule for rule in rows if rule.ours != "head")
    if config.attention_bias:
        rows += HF_ATTENTION_BIAS
    if config.mlp_bias:
        rows += HF_MLP_BIAS
    return rows
