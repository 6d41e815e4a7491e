"""Facts about weights that need no twin: NaN, zeros, constants, copies, flipped bits."""

import math

import numpy as np
import pytest
from hf_models import make, torch
from parity_faults import EMBED, SHAPE, damaged, every

from lemur_jax import cli
from lemur_jax.convert.model import open_source
from lemur_jax.convert.parity import facts
from lemur_jax.convert.parity.weights import of_source


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("facts") / "good"
    make(directory, **SHAPE)
    return directory


def facts_of(path):
    return list(facts.facts(of_source(open_source(path))))


def found_facts(path):
    return [(f.kind, f.subject, f.layer) for f in facts_of(path)]


def test_facts_of_healthy_weights(good, tmp_path):
    """Red if large but usual weights, or biases of zeros, are suspected."""
    assert found_facts(good) == []
    make(tmp_path / "biases", **(SHAPE | {"attention_bias": True, "tie_word_embeddings": True}))

    def no_bias(w, c):
        for name in w:
            if name.endswith("bias"):
                w[name].zero_()

    assert found_facts(damaged(tmp_path / "biases", tmp_path, no_bias)[1]) == []


def test_a_tied_model_has_one_table(tmp_path):
    """Red if the head of a tied model is looked at too: the same fault twice."""
    make(tmp_path / "tied", **(SHAPE | {"tie_word_embeddings": True}))
    _, bad = damaged(tmp_path / "tied", tmp_path, emptied(EMBED))
    assert found_facts(bad) == [("constant", "table", None)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_flipped_exponent_bit_needs_no_twin(good, tmp_path, dtype):
    """Red if the largest element is compared with the mean of rows that it is part of."""

    def flip(w, c):
        w |= {name: tensor.to(getattr(torch, dtype)) for name, tensor in w.items()}
        kind, bit = (torch.int32, 30) if dtype == "float32" else (torch.int16, 14)
        weight = w[every("mlp.up_proj")[1]]
        weight[3, 5] = 0.1
        weight.view(kind)[3, 5] ^= 1 << bit

    path = damaged(good, tmp_path, flip)[1]
    assert found_facts(path) == [("bit_flip", "layers/w_up", 1)]
    (finding,) = facts_of(path)
    assert "[3, 5]" in finding.what


def test_copied_layers_zeros_and_nan(good, tmp_path):
    """Red if only norms are compared, or a row of zeros is overlooked."""

    def copy(w, c):
        for name in [name for name in w if ".layers.1." in name]:
            w[name] = w[name.replace(".1.", ".0.")]

    assert found_facts(damaged(good, tmp_path / "copy", copy)[1]) == [("layer_copied", "layer", 1)]

    def holes(w, c):
        w[every("self_attn.o_proj")[0]][60:] = 0
        w[every("mlp.down_proj")[1]][0, 0] = float("inf")

    assert found_facts(damaged(good, tmp_path / "holes", holes)[1]) == [
        ("zeros", "layers/wo", 0),
        ("not_finite", "layers/w_down", 1),
    ]


def emptied(name, rows=slice(None), value=0):
    def fault(w, c):
        w[name][rows] = value

    return fault


HEAD = "lm_head.weight"
EMPTY = {
    "table": (emptied(EMBED), [("constant", "table", None)]),
    "head": (emptied(HEAD), [("constant", "head", None)]),
    "half of the head": (emptied(HEAD, slice(150, None)), [("zeros", "head", None)]),
    "first half of the table": (emptied(EMBED, slice(0, 150)), [("zeros", "table", None)]),
    "columns of the table": (emptied(EMBED, np.s_[:, 32:]), [("zeros", "table", None)]),
    "final norm": (emptied("model.norm.weight"), [("constant", "norm", None)]),
    "a norm": (emptied(every("input_layernorm")[1]), [("constant", "layers/attention_norm", 1)]),
    "half a norm": (
        emptied(every("input_layernorm")[1], slice(32, None)),
        [("zeros", "layers/attention_norm", 1)],
    ),
    "a matrix": (emptied(every("self_attn.o_proj")[0]), [("constant", "layers/wo", 0)]),
    "columns": (
        emptied(every("mlp.down_proj")[0], np.s_[:, 32:]),
        [("zeros", "layers/w_down", 0)],
    ),
    "one number": (emptied(every("mlp.up_proj")[0], value=0.5), [("constant", "layers/w_up", 0)]),
    "one number in the head": (emptied(HEAD, value=0.5), [("constant", "head", None)]),
    "NaN in the head": (emptied(HEAD, 7, math.nan), [("not_finite", "head", None)]),
    "ones in a norm": (emptied(every("input_layernorm")[1], value=1), []),
}


@pytest.mark.parametrize("case", EMPTY)
def test_zeros_and_constants_need_no_twin(good, tmp_path, case):
    """Red if `facts` looks at the layers' matrices only."""
    fault, expected = EMPTY[case]
    assert found_facts(damaged(good, tmp_path, fault)[1]) == expected
    if expected:
        assert cli.main(["convert", "parity", str(tmp_path / "bad"), "--tokens=8"]) == 1


@pytest.mark.parametrize(
    ("count", "first", "tokens", "expected"),
    [
        (112, 101, None, []),  # padded to a multiple of 16
        (112, 101, 101, []),
        (128, 120, 101, []),
        (101, 96, None, [False]),  # five added tokens: 101 is a multiple of nothing
        (112, 101, 110, [False]),  # the tokenizer knows nine of the rows
        (128, 64, None, [True]),  # half a table
        (112, 96, None, [True]),  # 16 rows are no padding to a multiple of 16
        (32000, 31900, 32000, [True]),
        (32000, 31900, None, []),
        (32000, 31900, 31900, []),
    ],
)
def test_padding_is_no_fault(count, first, tokens, expected):
    """Red if `_empty_rows` ignores the tokenizer, or takes half a table for padding."""
    empty = np.arange(count) >= first
    found = list(facts._empty_rows("head", empty, tokens))
    assert [f.fault for f in found] == expected


def test_a_padding_token_is_a_note():
    """Red if one row of zeros, such as torch gives a padding token, is a fault."""
    empty = np.zeros(400, bool)
    empty[[0, 7]] = True
    (note,) = facts._empty_rows("table", empty, 400)
    assert not note.fault and "2 of its 400 rows (between 0 and 7)" in note.what
