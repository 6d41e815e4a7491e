"""The tiny model of tiny_hf in other people's formats, written by their own tools or by hand.

Each layout is spelt out with torch or numpy here, so that a slip in a table cannot hide.
"""

import json

import numpy as np
import tiny_hf

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 4


def interleaved(weight, heads):
    """HF's half-split rows of each head to Meta's pairs: row d of a pair lies beside row d+1."""
    out, columns = weight.shape
    halves = weight.reshape(heads, 2, HEAD_DIM // 2, columns)
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(out, columns)


META_NAMES = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
}


def meta_weights(weights):
    """The same model under Meta's names and with Meta's order of rotary pairs."""
    found = {
        "tok_embeddings.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for layer in range(2):
        for theirs, meta in META_NAMES.items():
            array = weights[f"model.layers.{layer}.{theirs}"]
            if "q_proj" in theirs:
                array = interleaved(array, HEADS)
            if "k_proj" in theirs:
                array = interleaved(array, KV_HEADS)
            found[f"layers.{layer}.{meta}"] = array
    return found


def easylm_weights(weights):
    """The same model as EasyLM's flat keys; kernels are [in, out]."""
    meta = meta_weights(weights)
    found = {
        ("transformer", "wte", "embedding"): meta["tok_embeddings.weight"],
        ("transformer", "ln_f", "kernel"): meta["norm.weight"],
        ("lm_head", "kernel"): meta["output.weight"].T,
    }
    for layer in range(2):
        for name in META_NAMES.values():
            parts = name.removesuffix(".weight").split(".")
            key = ("transformer", "h", str(layer), *parts, "kernel")
            found[key] = meta[f"layers.{layer}.{name}"].T  # a norm's transpose is itself
    return found


def write_easylm(directory, weights, prefix=("params",), name="streaming_params"):
    """As EasyLM's StreamingCheckpointer does it, with flax and msgpack."""
    import msgpack
    from flax.serialization import to_bytes

    directory.mkdir(parents=True)
    packer = msgpack.Packer()
    with open(directory / name, "wb") as file:
        for key, array in easylm_weights(weights).items():
            file.write(packer.pack(((*prefix, *key), to_bytes(np.ascontiguousarray(array)))))
    (directory / "config.json").write_text(json.dumps(tiny_hf.CONFIG))
    return directory


SPLIT_AXIS = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}
PARAMS = {
    "dim": 16,
    "n_layers": 2,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "vocab_size": -1,
    "norm_eps": 1e-5,
}


def write_meta(directory, weights, files=1, embedding_axis=1, torch=None, **params):
    """With torch.save, split over `files` as Meta's model parallelism does."""
    directory.mkdir(parents=True)
    (directory / "params.json").write_text(json.dumps(PARAMS | params))
    for number in range(files):
        part = {}
        for name, array in meta_weights(weights).items():
            words = name.split(".")
            axis = embedding_axis if words[0] == "tok_embeddings" else SPLIT_AXIS.get(words[-2])
            if axis is not None:
                array = np.split(array, files, axis)[number]
            part[name] = tensor_of(torch, array)
        part["rope.freqs"] = torch.tensor([1.0, 0.01])
        torch.save(part, directory / f"consolidated.{number:02d}.pth")
    return directory


def tensor_of(torch, array):
    """A torch tensor of any of our dtypes, contiguous."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def write_bin(directory, weights, torch, shards=1, legacy=False, buffers=True):
    """A directory as OpenLemur's: pytorch_model-*.bin with inv_freq buffers, and an index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(tiny_hf.CONFIG))
    tensors = {name: tensor_of(torch, array) for name, array in weights.items()}
    if buffers:
        for layer in range(2):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            tensors[name] = torch.tensor([1.0, 0.01])
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        file = (
            "pytorch_model.bin"
            if shards == 1
            else f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        )
        torch.save(part, directory / file, _use_new_zipfile_serialization=not legacy)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory
