"""The comparison of `lemur convert parity`: its reference against transformers, and what it says
when our code is made wrong on purpose."""

import dataclasses
import importlib

import foreign
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf
from hf_models import TINY, make, random_tokens, their_logits, torch

from lemur_jax import cli
from lemur_jax.config import ModelConfig, RopeConfig
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.hf import import_hf
from lemur_jax.convert.hf_config import config_from_hf
from lemur_jax.convert.model import open_source
from lemur_jax.convert.parity import ours, parity
from lemur_jax.convert.parity.compare import compare, sample_positions
from lemur_jax.convert.parity.logits import OnlineKL
from lemur_jax.convert.parity.reference import Reference, inverse_frequencies, product
from lemur_jax.convert.parity.run import peak_bytes
from lemur_jax.convert.parity.weights import of_source
from lemur_jax.model import block, rope

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
# As tiny_hf: every test here has the same shapes, so that JAX compiles the operations once.
SHAPE = {
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
CONFIGS = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "dynamic": {"rope_parameters": DYNAMIC},
    "tied": {"tie_word_embeddings": True, "hidden_act": "gelu"},
    "tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
}
# float32 at position 4000: an angle is off by 4000 * 2^-24, which is 2e-4 of a logit of size 1.
ANGLE_ERROR = 2e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parity") / "hf"
    make(directory, **SHAPE)
    return directory


def weights_of(path):
    return of_source(open_source(path))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_is_transformers_model(tmp_path, name):
    """Red if the reference rotates neighbours, scales by 1/D, takes head h % K, or drops a bias."""
    theirs = make(tmp_path / "hf", **SHAPE, **CONFIGS[name])
    weights = weights_of(tmp_path / "hf")
    tokens = random_tokens(101, 2, 12)
    positions = np.broadcast_to(4000 + np.arange(12), tokens.shape)
    reference = Reference(weights.config, positions)
    x = weights.take("table", tokens)
    for layer in range(weights.config.layers):
        x = reference.layer(
            x, lambda leaf, i=layer: weights.tensor(leaf, i) if leaf in weights.rules else None
        )
    head = weights.tensor("table" if weights.config.tie_embeddings else "head")
    logits = product(reference.norm(x, weights.tensor("norm")), head)
    expected = their_logits(theirs, tokens, start=4000)
    assert logits.dtype == np.float64
    assert np.abs(logits - expected).max() < ANGLE_ERROR * np.abs(expected).max()


@pytest.mark.parametrize("name", ["plain", "linear", "llama3", "yarn", "dynamic"])
def test_the_frequencies_are_transformers(name):
    """Red if dynamic scaling takes the last position for the length. Short positions, so that no
    rounding of angles hides it."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    theirs = LlamaConfig(**(TINY | SHAPE | CONFIGS[name]), head_dim=32)
    positions = np.arange(60, 90)[None]  # the trained length is 64
    cos, _ = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.from_numpy(positions))
    ours_config = config_from_hf(theirs.to_dict())
    inverse, scale = inverse_frequencies(ours_config.rope, 32, positions)
    found = np.cos(positions[..., None] * inverse) * scale
    assert np.abs(found - cos.numpy()[..., :16]).max() < 2e-5


@pytest.mark.parametrize("name", ["plain", "biases", "dynamic"])
def test_our_code_agrees_with_the_reference(tmp_path, name):
    """Red if ours is given float64, positions of the other row, or no bias; and if SLACK is 0.1."""
    make(tmp_path / "hf", **SHAPE, **CONFIGS[name])
    weights = weights_of(tmp_path / "hf")
    comparison = compare(weights, weights, tokens=8)
    assert comparison.first_diverging is None
    assert comparison.final.kl < 1e-6 and comparison.final.same_choice == 1.0
    ops = [op for result in comparison.layers for op in result.ops]
    assert len(ops) == 2 * 16 + 3
    assert max(op.max_abs / op.budget for op in ops if op.largest) < 0.5  # budgets have room


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_our_code_agrees_with_the_reference_and_transformers(tmp_path, name):
    """Red if TransformersLayer masks nothing, or reads another layer."""
    make(tmp_path / "hf", **SHAPE, **CONFIGS[name])
    weights = weights_of(tmp_path / "hf")
    comparison = compare(weights, weights, tokens=8, transformers=True)
    assert comparison.first_diverging is None
    assert all(result.theirs is not None for result in comparison.layers[1:-1])


# ---------------------------------------------------------------------------------------------
# Our code made wrong
# ---------------------------------------------------------------------------------------------


def without_scale(q, *rest):
    return SELF_ATTENTION(q * q.shape[-1] ** 0.5, *rest)


def tiled(q, *rest):
    """Head h with kv head h % 2, by giving each head to the other group."""
    order = jnp.array([0, 2, 1, 3])
    return SELF_ATTENTION(q[:, :, order], *rest)[:, :, order]


def neighbours(x, cos, sin):
    turned = ROTATE(jnp.concatenate([x[..., 0::2], x[..., 1::2]], -1), cos, sin)
    return jnp.stack(jnp.split(turned, 2, -1), -1).reshape(x.shape)


def other_eps(x, scale, eps):
    return RMS_NORM(x, scale, 1e-3)


def no_residual(self, x, attended):
    return FINISH(self, jnp.zeros_like(x), attended)


SELF_ATTENTION, ROTATE, RMS_NORM = ours.self_attention, rope.rotate, ours.rms_norm
FINISH = block.Block.finish
MISTAKES = {
    "scale": ([(ours, "self_attention", without_scale)], "scores", "attention scale is missing"),
    "heads": ([(ours, "self_attention", tiled)], "scores", "reads kv head h % K"),
    "rope": ([(rope, "rotate", neighbours)], "rope_q", "neighbours are rotated, not halves"),
    "eps": (
        [(ours, "rms_norm", other_eps), (block, "rms_norm", other_eps)],
        "attention_norm",
        "eps is 0.001, not 1e-05",
    ),
    "residual": ([(block.Block, "finish", no_residual)], "residual", None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_our_code_is_named(model, monkeypatch, mistake):
    """Red if `compute` runs the reference's operation, `layer` is not compared, or `_mistakes`
    leaves this one out."""
    patches, operation, note = MISTAKES[mistake]
    for where, name, wrong in patches:
        monkeypatch.setattr(where, name, wrong)
    lines = []
    report = parity(model, model, tokens=8, say=lines.append)
    assert report.comparison.first_diverging == (0, operation)
    assert not report.same and not report.findings  # the weights are right
    assert any(line.startswith("verdict: NOT") for line in lines)
    if note:
        assert any(note in line for line in lines), lines
        assert note in report.comparison.layers[1].notes[0]


def test_transformers_disagreeing_is_seen(model, monkeypatch):
    """Red if the layer of transformers is run and not compared."""
    from lemur_jax.convert.parity import transformers_layer

    report = parity(model, model, tokens=8, transformers=True, say=lambda line: None)
    assert report.same
    monkeypatch.setattr(transformers_layer.np, "where", lambda mask, a, b: mask * 0.0)  # no mask
    layer = transformers_layer.TransformersLayer(weights_of(model), sample_positions_of(model))
    monkeypatch.undo()
    monkeypatch.setattr("lemur_jax.convert.parity.compare.TransformersLayer", lambda *_: layer)
    report = parity(model, model, tokens=8, transformers=True, say=lambda line: None)
    assert report.comparison.first_diverging == (0, "transformers")


def sample_positions_of(path):
    return sample_positions(open_source(path).config, 8)


def test_transformers_that_is_not_installed(model, monkeypatch):
    """Red if its absence is silent or an ImportError."""

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConversionError, match="--transformers needs torch, which is not installed"):
        parity(model, model, tokens=8, transformers=True, say=lambda line: None)


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [8, 16, 33, 64])
@pytest.mark.parametrize("max_positions", [64, 4096, 131072])
def test_positions_reach_beyond_the_length(tokens, max_positions):
    """Red if positions repeat, or end at the number of tokens."""
    positions = sample_positions(config(max_positions=max_positions), tokens)
    assert positions.shape == (2, tokens)
    assert (np.diff(positions, axis=1) > 0).all() and (positions[:, 0] == 0).all()
    last = max(max_positions, 4096)
    assert positions[:, -1].tolist() == [last - 1, 2 * last - 1]
    assert ((positions > 100) & (positions < last // 2)).any()


def config(**fields):
    small = {"vocab_size": 100, "embed": 8, "mlp": 8, "layers": 1, "heads": 2, "kv_heads": 2}
    return ModelConfig(**small, head_dim=4, rope=RopeConfig(theta=1e4), norm_eps=1e-5, **fields)


def test_kl_by_blocks_is_kl():
    """Red if the cross term is not shrunk with the largest logit, or KL runs the other way."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 8, (2, 5, 97))
    a[:, 90] += 60  # the largest logit comes last
    total = OnlineKL((5,))
    for start in (0, 13, 64):
        stop = {0: 13, 13: 64, 64: 97}[start]
        total.add(a[:, start:stop], b[:, start:stop])
    found = total.result()
    p, q = (torch.log_softmax(torch.from_numpy(x), -1) for x in (a, b))
    expected = (p.exp() * (p - q)).sum(-1).numpy()
    assert found.kl == pytest.approx(expected.mean(), rel=1e-9)
    assert found.kl_max == pytest.approx(expected.max(), rel=1e-9)
    assert found.max_abs == np.abs(a - b).max()
    assert found.same_choice == (a.argmax(-1) == b.argmax(-1)).mean()


def test_the_plan_knows_a_70b_model():
    """Red if the plan holds two layers, or float64 of a whole matrix: more than 8 GB. The figure
    measured on CPU is 3.74 GiB (tools/benchmarks/parity.py, two layers)."""
    large = ModelConfig(
        vocab_size=32000, embed=8192, mlp=28672, layers=80, heads=64, kv_heads=8, head_dim=128,
        max_positions=4096, rope=RopeConfig(theta=1e4), norm_eps=1e-5,
    )  # fmt: skip

    class Shapes:
        config = large

        def dtype(self, name):
            return np.dtype("float16")

    a, b = of_source(Shapes()), of_source(Shapes())
    assert 3.5 * 2**30 < peak_bytes(a, b, 16) < 5.5 * 2**30
    assert a.nbytes() == 2 * 68_976_648_192


# ---------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------


def test_every_format_against_hf(tmp_path, capsys):
    """Red if Meta's k is un-permuted with the heads of q, or rows of the head are not transposed
    for our own checkpoints."""
    tensors = tiny_hf.weights()
    hf = tiny_hf.write(tmp_path / "hf", tensors)
    twins = {
        "bin": foreign.write_bin(tmp_path / "bin", tensors, torch),
        "meta": foreign.write_meta(tmp_path / "meta", tensors, torch=torch),
        "easylm": foreign.write_easylm(tmp_path / "easylm", tensors),
    }
    import_hf(hf, tmp_path / "lemur")
    twins["lemur"] = tmp_path / "lemur"
    for name, path in twins.items():
        flags = ["--tokens=8", *(["--max_positions=64"] if name == "meta" else [])]
        assert cli.main(["convert", "parity", str(hf), str(path), *flags]) == 0, name
        assert "verdict: the same" in capsys.readouterr().out


def test_meta_weights_under_hf_names(tmp_path):
    """The commonest mistake of all: Meta's tensors renamed. Red if one of the two is not named."""
    tensors = tiny_hf.weights()
    right = tiny_hf.write(tmp_path / "right", tensors)
    meta, renamed = foreign.meta_weights(tensors), dict(tensors)
    for layer in range(2):
        for theirs, name in foreign.META_NAMES.items():
            renamed[f"model.layers.{layer}.{theirs}"] = meta[f"layers.{layer}.{name}"]
    wrong = tiny_hf.write(tmp_path / "wrong", renamed)
    report = parity(right, wrong, tokens=8, say=lambda line: None)
    assert [s.text for s in report.findings] == [
        "q_proj of every layer is interleaved (Meta layout)",
        "k_proj of every layer is interleaved (Meta layout)",
    ]
    # The other way round: HF's rows in Meta's file.
    report = parity(
        foreign.write_meta(tmp_path / "meta", tensors, torch=torch), right, tokens=8,
        max_positions=64, say=lambda line: None,
    )  # fmt: skip
    assert report.same


def test_a_config_that_says_less_is_only_noted(tmp_path):
    """Red if another max_position_embeddings is a fault where RoPE does not depend on it."""
    right = tiny_hf.write(tmp_path / "right")
    longer = tiny_hf.CONFIG | {"max_position_embeddings": 128}
    wrong = tiny_hf.write(tmp_path / "long", config=longer)
    report = parity(right, wrong, tokens=8, say=lambda line: None)
    assert report.same and [s.kind for s in report.findings] == ["max_position_embeddings"]


def test_variants_of_a_config_are_told_apart():
    """Red if a difference of rope scaling is taken for one of theta."""
    from lemur_jax.convert.parity.configs import differences

    a = config(max_positions=64)
    b = dataclasses.replace(a, rope=RopeConfig(theta=1e4, kind="linear", factor=2.0))
    assert [f.kind for f in differences(a, b)] == ["rope_scaling"]
    b = dataclasses.replace(a, rope=RopeConfig(theta=2e4), norm_eps=1e-6)
    assert {f.kind for f in differences(a, b)} == {"rope_theta", "rms_norm_eps"}
