"""Rules are exact inverses, and completeness reports every problem at once."""

import dataclasses

import numpy as np
import pytest

from lemur_jax.config import ModelConfig, RopeConfig
from lemur_jax.convert import tables
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.rules import Found, Rule, check_complete
from lemur_jax.model import param
from lemur_jax.model.decoder import abstract

CONFIG = ModelConfig(
    vocab_size=101,
    embed=20,
    mlp=28,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=4,
    max_positions=64,
    rope=RopeConfig(theta=1e4),
    norm_eps=1e-5,
    attention_bias=True,
    mlp_bias=True,
)
TABLE = tables.hf_llama(CONFIG)
LEAVES = {name: leaf.shape for name, leaf in param.flatten(abstract(CONFIG)).items()}
SOURCES = [
    Found(name, rule.their_shape(CONFIG), "f.safetensors")
    for rule in TABLE
    for name in rule.source_names(CONFIG)
]


def problems_of(rules=TABLE, leaves=LEAVES, sources=SOURCES):
    with pytest.raises(ConversionError) as caught:
        check_complete(rules, CONFIG, leaves, sources)
    return caught.value.problems


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_the_table_is_the_model(tied, biases):
    """Red when a row of the table is deleted or a weight is added to the model without one."""
    config = dataclasses.replace(
        CONFIG, tie_embeddings=tied, attention_bias=biases, mlp_bias=biases
    )
    table = tables.hf_llama(config)
    leaves = {name: leaf.shape for name, leaf in param.flatten(abstract(config)).items()}
    assert {rule.ours: rule.our_shape(config) for rule in table} == leaves
    assert len(table) == 12 - tied + 7 * biases


@pytest.mark.parametrize("rule", TABLE, ids=lambda rule: rule.ours)
def test_there_and_back_is_the_identity(rule):
    """Red when `to_theirs` keeps padding rows or does not reverse the pattern."""
    array = np.random.default_rng(0).normal(size=rule.their_shape(CONFIG)).astype(np.float32)
    ours = rule.to_ours(array, CONFIG)
    assert ours.shape == rule.our_shape(CONFIG)[1 if rule.stacked else 0 :]
    back = rule.to_theirs(ours, CONFIG)
    assert back.tobytes() == array.tobytes() and back.shape == array.shape


def test_heads_are_split_the_way_torch_reshapes():
    """Red when wq's pattern is '(d h) e -> e h d': exact both ways, and wrong."""
    array = np.arange(24 * 20, dtype=np.float32).reshape(24, 20)
    (wq,) = (rule for rule in TABLE if rule.ours == "layers/wq")
    expected = array.reshape(6, 4, 20).transpose(2, 0, 1)
    assert np.array_equal(wq.to_ours(array, CONFIG), expected)


def test_padding_rows_are_zero():
    """Red when padding repeats the last row: padded logits would not be a constant cost."""
    (head,) = (rule for rule in TABLE if rule.ours == "head")
    ours = head.to_ours(np.ones((101, 20), np.float32), CONFIG)
    assert ours.shape == (20, 128)
    assert np.all(ours[:, :101] == 1) and np.all(ours[:, 101:] == 0)


def test_complete_sources_pass():
    """Red when completeness invents a problem."""
    check_complete(TABLE, CONFIG, LEAVES, SOURCES)


def test_unmatched_tensor():
    """Red when a tensor without a rule is skipped."""
    extra = Found("model.layers.2.mlp.up_proj.weight", (28, 20), "g.safetensors")
    (problem,) = problems_of(sources=[*SOURCES, extra])
    for word in ("unmatched", extra.name, "[28, 20]", "g.safetensors", "num_hidden_layers=2"):
        assert word in problem


def test_unfilled_leaf():
    """Red when a leaf without its tensor stays random."""
    gone = "model.layers.1.self_attn.k_proj.weight"
    (problem,) = problems_of(sources=[s for s in SOURCES if s.name != gone])
    for word in ("'layers/wk'", "not filled", gone, "[8, 20]"):
        assert word in problem


def test_leaf_filled_twice_by_two_files():
    """Red when the second of two tensors of one name wins."""
    again = Found("model.norm.weight", (20,), "g.safetensors")
    (problem,) = problems_of(sources=[*SOURCES, again])
    for word in ("'norm'", "filled twice", "f.safetensors", "g.safetensors"):
        assert word in problem


def test_leaf_filled_twice_by_two_rules():
    """Red when a table may name a leaf in two rows."""
    rules = (*TABLE, Rule("norm", "model.final_norm.weight", "e -> e"))
    sources = [*SOURCES, Found("model.final_norm.weight", (20,), "f.safetensors")]
    (problem,) = problems_of(rules=rules, sources=sources)
    for word in ("'norm'", "filled twice", "model.norm.weight", "model.final_norm.weight"):
        assert word in problem


def test_wrong_shape():
    """Red when shapes are not compared: einops would fail later, without the tensor's name."""
    name = "model.layers.0.self_attn.v_proj.weight"
    sources = [dataclasses.replace(s, shape=(24, 20)) if s.name == name else s for s in SOURCES]
    (problem,) = problems_of(sources=sources)
    for word in ("wrong shape", name, "expected [8, 20]", "found [24, 20]"):
        assert word in problem


def test_a_transposed_square_matrix_is_not_seen_by_shapes_but_wrong_leaves_are():
    """Red when the table's own shape is not compared with the model's leaf."""
    rules = [
        dataclasses.replace(rule, pattern="e f -> e f") if rule.ours == "layers/w_down" else rule
        for rule in TABLE
    ]
    (problem,) = problems_of(rules=rules)
    for word in ("wrong shape of leaf", "'layers/w_down'", "[2, 20, 28]", "(2, 28, 20)"):
        assert word in problem


def test_all_problems_at_once():
    """Red when the first problem is raised alone."""
    sources = [s for s in SOURCES if s.name != "lm_head.weight"]
    sources = [*sources, Found("score.weight", (2, 20), "f"), sources[0]]
    text = "\n".join(problems_of(sources=sources))
    assert "unmatched tensor 'score.weight'" in text
    assert "'head' is not filled" in text and "'table' is filled twice" in text
