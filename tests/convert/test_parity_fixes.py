"""What a user is told to do about a config that differs: it must be possible, and help."""

import json

import pytest
from hf_models import edit_json, make, torch
from parity_faults import SHAPE, damaged, safe, save

from lemur_jax import cli
from lemur_jax.convert.parity import parity


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fixes") / "good"
    make(directory, **SHAPE)
    return directory


def faults(report):
    return [(s.kind, s.subject, s.layers) for s in report.findings if s.fault]


OLD = {"rope_theta": 10000.0, "rope_scaling": None}
LINEAR = {"rope_type": "linear", "factor": 2.0}
EDITS = {
    "eps": ({}, {"rms_norm_eps": 1e-3}),
    "activation": ({}, {"hidden_act": "gelu"}),
    "theta": ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "theta of v4": (OLD, OLD | {"rope_theta": 5e5}),
    "scaling": ({}, {"rope_parameters": LINEAR | {"rope_theta": 10000.0}}),
    "scaling of v4": (OLD, OLD | {"rope_scaling": LINEAR}),
    "no scaling": ({"rope_parameters": LINEAR | {"rope_theta": 5e5}}, {}),
    "no scaling in v4": (OLD | {"rope_scaling": LINEAR}, OLD),
    "heads": ({}, {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edit_that_is_advised_mends_it(good, tmp_path, case):
    """Red if a fix names a key that the config does not use, or a value that is refused."""
    for name, changes in zip(("right", "wrong"), EDITS[case]):
        content = json.loads((good / "config.json").read_text())
        if "rope_theta" in changes:
            del content["rope_parameters"]
        save(tmp_path / name, good, safe.load_file(good / "model.safetensors"), content | changes)
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    report = parity(right, wrong, tokens=8, say=lambda line: None)
    assert faults(report)

    def follow(config):
        for finding in report.findings:
            key, _, rest = finding.fix.removeprefix("set ").partition(" to ")
            value, _, file = rest.rpartition(" in ")
            assert file == "config.json", finding.fix
            *outer, key = key.split(".")
            (config[outer[0]] if outer else config)[key] = json.loads(value)

    edit_json(wrong / "config.json", follow)
    report = parity(right, wrong, tokens=8, say=lambda line: None)
    assert report.same and not report.findings


def test_no_edit_is_advised_that_would_be_refused(good, tmp_path):
    """Red if sizes that the tensors have, or rows, are to be set in config.json."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    make(tmp_path / "other", **(SHAPE | sizes))
    lines = []
    report = parity(good, tmp_path / "other", say=lines.append)
    fixes = {s.kind: s.fix for s in report.findings}
    assert set(fixes) == set(sizes)
    assert all("none by an edit" in fix for fix in fixes.values())
    assert "different shapes" in lines[-1]
    make(tmp_path / "short", **(SHAPE | {"num_hidden_layers": 3}))
    (finding,) = parity(good, tmp_path / "short", say=lambda line: None).findings
    assert "1 of 4 layers are missing" in finding.fix

    def untied_once(w, c):
        del w["lm_head.weight"]
        c["tie_word_embeddings"] = True

    report = parity(*damaged(good, tmp_path, untied_once), tokens=8, say=lambda line: None)
    (fix,) = [s.fix for s in report.findings if s.kind == "tie_word_embeddings"]
    assert fix.startswith("write it again with the lm_head")


def test_rows_of_padding_are_cut_as_advised(good, tmp_path):
    """Red if the advice is an edit of vocab_size, which convert refuses."""

    def pad(w, c):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            w[name] = torch.cat([w[name], torch.zeros(19, w[name].shape[1])])
        c["vocab_size"] += 19

    right, padded = damaged(good, tmp_path, pad)
    (note,) = parity(right, padded, tokens=8, say=lambda line: None).findings
    command = note.fix.partition("lemur ")[2].split()
    places = {"MODEL": str(padded), "NEW": str(tmp_path / "cut")}
    assert cli.main([places.get(word, word) for word in command]) == 0
    report = parity(right, tmp_path / "cut", tokens=8, say=lambda line: None)
    assert report.same and "vocab_size" not in {s.kind for s in report.findings}


def test_a_checkpoint_of_ours_is_not_to_be_edited(good, tmp_path):
    """Red if the user is sent to a config.json that is not there."""
    assert cli.main(["convert", str(good), str(tmp_path / "ours")]) == 0
    _, other = damaged(good, tmp_path, lambda w, c: c.update(rms_norm_eps=1e-3))
    (finding,) = parity(other, tmp_path / "ours", tokens=8, say=lambda line: None).findings
    assert finding.fix == "convert it again from a source that says rms_norm_eps=0.001"
