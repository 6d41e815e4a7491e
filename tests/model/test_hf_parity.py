"""Logits equal transformers' in float32, on every architectural option of LlamaConfig."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
import hf_models  # skips this file where torch or transformers is missing
from transformers.models.llama import modeling_llama

from lemur_jax.convert.hf_config import config_from_hf
from lemur_jax.model import rope

# The promise to users; measured differences are below 2e-5, most of it torch's and XLA's different
# order of summation.
TOLERANCE = 1e-4

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # With 8 pairs: wavelength 6 is kept, 20 blended, 63 and longer slowed.
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    # With 8 pairs the band is 0.8 to 2.8, so that rounding it (truncate) matters.
    "beta_fast": 1.0,
    "beta_slow": 0.1,
}
CONFIGS = {
    "mha": {},
    "gqa 8/2": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "gqa 12/3": {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3},
    "mqa": {"num_key_value_heads": 1},
    "head_dim 16, not 8": {"head_dim": 16, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "attention_bias, mlp_bias": {"attention_bias": True, "mlp_bias": True},
    "attention_bias, gqa": {"attention_bias": True, "num_key_value_heads": 2},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": 16,
    },
    "llama3": {"head_dim": 16, "rope_parameters": LLAMA3, "max_position_embeddings": 192},
    "yarn": {"head_dim": 16, "rope_parameters": YARN},
    "yarn attention_factor": {"head_dim": 16, "rope_parameters": YARN | {"attention_factor": 1.3}},
    "yarn mscale": {
        "head_dim": 16,
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4},
    },
    "yarn not truncated": {"head_dim": 16, "rope_parameters": YARN | {"truncate": False}},
    "gelu": {"hidden_act": "gelu"},
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "vocabulary 101": {"vocab_size": 101},
    "vocabulary 32005": {"vocab_size": 32005, "hidden_size": 16},
    "vocabulary 261, tied": {"vocab_size": 261, "tie_word_embeddings": True},
    "norm eps 0.1": {"rms_norm_eps": 0.1},
    "theta 1e6": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
# Three times the trained length of `dynamic` and `yarn`, one and a half times that of `llama3`.
LENGTH = 48
CHUNKED = ("gqa 12/3", "mqa", "attention_bias, gqa", "llama3", "vocabulary 101")


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "reference") for name in CONFIGS] + [(name, "chunked") for name in CHUNKED],
)
def test_logits_equal_transformers(tmp_path, name, attention, record_property):
    """Red when: rope.rotate exchanges the signs; a rule says '(d h) e'; rms_norm drops eps;
    GQA repeats kv heads in the other order; `_yarn_scale` or a bias is left out."""
    model = hf_models.make(tmp_path / "hf", **CONFIGS[name])
    vocab = model.config.vocab_size
    tokens = hf_models.random_tokens(vocab, 2, LENGTH)
    theirs = hf_models.their_logits(model, tokens)
    ours = hf_models.our_logits(tmp_path / "hf", tokens, attention)
    worst = float(np.abs(ours[..., :vocab] - theirs).max())
    record_property("max_abs", worst)
    print(f"parity | {name} | {attention} | {worst:.1e} | logits to {np.abs(theirs).max():.1f}")
    assert np.abs(theirs).max() > 1, "logits so small that the tolerance means nothing"
    assert worst <= TOLERANCE
    assert np.all(np.isneginf(ours[..., vocab:]))


FAR = {
    "theta 1e6": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "max_position_embeddings": 131072},
    "yarn": {"rope_parameters": YARN | {"factor": 3.0}},  # by 4 every order rounds the same
}


@pytest.mark.parametrize("name", FAR)
def test_logits_equal_transformers_at_far_positions(tmp_path, name):
    """Red when `frequencies` takes numpy's float32 power: a unit in the last place of a frequency
    is 4e-3 radians at position 32768."""
    model = hf_models.make(tmp_path / "hf", head_dim=128, **FAR[name])
    tokens = hf_models.random_tokens(128, 1, 24)
    ours, _ = hf_models.load_float32(tmp_path / "hf", "reference")
    for start in (4096, 32768, 100_000):
        theirs = hf_models.their_logits(model, tokens, start)
        found = hf_models.decoder_logits(ours, tokens, start)
        assert np.abs(found - theirs).max() <= TOLERANCE, start


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", ["linear", "yarn not truncated", *FAR])
def test_frequencies_are_those_of_transformers(name, head_dim):
    """Red when the order of operations in `_llama3` or `_yarn` is not torch's. torch's power is
    not correctly rounded in one pair of 200, which nobody else can copy."""
    overrides = {"hidden_size": 4 * head_dim, "head_dim": head_dim} | (CONFIGS | FAR)[name]
    overrides["head_dim"] = head_dim
    theirs = hf_models.transformers.LlamaConfig(**(hf_models.TINY | overrides))
    rotary = modeling_llama.LlamaRotaryEmbedding(theirs)
    ours, scale = rope.frequencies(config_from_hf(theirs.to_dict()).rope, head_dim)
    assert scale == rotary.attention_scaling
    different = ours != rotary.inv_freq.numpy()
    assert different.sum() <= 1
    assert np.allclose(ours, rotary.inv_freq.numpy(), rtol=2.5e-7, atol=0)


def test_parity_notices_a_wrong_theta(tmp_path):
    """Red when the comparison above could not see a RoPE error (its tolerance or positions)."""
    model = hf_models.make(tmp_path / "hf")
    tokens = hf_models.random_tokens(128, 1, LENGTH)
    theirs = hf_models.their_logits(model, tokens)

    def change(config):
        config["rope_parameters"]["rope_theta"] = 10100.0

    hf_models.edit_json(tmp_path / "hf" / "config.json", change)
    ours = hf_models.our_logits(tmp_path / "hf", tokens)
    assert np.abs(ours - theirs).max() > 10 * TOLERANCE
