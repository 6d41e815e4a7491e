"""A healthy Hugging Face model and over forty ways to spoil its files, spelt out with torch as the
converters that made such files did it."""

import json
import shutil

import pytest
from hf_models import torch

safe = pytest.importorskip("safetensors.torch", reason="files are written by safetensors itself")

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 8, 2, 16, 4
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,  # as hidden_size, so that a transposed down_proj has the right shape
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": LAYERS,
    "vocab_size": 301,
}
ALL = tuple(range(LAYERS))
EMBED = "model.embed_tokens.weight"


def of_layer(layer, name):
    return f"model.layers.{layer}.{name}.weight"


def every(name):
    return [of_layer(layer, name) for layer in ALL]


def to_meta(weight, heads):
    """HF's order of a head's rows (halves) to Meta's (interleaved)."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_hf(weight, heads):
    """Meta's order to HF's: `permute` of transformers' convert_llama_weights_to_hf.py."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def q_not_permuted(w, c):
    for name in every("self_attn.q_proj"):
        w[name] = to_meta(w[name], HEADS)


def k_not_permuted(w, c):
    for name in every("self_attn.k_proj"):
        w[name] = to_meta(w[name], KV_HEADS)


def k_permuted_as_q(w, c):
    for name in every("self_attn.k_proj"):
        w[name] = to_hf(to_meta(w[name], KV_HEADS), HEADS)


def k_unpermuted_as_q(w, c):
    for name in every("self_attn.k_proj"):
        w[name] = to_meta(w[name], HEADS)


def q_permuted_twice(w, c):
    for name in every("self_attn.q_proj"):
        w[name] = to_hf(w[name], HEADS)


def q_heads_tiled(w, c):
    for name in every("self_attn.q_proj"):
        grouped = w[name].view(KV_HEADS, HEADS // KV_HEADS, HEAD_DIM, -1)
        w[name] = grouped.transpose(0, 1).reshape(w[name].shape)


def down_transposed(w, c):
    for name in every("mlp.down_proj"):
        w[name] = w[name].T


def gate_and_up_swapped(w, c):
    for gate, up in zip(every("mlp.gate_proj"), every("mlp.up_proj")):
        w[gate], w[up] = w[up], w[gate]


def eps(w, c):
    c["rms_norm_eps"] = 1e-6


def theta(w, c):
    c["rope_parameters"]["rope_theta"] = 500000.0


def rope_scaling(w, c):
    c["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}


def activation(w, c):
    c["hidden_act"] = "gelu"


def layer_copied(w, c):
    for name in [name for name in w if ".layers.2." in name]:
        w[name] = w[name.replace(".2.", ".1.")]


def layers_swapped(w, c):
    for name in [name for name in w if ".layers.2." in name]:
        other = name.replace(".2.", ".1.")
        w[name], w[other] = w[other], w[name]


def embedding_off_by_one(w, c):
    w[EMBED] = torch.roll(w[EMBED], 1, 0)


def head_row_inserted(w, c):
    head = w["lm_head.weight"]
    w["lm_head.weight"] = torch.cat([head[:10], head[:1], head[10:-1]])


def overflow(w, c):
    """In float16 after all. The healthy twin of this one has a weight of 70000."""
    for name in w:
        w[name] = w[name].half()
    c["dtype"] = "float16"


def bit_flipped(w, c):
    w[of_layer(1, "mlp.up_proj")].view(torch.int32)[3, 5] ^= 1 << 30


def low_bit_flipped(w, c):
    w[of_layer(1, "mlp.up_proj")].view(torch.int32)[3, 5] ^= 1 << 2


def half_written(w, c):
    w[of_layer(3, "self_attn.o_proj")][32:] = 0


def not_a_number(w, c):
    w[of_layer(0, "self_attn.v_proj")][4, 4:7] = float("nan")


def scale_folded_in(w, c):
    for name in every("self_attn.q_proj"):
        w[name] = w[name] * HEAD_DIM**-0.5


def norm_minus_one(w, c):
    for name in every("input_layernorm"):
        w[name] = w[name] - 1


def shards_in_wrong_order(w, c):
    for name in every("mlp.gate_proj"):
        w[name] = torch.cat(w[name].chunk(4)[::-1])


def one_tensor_of_another_layer(w, c):
    w[of_layer(3, "self_attn.v_proj")] = w[of_layer(0, "self_attn.v_proj")]


def noise(w, c):
    name = of_layer(2, "mlp.down_proj")
    w[name] = w[name] + 0.02 * torch.randn_like(w[name])


def trained_further(w, c):
    name = of_layer(2, "mlp.down_proj")
    w[name] = w[name] + 0.002 * torch.randn_like(w[name])


def q_not_permuted_and_bit_flipped(w, c):
    q_not_permuted(w, c)
    bit_flipped(w, c)


def swapped_and_bit_flipped_inside(w, c):
    gate_and_up_swapped(w, c)
    bit_flipped(w, c)


def q_and_theta_and_row(w, c):
    q_not_permuted(w, c)
    theta(w, c)
    embedding_off_by_one(w, c)


def zero_projection(w, c):
    for name in every("self_attn.o_proj"):
        w[name] = torch.zeros_like(w[name])


def zero_norms(w, c):
    w[of_layer(2, "input_layernorm")].zero_()
    w["model.norm.weight"].zero_()


def zero_table_and_head(w, c):
    w[EMBED].zero_()
    w["lm_head.weight"].zero_()


def one_number(w, c):
    w[of_layer(1, "self_attn.q_proj")].fill_(0.02)


def norm_reset(w, c):
    w[of_layer(0, "post_attention_layernorm")].fill_(1)


def bytes_reversed(w, c):
    name = of_layer(1, "self_attn.v_proj")
    w[name] = torch.from_numpy(w[name].numpy().byteswap())


def float16_read_as_bfloat16(w, c):
    name = of_layer(2, "mlp.up_proj")
    w[name] = w[name].half().view(torch.bfloat16).float()


def bfloat16_read_as_float16(w, c):
    name = of_layer(2, "mlp.up_proj")
    w[name] = w[name].bfloat16().view(torch.half).float()


def fused_rows_alternate(w, c):
    for gate, up in zip(every("mlp.gate_proj"), every("mlp.up_proj")):
        w[gate], w[up] = torch.stack([w[gate], w[up]], 1).flatten(0, 1).chunk(2)


def fused_rows_taken_in_turn(w, c):
    for gate, up in zip(every("mlp.gate_proj"), every("mlp.up_proj")):
        fused = torch.cat([w[gate], w[up]])
        w[gate], w[up] = fused[0::2], fused[1::2]


def never_loaded(w, c):
    for name in ("self_attn.v_proj", "mlp.gate_proj"):
        w[of_layer(3, name)] = 0.2 * torch.randn_like(w[of_layer(3, name)])


def memory_never_written(w, c):
    bits = torch.randint(-(2**31), 2**31 - 1, w[of_layer(3, "mlp.gate_proj")].shape)
    w[of_layer(3, "mlp.gate_proj")] = bits.int().view(torch.float32)


def q_transposed_and_not_permuted(w, c):
    """The permutation was left out, and PyTorch's [out, in] kept as [in, out]."""
    for name in every("self_attn.q_proj"):
        w[name] = to_meta(w[name], HEADS).T.reshape(w[name].shape)


def q_permuted_after_transposing(w, c):
    for name in every("self_attn.q_proj"):
        w[name] = to_meta(w[name].T.reshape(w[name].shape), HEADS)


def k_not_permuted_and_scaled(w, c):
    for name in every("self_attn.k_proj"):
        w[name] = to_meta(w[name], KV_HEADS) * HEAD_DIM**-0.5


def q_not_permuted_and_tiled(w, c):
    q_not_permuted(w, c)
    q_heads_tiled(w, c)


def o_tiled_and_transposed(w, c):
    for name in every("self_attn.o_proj"):
        grouped = w[name].view(-1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        w[name] = grouped.transpose(1, 2).reshape(w[name].shape).T.reshape(w[name].shape)


def v_for_k_and_interleaved(w, c):
    for name, other in zip(every("self_attn.k_proj"), every("self_attn.v_proj")):
        w[name] = to_meta(w[other], KV_HEADS)


def gate_is_up_transposed(w, c):
    for gate, up in zip(every("mlp.gate_proj"), every("mlp.up_proj")):
        w[gate] = w[up].T


def two_tokens_exchanged(w, c):
    w[EMBED][[7, 290]] = w[EMBED][[290, 7]]


GATE_UP = "layers/w_gate+layers/w_up"
FAULTS = {
    q_not_permuted: [("interleaved", "layers/wq", ALL)],
    k_not_permuted: [("interleaved", "layers/wk", ALL)],
    k_permuted_as_q: [("wrong_heads", "layers/wk", ALL)],
    k_unpermuted_as_q: [("wrong_heads", "layers/wk", ALL)],
    q_permuted_twice: [("permuted_twice", "layers/wq", ALL)],
    q_heads_tiled: [("tiled_heads", "layers/wq", ALL)],
    down_transposed: [("transposed", "layers/w_down", ALL)],
    gate_and_up_swapped: [("swapped", GATE_UP, ALL)],
    eps: [("rms_norm_eps", "rms_norm_eps", ())],
    theta: [("rope_theta", "rope_theta", ())],
    rope_scaling: [("rope_scaling", "rope_scaling", ())],
    activation: [("hidden_act", "hidden_act", ())],
    layer_copied: [("layer_copied", "layer", (2,))],
    layers_swapped: [("layers_swapped", "layer", (1,))],
    embedding_off_by_one: [("shifted_rows", "table", ())],
    head_row_inserted: [("shifted_rows", "head", ())],
    overflow: [("float16_overflow", "layers/w_down", (1,))],
    bit_flipped: [("bit_flip", "layers/w_up", (1,))],
    low_bit_flipped: [("bit_flip", "layers/w_up", (1,))],
    half_written: [("zeros", "layers/wo", (3,))],
    not_a_number: [("not_finite", "layers/wv", (0,))],
    scale_folded_in: [("scaled", "layers/wq", ALL)],
    norm_minus_one: [("offset", "layers/attention_norm", ALL)],
    shards_in_wrong_order: [("reordered", "layers/w_gate", ALL)],
    one_tensor_of_another_layer: [("layer_copied", "layers/wv", (3,))],
    noise: [("unexplained", "layers/w_down", (2,))],
    trained_further: [("unexplained", "layers/w_down", (2,))],
    q_not_permuted_and_bit_flipped: [
        ("interleaved", "layers/wq", ALL),
        ("bit_flip", "layers/w_up", (1,)),
    ],
    swapped_and_bit_flipped_inside: [
        ("swapped", GATE_UP, ALL),
        ("bit_flip", "layers/w_up", (1,)),
    ],
    zero_projection: [("constant", "layers/wo", ALL)],
    zero_norms: [("constant", "layers/attention_norm", (2,)), ("constant", "norm", ())],
    zero_table_and_head: [("constant", "table", ()), ("constant", "head", ())],
    one_number: [("constant", "layers/wq", (1,))],
    norm_reset: [("constant", "layers/mlp_norm", (0,))],
    bytes_reversed: [("byte_order", "layers/wv", (1,))],
    float16_read_as_bfloat16: [("misread", "layers/w_up", (2,))],
    bfloat16_read_as_float16: [("misread", "layers/w_up", (2,))],
    fused_rows_alternate: [("fused_rows", f"layers/w_{w}", ALL) for w in ("gate", "up")],
    fused_rows_taken_in_turn: [("fused_rows", f"layers/w_{w}", ALL) for w in ("gate", "up")],
    never_loaded: [("unexplained", leaf, (3,)) for leaf in ("layers/wv", "layers/w_gate")],
    memory_never_written: [("unexplained", "layers/w_gate", (3,))],
    q_transposed_and_not_permuted: [("two_mistakes", "layers/wq", ALL)],
    q_permuted_after_transposing: [("two_mistakes", "layers/wq", ALL)],
    k_not_permuted_and_scaled: [("two_mistakes", "layers/wk", ALL)],
    q_not_permuted_and_tiled: [("two_mistakes", "layers/wq", ALL)],
    o_tiled_and_transposed: [("two_mistakes", "layers/wo", ALL)],
    v_for_k_and_interleaved: [("two_mistakes", "layers/wk", ALL)],
    gate_is_up_transposed: [("two_mistakes", "layers/w_gate", ALL)],
    two_tokens_exchanged: [("exchanged_rows", "table", ())],
    q_and_theta_and_row: [
        ("interleaved", "layers/wq", ALL),
        ("rope_theta", "rope_theta", ()),
        ("shifted_rows", "table", ()),
    ],
}
WORDS = {
    q_transposed_and_not_permuted: "q_proj of every layer is interleaved (Meta layout), and then "
    "is transposed (under the shape [128, 64])",
    q_permuted_after_transposing: "is transposed (under the shape [128, 64]), and then is "
    "interleaved (Meta layout)",
    k_not_permuted_and_scaled: "is interleaved (Meta layout), and then is 1/sqrt(head_dim)",
    q_not_permuted_and_tiled: "and then has its heads in tile order",
    o_tiled_and_transposed: "in tile order (head h for kv head h % 2), in its columns, and then is "
    "transposed",
    v_for_k_and_interleaved: "holds the weights of v_proj, and then is interleaved",
    gate_is_up_transposed: "holds the weights of up_proj, and then is transposed",
    two_tokens_exchanged: "embed_tokens has rows 7, 290 in the order 290, 7",
    q_not_permuted: "q_proj of every layer is interleaved (Meta layout)",
    k_permuted_as_q: "k_proj of every layer was permuted from Meta's layout with 8 heads in place "
    "of 2",
    k_unpermuted_as_q: "un-permuted to Meta's layout with 8 heads in place of 2",
    down_transposed: "down_proj of every layer is transposed",
    gate_and_up_swapped: "gate_proj and up_proj of every layer are swapped",
    eps: "rms_norm_eps is 1e-06, it should be 1e-05",
    theta: "rope_theta is 500000.0, it should be 10000.0",
    layer_copied: "layer 2 is a copy of layer 1",
    layers_swapped: "layer 1 and layer 2 are swapped",
    embedding_off_by_one: "embed_tokens is off by one row: its row i holds what belongs in row i "
    "- 1",
    head_row_inserted: "lm_head is off by one row from row 10 on",
    overflow: "down_proj of layer 1 overflowed in float16: 1 element is inf",
    bit_flipped: "up_proj of layer 1 has a flipped bit in one element, [3, 5]: bit 30 of float32",
    trained_further: "differs a little all over",
    half_written: "zeros in 4096 of 8192 elements, rows 32 to 63",
    shards_in_wrong_order: "its 4 blocks of 16 rows in the order 3, 2, 1, 0",
    scale_folded_in: "1/sqrt(head_dim) = 0.25 times",
    zero_projection: "o_proj of every layer holds only zeros",
    zero_norms: "norm holds only zeros",
    one_number: "q_proj of layer 1 is 0.02 in every element",
    norm_reset: "is 1 in every element: set back to its start",
    float16_read_as_bfloat16: "holds the bits of float16, read as bfloat16",
    bfloat16_read_as_float16: "holds the bits of bfloat16, read as float16",
    fused_rows_alternate: "has rows of gate_proj and up_proj in turn",
    fused_rows_taken_in_turn: "has every second row of gate_proj and then of up_proj",
}


def damaged(good, directory, fault, outlier=False):
    """A copy of the healthy model with a fault, and its healthy twin."""
    weights = safe.load_file(good / "model.safetensors")
    config = json.loads((good / "config.json").read_text())
    if outlier:
        weights[of_layer(1, "mlp.down_proj")][2, 3] = 70000.0
        save(directory / "twin", good, weights, config)
    fault(weights, config)
    save(directory / "bad", good, weights, config)
    return (directory / "twin" if outlier else good), directory / "bad"


def save(directory, good, weights, config):
    shutil.copytree(good, directory)
    copies = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    safe.save_file(copies, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))


# What the last words of an unexplained difference say of it.
CLOSING = {
    never_loaded: "unrelated numbers: another model's, random",
    memory_never_written: "unrelated numbers, and no weights",
    noise: "a trained model differs from its start like this",
}
