"""Each transform against an independent float64 definition and against transformers' own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.config import ConfigError
from lemur_jax.sample import methods, vocabulary
from lemur_jax.sample.methods import (
    Chain,
    Greedy,
    MinP,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    standard,
)

BATCH, VOCAB = 5, 331  # not a multiple of the block that searches use
RTOL = 1e-6  # one float32 rounding of a division
CHI_SQUARE_99_9 = 149.4  # 99.9th percentile, 100 degrees of freedom


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 3, (BATCH, VOCAB)).astype(np.float32)


@pytest.fixture
def seen():
    return np.random.default_rng(1).random((BATCH, VOCAB)) < 0.1


def _sorted_reference(logits, keep_of_sorted):
    """Applies a rule on descending probabilities, in float64, row by row, with a sort."""
    out = np.full_like(logits, -np.inf)
    for row in range(len(logits)):
        order = np.argsort(-logits[row].astype(np.float64), kind="stable")
        values = logits[row].astype(np.float64)[order]
        p = np.exp(values - values[0])
        kept = order[keep_of_sorted(p / p.sum())]
        out[row, kept] = logits[row, kept]
    return out


@pytest.mark.parametrize("k", [1, 2, 50, VOCAB, 10_000])
def test_top_k_against_sort(logits, seen, k):
    """Red if `>= k` in TopK's `enough` becomes `> k`."""
    want = _sorted_reference(logits, lambda p: np.arange(len(p)) < k)
    np.testing.assert_array_equal(jax.jit(TopK(k).__call__)(logits, seen), want)


@pytest.mark.parametrize("p", [0.001, 0.3, 0.9, 0.999])
def test_top_p_against_sort(logits, seen, p):
    """Red if `codes > threshold` in TopP's `too_low` becomes `>=`."""
    want = _sorted_reference(logits, lambda q: np.cumsum(q) - q < p)
    np.testing.assert_array_equal(jax.jit(TopP(p).__call__)(logits, seen), want)


@pytest.mark.parametrize("m", [0.01, 0.2, 1.0])
def test_min_p_against_definition(logits, seen, m):
    """Red if MinP adds `min_p` instead of its logarithm."""
    want = _sorted_reference(logits, lambda p: p >= m * p[0])
    np.testing.assert_array_equal(jax.jit(MinP(m).__call__)(logits, seen), want)


def test_ties_stay_together():
    """Red if TopK keeps exactly k, or treats -0.0 as smaller than 0.0."""
    logits = jnp.array([[1.0, 0.0, -0.0, 0.0, -5.0]])
    kept = np.isfinite(TopK(2)(logits, None))
    np.testing.assert_array_equal(kept, [[True, True, True, True, False]])


@pytest.mark.parametrize("ours", [TopK(7), TopP(0.8), MinP(0.1), Temperature(0.6)], ids=str)
def test_against_transformers(logits, seen, ours):
    """Red if Temperature multiplies, or TopP keeps one token too few."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    (value,) = vars(ours).values()
    warper = {
        TopK: theirs.TopKLogitsWarper,
        TopP: theirs.TopPLogitsWarper,
        MinP: theirs.MinPLogitsWarper,
        Temperature: theirs.TemperatureLogitsWarper,
    }[type(ours)](value)
    want = warper(None, torch.from_numpy(logits.copy())).numpy()
    np.testing.assert_allclose(ours(jnp.asarray(logits), seen), want, rtol=RTOL)


def test_repetition_penalty_against_transformers(logits):
    """Red if negative logits are divided, or only generated tokens count."""
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    ids = np.random.default_rng(2).integers(0, VOCAB, (BATCH, 40))
    seen = np.zeros((BATCH, VOCAB), bool)
    seen[np.arange(BATCH)[:, None], ids] = True
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    want = processor(torch.from_numpy(ids), torch.from_numpy(logits.copy())).numpy()
    got = RepetitionPenalty(1.3)(jnp.asarray(logits), jnp.asarray(seen))
    np.testing.assert_allclose(got, want, rtol=RTOL)


def test_chain_against_transformers(logits):
    """Red if `standard` puts top-p before the temperature."""
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    settings = dict(temperature=0.7, top_k=40, top_p=0.8, min_p=0.02, repetition_penalty=1.2)
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, VOCAB, (BATCH, 9)))
    generation = GenerationConfig(do_sample=True, **settings)
    processors = LlamaForCausalLM(tiny)._get_logits_processor(generation, ids.shape[1], ids)
    want = processors(ids, torch.from_numpy(logits.copy())).numpy()
    seen = np.zeros((BATCH, VOCAB), bool)
    seen[np.arange(BATCH)[:, None], ids.numpy()] = True
    got = standard(**settings)(jnp.asarray(logits), jnp.asarray(seen))
    np.testing.assert_allclose(got, want, rtol=RTOL)


def test_neutral_values_change_nothing(logits, seen):
    """Red if Temperature divides by a temperature of 1 plus anything, or TopP(1) drops a tail."""
    active = standard(
        temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=2.0
    )  # so that no transform is skipped
    chain = methods.stack([standard()] * (BATCH - 1) + [active])
    out = np.asarray(jax.jit(chain.__call__)(logits, seen))
    np.testing.assert_array_equal(out[:-1], logits[:-1])
    assert np.isfinite(out[-1]).sum() <= 3


def test_greedy_is_the_first_largest(logits, seen):
    """Red if `first_largest` returns the last of equal logits, or Temperature(0) divides."""
    logits = logits.copy()
    logits[0, [300, 7, 130]] = 50.0
    keys = jax.vmap(jax.random.key)(np.arange(BATCH))
    want = np.argmax(logits, -1)
    assert want[0] == 7
    mixed = methods.stack([standard(temperature=0.0)] * (BATCH - 1) + [standard()])
    for chain in (standard(temperature=0.0), Chain((Greedy(),))):
        np.testing.assert_array_equal(chain.draw(jnp.asarray(logits), seen, keys), want)
    tokens = mixed.draw(jnp.asarray(logits), jnp.asarray(seen), keys)
    np.testing.assert_array_equal(tokens[:-1], want[:-1])


def test_draws_follow_the_distribution():
    """Red if `categorical` subtracts the noise, or scales it (chi-square test)."""
    draws, vocab = 20_000, 300
    logits = np.random.default_rng(4).normal(0, 1, vocab).astype(np.float32)
    logits[::3] = -np.inf  # 200 tokens are left
    keys = jax.vmap(jax.random.key)(np.arange(draws))
    tokens = jax.jit(vocabulary.categorical)(jnp.broadcast_to(logits, (draws, vocab)), keys)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    assert not counts[::3].any(), "a token of probability 0 was drawn"
    order = np.argsort(p)
    observed = np.array([c.sum() for c in np.array_split(counts[order], 101)])
    expected = np.array([e.sum() for e in np.array_split(p[order] * draws, 101)])
    held = expected > 0
    statistic = np.sum((observed[held] - expected[held]) ** 2 / expected[held])
    assert statistic < CHI_SQUARE_99_9


def test_changing_numbers_compiles_nothing(logits, seen):
    """Red if a transform's fields become meta_fields (static) of its pytree."""
    draw = jax.jit(lambda chain, logits, seen, keys: chain.draw(logits, seen, keys))
    keys = jax.vmap(jax.random.key)(np.arange(BATCH))
    for temperature, k in ((0.0, 0), (0.7, 3), (1.3, 50)):
        chain = methods.stack([standard(temperature=temperature, top_k=k)] * BATCH)
        draw(chain, logits, seen, keys)
    assert draw._cache_size() == 1


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: Temperature(-1), ["temperature=-1", "must be 0", "0.7"]),
        (lambda: Temperature(1e-9), ["temperature=1e-09", "greedy"]),
        (lambda: TopK(-3), ["top_k=-3", "0 turns top-k off"]),
        (lambda: TopP(0.0), ["top_p=0.0", "(0, 1]"]),
        (lambda: MinP(1.5), ["min_p=1.5", "[0, 1]"]),
        (lambda: RepetitionPenalty(0), ["repetition_penalty=0", "> 0"]),
        (lambda: Temperature(float("nan")), ["temperature=nan"]),
    ],
)
def test_bad_values_are_named(build, words):
    """Red if a transform's __post_init__ is removed."""
    with pytest.raises(ConfigError) as error:
        build()
    assert all(word in str(error.value) for word in words)


def test_methods_are_hashable_values():
    """Red if the dataclasses are not frozen."""
    assert {TopK(5): 1}[TopK(5)] == 1 and standard(top_p=0.5) == standard(top_p=0.5)
