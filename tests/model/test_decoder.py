"""Properties of the decoder: causality, packing, cache, remat, padding of the vocabulary."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.config import ModelConfig, RopeConfig
from lemur_jax.model import decoder, param
from lemur_jax.model.cache import empty_cache

CONFIG = ModelConfig(
    vocab_size=101,  # odd: padded to 128 in memory
    embed=48,
    mlp=80,
    layers=3,
    heads=6,
    kv_heads=2,  # heads / kv_heads != kv_heads
    head_dim=16,
    max_positions=64,
    rope=RopeConfig(theta=10000.0),
    norm_eps=1e-5,
    initializer_range=0.15,  # logits of order one
    dtype="float32",
    attention="chunked",
)
# float32 sums in another order; logits are of order one.
CLOSE = 2e-5


@pytest.fixture(scope="module")
def model():
    return decoder.Decoder(CONFIG, jax.random.key(0))


def row(length: int, seed: int = 1, batch: int = 2):
    tokens = jax.random.randint(jax.random.key(seed), (batch, length), 0, CONFIG.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return tokens, positions, jnp.ones((batch, length), jnp.int32)


@jax.jit
def run(model, tokens, positions, segments):
    return model(tokens, positions, segments)[0]


def test_causality_by_gradient(model):
    """Red if the mask rule compares positions with < or >= the wrong way round."""
    _, positions, segments = row(12, batch=1)

    def logits_from_table(table):
        changed = jax.tree.map(lambda w: w, model)
        # Perturb each token's own input by giving every token its own row of the table.
        changed.table = model.table.replace(table)
        return changed(jnp.arange(12)[None], positions, segments)[0][0, 5, 0]

    gradient = jax.grad(logits_from_table)(model.table[...])
    norms = np.linalg.norm(np.asarray(gradient[:12]), axis=-1)
    assert (norms[:6] > 0).all()
    assert (norms[6:] == 0).all()


def test_packed_documents_equal_separate_rows(model):
    """Red if segment ids are not passed to the kernel, or positions do not restart."""
    lengths = (5, 9, 2)
    tokens, _, _ = row(20, batch=1)
    parts = np.cumsum((0, *lengths))
    positions = np.zeros((1, 20), np.int32)
    segments = np.zeros((1, 20), np.int32)
    for index, (start, stop) in enumerate(itertools.pairwise(parts)):
        positions[0, start:stop] = np.arange(stop - start)
        segments[0, start:stop] = index + 1
    packed = run(model, tokens, positions, segments)
    for start, stop in itertools.pairwise(parts):
        _, alone_positions, ones = row(int(stop - start), batch=1)
        alone = run(model, tokens[:, start:stop], alone_positions, ones)
        real = np.s_[..., : CONFIG.vocab_size]
        np.testing.assert_allclose(packed[:, start:stop][real], alone[real], atol=CLOSE)


@pytest.mark.parametrize("stacked", [True, False])
def test_prefill_and_decode_equal_the_full_forward(model, stacked):
    """Red if the cache is written one slot off, or decode passes the wrong position."""
    tokens, positions, segments = row(12)
    full = run(model, tokens, positions, segments)
    net = model if stacked else decoder.unstack(model)
    cache = empty_cache(CONFIG, 2, 16, stacked=stacked)
    step = jax.jit(lambda m, *a: m(*a))
    logits, cache = step(net, tokens[:, :7], positions[:, :7], segments[:, :7], cache)
    found = [logits]
    for t in range(7, 12):
        one = np.s_[:, t : t + 1]
        logits, cache = step(net, tokens[one], positions[one], segments[one], cache)
        found.append(logits)
    real = np.s_[..., : CONFIG.vocab_size]
    np.testing.assert_allclose(jnp.concatenate(found, 1)[real], full[real], atol=CLOSE)
    assert int(cache.end) == 12


def test_ragged_rows_do_not_see_each_others_padding(model):
    """Red if unused or padded cache slots had a segment other than 0."""
    tokens, positions, segments = row(8)
    segments = segments.at[1, 3:].set(0)  # the second row has 3 real tokens
    cache = empty_cache(CONFIG, 2, 12, stacked=True)
    _, cache = model(tokens, positions * segments, segments, cache)
    own = jnp.array([[8], [3]], jnp.int32)
    nxt = jnp.array([[7], [7]], jnp.int32)
    logits, _ = model(nxt, own, jnp.ones_like(own), cache)
    alone = jnp.concatenate([tokens[1:, :3], nxt[1:]], axis=1)
    _, alone_positions, ones = row(4, batch=1)
    expected = run(model, alone, alone_positions, ones)[0, -1]
    real = slice(CONFIG.vocab_size)
    np.testing.assert_allclose(logits[1, 0, real], expected[real], atol=CLOSE)


@pytest.mark.parametrize(
    "policy",
    [
        {"remat": "full"},
        {"remat": "dots"},
        {"remat": "named", "remat_saved": ("q", "kv", "attention", "mlp_residual")},
        {"remat": "named", "remat_offloaded": ("layer_input", "attention")},
        {"remat": "named", "remat_saved": ("gate",), "remat_offloaded": ("layer_input", "up")},
    ],
    ids=lambda policy: " ".join(map(str, policy.values())),
)
def test_remat_changes_memory_and_not_gradients(model, policy):
    """Red if remat() returned `body` for every policy (memory), or dropped a layer (gradients)."""
    tokens, positions, segments = row(32)

    def loss(model):
        logits = model(tokens, positions, segments)[0][..., : CONFIG.vocab_size]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    def compiled(policy):
        net = decoder.Decoder(dataclasses.replace(CONFIG, **policy), jax.random.key(0))
        lowered = jax.jit(jax.grad(loss)).lower(net).compile()
        return lowered(net), lowered.memory_analysis().temp_size_in_bytes

    plain, plain_bytes = compiled({})
    found, found_bytes = compiled(policy)
    assert found_bytes < plain_bytes
    for name, gradient in param.flatten(plain).items():
        np.testing.assert_allclose(param.flatten(found)[name], gradient, atol=CLOSE, err_msg=name)


def test_padded_vocabulary_is_impossible(model):
    """Red if logits() loses its mask."""
    logits = run(model, *row(4))
    assert logits.shape[-1] == 128
    assert np.isneginf(logits[..., 101:]).all()
    assert np.isfinite(logits[..., :101]).all()


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_logits(model):
    """Red if _linear does not cast its weight to the compute dtype."""
    half = jax.tree.map(lambda w: w, model)
    net = decoder.Decoder(dataclasses.replace(CONFIG, dtype="bfloat16"), jax.random.key(0))
    states, _ = net.hidden(*row(8))
    assert states.dtype == jnp.bfloat16
    assert net.table[...].dtype == jnp.float32  # master weights
    logits = run(net, *row(8))
    assert logits.dtype == jnp.float32
    real = np.s_[..., : CONFIG.vocab_size]
    # bfloat16 has 8 bits: logits of order one after three layers differ by a few percent.
    np.testing.assert_allclose(logits[real], run(half, *row(8))[real], atol=0.15)


def test_flatten_and_unflatten_are_inverse(model):
    """Red if unflatten ignored missing names."""
    flat = param.flatten(model)
    assert "layers/wq" in flat and flat["layers/wq"].shape == (3, 48, 6, 16)
    again = param.unflatten(decoder.abstract(CONFIG), flat)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    del flat["norm"]
    with pytest.raises(KeyError, match="missing weights: .*norm"):
        param.unflatten(decoder.abstract(CONFIG), flat)


def test_biases_take_part():
    """Red if _linear forgot to add the bias of one projection."""
    config = dataclasses.replace(CONFIG, attention_bias=True, mlp_bias=True)
    net = decoder.Decoder(config, jax.random.key(0))
    gradient = jax.grad(lambda m: jnp.sum(run(m, *row(6))[..., 0] ** 2))(net)
    flat = param.flatten(gradient)
    names = [f"layers/b{name}" for name in ("q", "k", "v", "o", "_gate", "_up", "_down")]
    for name in set(names) - {"layers/bk"}:  # a key bias without RoPE would not matter
        assert float(jnp.abs(flat[name]).max()) > 1e-6, name
