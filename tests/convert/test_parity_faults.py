"""Faults put into real Hugging Face files, each of which must be named, and nothing else."""

import json

import pytest
from hf_models import TINY, edit_json, make, torch
from parity_faults import (
    ALL,
    CLOSING,
    FAULTS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    SHAPE,
    WORDS,
    damaged,
    every,
    not_a_number,
    of_layer,
    overflow,
    q_not_permuted,
    safe,
)

from lemur_jax import cli
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.parity import ours, parity


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parity") / "good"
    make(directory, **SHAPE)
    return directory


def faults(report):
    return [(s.kind, s.subject, s.layers) for s in report.findings if s.fault]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_named(good, tmp_path, fault):
    """Red if, say, `head_orders` leaves out the wrong number of heads, `_hypotheses` the other
    tensors of a shape, `_flipped_bit` allows two bits, or `_best` takes the first that explains
    (each was tried)."""
    right, bad = damaged(good, tmp_path, fault, outlier=fault is overflow)
    report = parity(right, bad, tokens=8, say=lambda line: None)
    assert sorted(faults(report)) == sorted(FAULTS[fault])
    assert not report.same
    if fault in WORDS:
        assert any(WORDS[fault] in s.text for s in report.findings), report.findings
    assert all(s.fix for s in report.findings if s.fault)


@pytest.mark.parametrize("fault", CLOSING, ids=lambda fault: fault.__name__)
def test_the_closing_words_fit_the_size(good, tmp_path, fault):
    """Red if _UNRELATED is 0 or _ABSURD is 1e60: random numbers were "trained"."""
    right, bad = damaged(good, tmp_path, fault)
    report = parity(right, bad, tokens=8, say=lambda line: None)
    assert all(CLOSING[fault] in s.fix for s in report.findings), report.findings


def test_the_first_operation_that_differs(good, tmp_path):
    """Red if operations of ours get our own inputs in place of the reference's: then everything
    after v differs too."""
    right, bad = damaged(good, tmp_path, not_a_number)
    report = parity(right, bad, tokens=8, say=lambda line: None)
    assert report.comparison.first_diverging == (0, "v")
    wrong = [[op.name for op in r.ops if op.diverges] for r in report.comparison.layers]
    assert wrong == [[], ["v"], [], [], [], []]


def test_a_healthy_pair_has_no_fault(good, tmp_path, capsys):
    """Red if SLACK is 0.01, or `_round` leaves out dtypes as wide (float16 to bfloat16)."""
    assert cli.main(["convert", "parity", str(good), str(good), "--tokens=8"]) == 0
    out = capsys.readouterr().out
    assert "plan: 4 layers" in out and "verdict: the same" in out and "FAULT" not in out

    def as_dtype(name):
        def cast(w, c):
            w |= {key: tensor.to(getattr(torch, name)) for key, tensor in w.items()}
            c["dtype"] = name

        return cast

    _, half = damaged(good, tmp_path / "float16", as_dtype("float16"))
    for right, to in ((good, "bfloat16"), (half, "bfloat16"), (half, "float32")):
        _, other = damaged(right, tmp_path / f"{right.name}_{to}", as_dtype(to))
        assert cli.main(["convert", "parity", str(right), str(other), "--tokens=8"]) == 0
        out = capsys.readouterr().out
        assert f"note: dtype of the weights is {to}" in out and "FAULT" not in out


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rounding_through_another_dtype_is_a_note(good, tmp_path, capsys, name):
    """Red if values that only lost bits are called damaged, or `_round` asks for the stored dtype
    only: the same numbers stored in 16 bits pass, so they do in 32."""

    def through(w, c):
        w |= {key: tensor.to(getattr(torch, name)).float() for key, tensor in w.items()}

    right, rounded = damaged(good, tmp_path, through)
    assert cli.main(["convert", "parity", str(right), str(rounded), "--tokens=8"]) == 0
    out = capsys.readouterr().out
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 12 and all("is rounded" in note for note in notes)
    assert "verdict: the same but for rounding of weights to 16 bits" in out


def test_less_than_rounding_is_not_rounding(good, tmp_path):
    """Red if small differences are a note though the numbers have more than 16 bits."""

    def noisy(w, c):
        for name in every("mlp.down_proj"):
            w[name] = w[name] * (1 + 1e-3 * torch.randn_like(w[name]).clamp(-3, 3))

    report = parity(*damaged(good, tmp_path, noisy), tokens=8, say=lambda line: None)
    assert faults(report) == [("unexplained", "layers/w_down", ALL)]
    assert not report.same


def test_notes_do_not_excuse_our_code(good, tmp_path, monkeypatch):
    """Red if a note of rounding makes every divergence rounding."""

    def through_bfloat16(w, c):
        w |= {name: tensor.bfloat16().float() for name, tensor in w.items()}

    right, rounded = damaged(good, tmp_path, through_bfloat16)
    attention = ours.self_attention
    monkeypatch.setattr(ours, "self_attention", lambda q, *rest: attention(2 * q, *rest))
    lines = []
    report = parity(right, rounded, tokens=8, say=lines.append)
    assert not faults(report) and not report.same
    assert lines[-1].endswith("'scores' of layer 0, by more than the notes explain")


def test_the_command_says_it(good, tmp_path, capsys):
    """Red if the exit status is 0 in spite of a fault, or the fix is not printed."""
    right, bad = damaged(good, tmp_path, q_not_permuted)
    assert cli.main(["convert", "parity", str(right), str(bad), "--tokens=8"]) == 1
    out = capsys.readouterr().out
    assert "FAULT: q_proj of every layer is interleaved (Meta layout). Fix: permute its rows" in out
    assert "verdict: NOT the same; the first operation that differs is 'q' of layer 0" in out


# ---------------------------------------------------------------------------------------------
# Files that cannot be read
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    make(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


def refused(capsys, good, directory):
    assert cli.main(["convert", "parity", str(good), str(directory)]) == cli.EXIT_BAD_INPUT
    return capsys.readouterr().err


def last_shard(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[-1]
    return directory / shard, [k for k, v in index["weight_map"].items() if v == shard]


def test_a_truncated_file_is_named_with_its_tensors(capsys, good, sharded):
    """Red if `_cut_short` compares ends with the header's length in place of the file's size."""
    shard, _ = last_shard(sharded)
    header = safe.load_file(shard)
    shard.write_bytes(shard.read_bytes()[:-4])
    error = refused(capsys, good, sharded)
    last = max(header)  # transformers writes them in order of name
    assert shard.name in error and last in error
    assert not any(name in error for name in set(header) - {last})
    shard.write_bytes(shard.read_bytes()[:20])
    error = refused(capsys, good, sharded)
    assert f"{shard.name} ends inside its header" in error


def test_a_missing_shard_is_named_with_its_tensors(capsys, good, sharded):
    """Red if `lost_tensors` looks at files that are there only."""
    shard, names = last_shard(sharded)
    shard.unlink()
    error = refused(capsys, good, sharded)
    assert f"{shard.name} is missing; it held" in error
    assert all(name in error for name in names[:1])


@pytest.mark.parametrize(
    "content", ["[" * 10**5, "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1e999}}']
)
def test_an_odd_index_is_one_clear_error(capsys, good, sharded, content):
    """Red if `_ODD` is OSError alone: a traceback in place of the reader's own message."""
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "Traceback" not in refused(capsys, good, sharded)


def test_a_tensor_stored_with_its_axes_exchanged(capsys, good, tmp_path):
    """Red if a reversed shape is not recognised."""
    make(tmp_path / "wide")  # 32 x 48
    file = tmp_path / "wide" / "model.safetensors"
    weights = safe.load_file(file)
    name = of_layer(1, "mlp.down_proj")
    weights[name] = weights[name].T.contiguous()
    safe.save_file(weights, file, metadata={"format": "pt"})
    error = refused(capsys, good, tmp_path / "wide")
    assert f"{name} is stored transposed: {[TINY['intermediate_size'], 32]}" in error


def test_an_index_cannot_lead_elsewhere(capsys, good, sharded):
    """Red if `lost_tensors` follows a path in the index, or trips over odd headers."""
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda c: c["weight_map"].update({"x": "../../etc/passwd", "y": "gone"}))
    error = refused(capsys, good, sharded)
    assert "no plain file name" in error and "passwd is missing" not in error


def test_models_of_different_structure(good, tmp_path):
    """Red if tensors of different shapes are compared."""
    make(tmp_path / "other", **(SHAPE | {"num_hidden_layers": 3}))
    report = parity(good, tmp_path / "other", say=lambda line: None)
    assert faults(report) == [("num_hidden_layers", "num_hidden_layers", ())]
    assert report.comparison is None and not report.same


@pytest.mark.parametrize("order", ["tile", "repeat"])
def test_kv_heads_written_several_times(good, tmp_path, order):
    """Red if the two orders are exchanged."""

    def expand(w, c):
        groups = HEADS // KV_HEADS
        for name in every("self_attn.k_proj") + every("self_attn.v_proj"):
            heads = w[name].view(KV_HEADS, HEAD_DIM, -1)
            if order == "tile":
                heads = heads.repeat(groups, 1, 1)
            else:
                heads = heads.repeat_interleave(groups, 0)
            w[name] = heads.reshape(HEADS * HEAD_DIM, -1)
        c["num_key_value_heads"] = HEADS

    right, other = damaged(good, tmp_path, expand)
    report = parity(right, other, say=lambda line: None)
    heads = [s for s in report.findings if s.subject.startswith("layers/")]
    assert [s.subject for s in heads] == ["layers/wk", "layers/wv"]
    assert {(s.kind, s.fault, s.layers) for s in heads} == {
        ("tiled_heads", True, ALL) if order == "tile" else ("expanded_heads", False, ALL)
    }
    assert not report.same  # the config says another number of heads


@pytest.mark.parametrize("shifted", [False, True])
def test_added_tokens_are_no_fault(good, tmp_path, shifted):
    """Red if models of different vocabularies are not compared, or rows put in front pass."""

    def grow(w, c):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            new = torch.ones(4, w[name].shape[1])
            w[name] = torch.cat([new, w[name]] if shifted else [w[name], new])
        c["vocab_size"] += 4

    right, grown = damaged(good, tmp_path, grow)
    report = parity(right, grown, tokens=8, say=lambda line: None)
    expected = [("shifted_rows", "table", ()), ("shifted_rows", "head", ())] if shifted else []
    assert faults(report) == expected
    assert report.same is not shifted
    back = parity(grown, right, tokens=8, say=lambda line: None)
    assert faults(back) == [("vocab_size", "vocab_size", ()), *expected]


def test_a_head_that_is_tied_or_not(tmp_path):
    """Red if an untied copy of the table is a fault, or a tied head that differs is none."""
    make(tmp_path / "tied", **SHAPE, tie_word_embeddings=True)

    def untie(w, c):
        w["lm_head.weight"] = w["model.embed_tokens.weight"].clone()
        c["tie_word_embeddings"] = False

    tied, untied = damaged(tmp_path / "tied", tmp_path / "same", untie)
    report = parity(tied, untied, tokens=8, say=lambda line: None)
    assert report.same and [s.kind for s in report.findings] == ["tie_word_embeddings"]
    assert not parity(untied, tied, tokens=8, say=lambda line: None).same

    def other_head(w, c):
        untie(w, c)
        w["lm_head.weight"] = w["lm_head.weight"].flip(1)

    report = parity(*damaged(tied, tmp_path / "other", other_head), tokens=8, say=lambda line: None)
    assert [s.subject for s in report.findings if s.fault] == ["head"]
    assert report.comparison.first_diverging == (LAYERS, "head")


def test_a_reference_that_overflows_is_said(good, tmp_path):
    """Red if A's own NaN is blamed on B without a word."""
    _, bad = damaged(good, tmp_path, not_a_number)
    lines = []
    assert not parity(bad, bad, tokens=8, say=lines.append).same
    assert "note: A's own result is not finite from 'v' of layer 0 on" in lines


def test_too_few_tokens(good):
    """Red if 4 tokens are taken though positions cannot be spread over them."""
    with pytest.raises(ConversionError, match="tokens=4 is too few: give at least 8"):
        parity(good, tokens=4)


def test_flags_without_effect_are_refused(good, capsys):
    """Red if --text is ignored where there is a twin, or --max_positions where no model is
    Meta's."""
    for flag, words in (
        ("--text=/nope", "--text=/nope judges one model without a twin"),
        ("--max_positions=1", "--max_positions=1 is for Meta's weights"),
    ):
        argv = ["convert", "parity", str(good), str(good), "--tokens=8", flag]
        assert cli.main(argv) == cli.EXIT_BAD_INPUT
        captured = capsys.readouterr()
        assert words in captured.err and "plan" not in captured.out
