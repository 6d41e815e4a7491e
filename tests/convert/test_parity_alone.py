"""A model with no twin: what a text says about it (facts: test_parity_facts.py).

The text of these tests is sampled from the healthy model by transformers, so the healthy weights
are the ones that it is likeliest under, and every mistake makes it unlikelier.
"""

import json
import math
import shutil

import numpy as np
import pytest
from hf_models import make, torch

safe = pytest.importorskip("safetensors.torch", reason="files are written by safetensors itself")

from lemur_jax import cli  # noqa: E402
from lemur_jax.convert.model import open_source  # noqa: E402
from lemur_jax.convert.parity import alone, likelihood  # noqa: E402
from lemur_jax.convert.parity.candidates import AS_IT_IS, candidates  # noqa: E402
from lemur_jax.convert.parity.likelihood import losses  # noqa: E402
from lemur_jax.convert.parity.weights import of_source  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 8, 2, 16, 2
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": LAYERS,
    "vocab_size": 101,
    "max_position_embeddings": 512,
}
ALL = tuple(range(LAYERS))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model and a text of its own."""
    directory = tmp_path_factory.mktemp("alone") / "good"
    model = make(directory, **SHAPE)
    torch.manual_seed(1)
    tokens = torch.zeros((1, 1), dtype=torch.long)
    with torch.no_grad():
        tokens = model.generate(
            tokens, max_new_tokens=200, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None
        )
    return directory, tokens[0].numpy()


def of(path):
    return of_source(open_source(path))


def damaged(directory, to, fault):
    shutil.copytree(directory, to)
    weights = safe.load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    fault(weights, config)
    copies = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    safe.save_file(copies, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
    return of(to)


def every(name):
    return [f"model.layers.{layer}.{name}.weight" for layer in ALL]


def to_meta(weight, heads):
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_hf(weight, heads):
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def q(w, c):
    for name in every("self_attn.q_proj"):
        w[name] = to_meta(w[name], HEADS)


def k_as_q(w, c):
    for name in every("self_attn.k_proj"):
        w[name] = to_hf(to_meta(w[name], KV_HEADS), HEADS)


def both(w, c):
    q(w, c)
    for name in every("self_attn.k_proj"):
        w[name] = to_meta(w[name], KV_HEADS)


def tiled(w, c):
    for name in every("self_attn.q_proj"):
        grouped = w[name].view(KV_HEADS, HEADS // KV_HEADS, HEAD_DIM, -1)
        w[name] = grouped.transpose(0, 1).reshape(w[name].shape)


def gate_up(w, c):
    for gate, up in zip(every("mlp.gate_proj"), every("mlp.up_proj")):
        w[gate], w[up] = w[up], w[gate]


def down(w, c):
    for name in every("mlp.down_proj"):
        w[name] = w[name].T


def theta(w, c):
    c["rope_parameters"]["rope_theta"] = 500000.0


def row(w, c):
    w["model.embed_tokens.weight"] = torch.roll(w["model.embed_tokens.weight"], 1, 0)


def two(w, c):
    q(w, c)
    gate_up(w, c)


FAULTS = {
    q: [("interleaved", "layers/wq", "is interleaved (Meta layout)")],
    k_as_q: [("wrong_heads", "layers/wk", "with 8 heads in place of 2")],
    both: [("interleaved", "layers/wq+layers/wk", "are interleaved (Meta layout)")],
    tiled: [("tiled_heads", "layers/wq", "tile order (head h for kv head h % 2)")],
    gate_up: [("swapped", "layers/w_gate+layers/w_up", "are swapped")],
    down: [("transposed", "layers/w_down", "is transposed")],
    theta: [("rope_theta", "rope_theta", "is 500000, it should be 10000")],
    row: [("shifted_rows", "table", "belongs in row i - 1")],
    two: [
        ("interleaved", "layers/wq", "is interleaved"),
        ("swapped", "layers/w_gate+layers/w_up", "are swapped"),
    ],
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_text_tells_what_is_wrong(teacher, tmp_path, fault):
    """Red if a cure applies the order itself in place of its inverse, `__add__` forgets the first
    of two, or a candidate is left out."""
    good, tokens = teacher
    verdict = alone.by_text(damaged(good, tmp_path / "bad", fault), tokens)
    named = {(f.kind, f.subject) for f in verdict.findings}
    assert named == {(kind, subject) for kind, subject, _ in FAULTS[fault]}, verdict.lines
    for kind, _, words in FAULTS[fault]:
        text = next(f.what for f in verdict.findings if f.kind == kind)
        assert words in text and "standard errors)" in text


def test_a_healthy_model_is_left_in_peace(teacher):
    """Red if a gain smaller than _MARGIN is named, or differences of epsilon are."""
    good, tokens = teacher
    verdict = alone.by_text(of(good), tokens)
    assert verdict.findings == []
    assert "none of" in verdict.lines[0] and "makes it likelier" in verdict.lines[0]
    assert any(
        "undecided by this text" in line and "rms_norm_eps" in line for line in verdict.lines
    )


def test_an_untrained_model_is_not_judged(teacher):
    """Red if the best of many bad explanations is named: a text that the model has not learnt."""
    good, _ = teacher
    tokens = np.random.default_rng(0).integers(0, 101, 200)
    verdict = alone.by_text(of(good), tokens)
    assert verdict.findings == []
    assert verdict.lines[-1].startswith("undecided:") and "makes it learnt" in verdict.lines[-1]


def test_less_bad_is_not_good(teacher, monkeypatch):
    """Red if a mistake is named whose cure leaves the model worse than guessing."""
    weights = of(teacher[0])
    rounds = []

    def fake(weights, tokens, tried, each_layer):
        nats = np.full((len(tried), 100), 6.1)
        nats[0] = 5.0 if rounds else 6.0
        nats[1] = 5.0
        rounds.append(len(tried))
        return nats + np.random.default_rng(0).normal(0, 0.01, nats.shape)

    monkeypatch.setattr(alone, "losses", fake)
    verdict = alone.by_text(weights, np.arange(101))
    assert len(rounds) == 2 and verdict.findings == []
    assert "nothing is named" in verdict.lines[-1]


def test_what_cannot_be_told_apart_is_said(teacher, monkeypatch):
    """Red if the first of two equally good mistakes is named as if it were certain."""
    good, tokens = teacher
    real = alone.candidates

    def twice(config):
        found = real(config)
        return [*found, *(c for c in found if c.kind == "swapped" and "gate" in c.subject)]

    weights = damaged(good, good.parent / "ambiguous", gate_up)
    monkeypatch.setattr(alone, "candidates", twice)
    verdict = alone.by_text(weights, tokens)
    assert [f.kind for f in verdict.findings] == ["ambiguous"]
    assert verdict.findings[0].what.count("gate_proj and up_proj are swapped") == 2


def test_losses_are_those_of_transformers(teacher, monkeypatch):
    """Red if the target is the same token and not the next, or the last row of a block is left
    out."""
    good, tokens = teacher
    monkeypatch.setattr(likelihood, "_BLOCK_ELEMENTS", 10 * SHAPE["hidden_size"])  # ten rows
    weights = of(good)
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(good).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None]).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(tokens[1:]), reduction="none"
        )
    found = losses(weights, tokens, [AS_IT_IS])
    assert np.abs(found[0] - expected.numpy()).max() < 2e-3
    assert found[0].mean() < math.log(101) - 1  # the teacher's text is no noise to it


def test_every_candidate_computes_something_else(teacher):
    """Red if a candidate does nothing: it could never be found."""
    good, tokens = teacher
    weights = of(good)
    tried = candidates(weights.config)
    nats = losses(weights, tokens[:64], [AS_IT_IS, *tried])
    for candidate, row in zip(tried, nats[1:]):
        assert np.abs(row - nats[0]).max() > 1e-6, candidate


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


def test_without_a_tokenizer_nothing_is_guessed(teacher, capsys):
    """Red if another tokenizer is taken, or the lack of one is silent."""
    assert cli.main(["convert", "parity", str(teacher[0]), "--tokens=8"]) == 0
    out = capsys.readouterr().out
    assert "alone: no text can be judged" in out and "verdict: no fault found" in out
    assert f"{teacher[0]} holds neither tokenizer.model nor tokenizer.json" in out


def test_with_a_tokenizer(tiny_data, tmp_path, capsys):
    """Red if the tokenizer's files are not found, or an untrained model is judged by its text."""
    make(tmp_path / "hf", **(SHAPE | {"vocab_size": 512, "initializer_range": 0.02}))
    for file in (tiny_data.parent / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "hf" / file.name)
    text = tmp_path / "text.txt"
    text.write_text(alone.PASSAGE)
    argv = ["convert", "parity", str(tmp_path / "hf"), "--tokens=8", f"--text={text}"]
    assert cli.main(argv) == 0
    assert "alone: undecided" in capsys.readouterr().out
    assert cli.main([*argv[:-1], "--text=nowhere"]) == cli.EXIT_BAD_INPUT
    assert "--text=nowhere is not a file" in capsys.readouterr().err
