"""Tiny Hugging Face directories written with numpy alone, to be damaged by the tests."""

import json
from pathlib import Path

import numpy as np

from lemur_jax.convert import safetensors

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": [2, 7],
    "transformers_version": "4.31.0",
    "pretraining_tp": 1,
    "use_cache": True,
}
# Spelt out, so that a slip in the table cannot hide here.
LAYER = {
    "input_layernorm.weight": (16,),
    "self_attn.q_proj.weight": (16, 16),
    "self_attn.k_proj.weight": (8, 16),
    "self_attn.v_proj.weight": (8, 16),
    "self_attn.o_proj.weight": (16, 16),
    "post_attention_layernorm.weight": (16,),
    "mlp.gate_proj.weight": (24, 16),
    "mlp.up_proj.weight": (24, 16),
    "mlp.down_proj.weight": (16, 24),
}


def weights(dtype="float32", seed=0):
    """The tensors of CONFIG, by HF's names."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (101, 16)}
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in LAYER.items()}
    shapes |= {"model.norm.weight": (16,), "lm_head.weight": (101, 16)}
    to = safetensors.numpy_dtype(dtype)
    return {name: rng.normal(0, 1, shape).astype(to) for name, shape in shapes.items()}


def write(directory, tensors=None, config=None, shards=1):
    """Writes an HF directory; `shards` files of about equal numbers of tensors."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = weights() if tensors is None else tensors
    (directory / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    names = list(tensors)
    if shards == 1:
        write_file(directory / "model.safetensors", tensors)
        return directory
    weight_map = {}
    for index in range(shards):
        part = names[index::shards]
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        write_file(directory / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_file(path, tensors):
    """One safetensors file, by the definition of the format and not by our writer."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    names = {dtype.name: name for name, dtype in safetensors.DTYPES.items()}
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    write_raw(path, header, data)


def write_raw(path, header, data):
    """A file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_all(directory):
    """{name: (dtype, shape, bytes)} over all safetensors files of a directory."""
    found = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        for name, tensor in safetensors.read_header(path).items():
            assert name not in found
            raw = path.read_bytes()[tensor.extents[0][0] :][: tensor.nbytes]
            found[name] = (tensor.dtype.name, tensor.shape, raw)
    return found
