"""Adapters beside a decoder: nothing without them, the base at first, PEFT's formula after."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from jax.ad_checkpoint import checkpoint_name

from lemur_jax.config import LORA_TARGETS, ConfigError, LoraConfig
from lemur_jax.model import lora, param
from lemur_jax.model.block import Block, dense
from lemur_jax.model.decoder import Decoder

MODEL = dataclasses.replace(small_models.MODEL, attention="reference", attention_bias=True)
LORA = LoraConfig(rank=4, alpha=8.0)


def inputs(rows=2, length=12):
    tokens = np.random.default_rng(0).integers(0, 101, (rows, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones_like(tokens)


def logits(model):
    return np.asarray(jax.jit(lambda m: m(*inputs())[0])(model))[..., :101]


def random_adapters(config=LORA, model=MODEL, seed=1):
    """Adapters whose B is not zero."""
    fresh = lora.Adapters(config, model, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(0, 0.1, w.shape), w.dtype), fresh)


@pytest.fixture(scope="module")
def model():
    return Decoder(MODEL, jax.random.key(0))


@pytest.mark.parametrize(
    ("dtype", "remat", "embeddings"),
    [("float32", "none", True), ("bfloat16", "full", False), ("float32", "dots", False)],
)
def test_fresh_adapters_are_the_base_bit_for_bit(dtype, remat, embeddings):
    """Red if B were drawn like A, or table and head began at zero."""
    config = dataclasses.replace(MODEL, dtype=dtype, remat=remat)
    model = Decoder(config, jax.random.key(0))
    adapt = dataclasses.replace(LORA, embeddings=embeddings)
    adapted = lora.attach(model, lora.beside(model, adapt, jax.random.key(1)))
    assert logits(adapted).tobytes() == logits(model).tobytes()


def test_without_adapters_the_program_is_what_it_was(model, monkeypatch):
    """Red if a decoder without adapters computed anything for them (`if True` in Block._linear)."""

    def plain(self, x, w, b, inputs=1):
        weight = param.whole(getattr(self, w), self.config.dtype)
        size = math.prod(weight.shape[:inputs])
        rows = (-1,) if weight.ndim == 2 else x.shape[:2]
        y = dense(x.reshape(*rows, size), weight.reshape(size, -1))
        y = checkpoint_name(y, "product").reshape(*x.shape[:2], *weight.shape[inputs:])
        return y + param.whole(getattr(self, b), self.config.dtype) if hasattr(self, b) else y

    def program():
        return str(jax.make_jaxpr(lambda m: m(*inputs())[0])(model))

    found = program()
    monkeypatch.setattr(Block, "_linear", plain)
    assert found == program()


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("targets", [("wo",), ("wk", "w_down"), tuple(LORA_TARGETS)])
def test_adapted_is_merged(model, targets, embeddings):
    """Red if A were reshaped with heads and head_dim exchanged, the scale left out of one of the
    two, or wo's A taken for one input dimension."""
    config = LoraConfig(rank=4, alpha=6.0, targets=targets, embeddings=embeddings)
    adapters = random_adapters(config)
    adapted = logits(lora.attach(model, adapters))
    merged = logits(lora.merge(model, adapters))
    assert np.abs(adapted - logits(model)).max() > 1e-3
    np.testing.assert_allclose(adapted, merged, atol=1e-5 if embeddings else 2e-6)


def test_attach_changes_nothing_but_its_result(model):
    """Red if attach set attributes of the model that it was given."""
    before = set(param.flatten(model))
    adapted = lora.attach(model, random_adapters())
    assert set(param.flatten(model)) == before
    added = {f"layers/{name}_{side}" for name in LORA_TARGETS for side in "ab"}
    assert set(param.flatten(adapted)) == before | added


def test_first_values_are_pefts():
    """Red if the bound were sqrt(6 / inputs), or wo's inputs counted without head_dim."""
    wide = dataclasses.replace(MODEL, embed=64, heads=16)
    flat = param.flatten(lora.Adapters(LoraConfig(rank=64), wide, jax.random.key(0)))
    for name, fan_in in (("wq", 64), ("wo", 128), ("w_down", 64)):
        a = np.asarray(flat[f"layers/{name}_a"])
        bound = 1 / math.sqrt(fan_in)
        assert a.min() >= -bound and a.max() <= bound
        np.testing.assert_allclose(a.std(), bound / math.sqrt(3), rtol=0.03)
        assert not np.asarray(flat[f"layers/{name}_b"]).any()
    assert not np.array_equal(flat["layers/wq_a"][0], flat["layers/wq_a"][1])


def test_names_of_targets_and_all_problems_at_once():
    """Red if HF names were not turned into ours, or only the first problem were raised."""
    named = LoraConfig(targets=["v_proj", "wq"])
    assert named.targets == ("wq", "wv")
    with pytest.raises(ConfigError) as caught:
        LoraConfig(rank=0, alpha=-1.0, targets=("wq", "q_proj", "lm_head"))
    said = str(caught.value)
    for part in ("rank=0", "alpha=-1.0", "'wq' twice", "'lm_head'", "w_down (down_proj)"):
        assert part in said
