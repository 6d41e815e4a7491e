"""Tiny Hugging Face Llamas with random weights, and what our decoder makes of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity is measured against torch (extra: test)")
transformers = pytest.importorskip(
    "transformers", reason="parity is measured against transformers (extra: test)"
)

from lemur_jax.convert.hf_config import config_from_hf  # noqa: E402
from lemur_jax.convert.load import load_model  # noqa: E402

torch.set_num_threads(1)  # tiny matrices: threads only contend
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    # Wide enough that logits are of the order of 1 and an error of a weight is seen in them.
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
}


def make(directory, *, dtype=None, seed=0, max_shard_size="5GB", **overrides):
    """A random LlamaForCausalLM, also saved in `directory`. Biases and norms are random too."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**(TINY | overrides))
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def random_tokens(vocab_size, batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length), dtype=np.int32)


def their_logits(model, tokens, start=0):
    positions = torch.arange(start, start + tokens.shape[1])[None]
    tokens = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        return model(tokens, position_ids=positions, use_cache=False).logits.numpy()


def load_float32(path, attention):
    """The HF directory `path` as a float32 Decoder, whatever its stored dtype."""
    config = config_from_hf(json.loads((path / "config.json").read_text()))
    config = dataclasses.replace(
        config, dtype="float32", param_dtype="float32", attention=attention
    )
    return load_model(path, config=config)


def our_logits(path, tokens, attention="reference"):
    """Float32 logits [B,T,padded V] of the HF directory `path`."""
    return decoder_logits(load_float32(path, attention)[0], tokens)


@jax.jit
def _forward(model, tokens, positions):
    return model(tokens, positions, jnp.ones_like(tokens))[0]


def decoder_logits(model, tokens, start=0):
    """Logits [B,T,padded V] of a Decoder; every row is one document that begins at `start`."""
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    with jax.default_matmul_precision("float32"):
        return np.asarray(_forward(model, jnp.asarray(tokens), positions))


def edit_json(path, change):
    """Applies `change` to the object in a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
