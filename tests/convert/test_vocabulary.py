"""Added tokens: old rows bit for bit, new rows as asked, and a tokenizer that knows them."""

import json
import shutil

import numpy as np
import pytest
import tiny_hf

from lemur_jax import checkpoint
from lemur_jax.config import model_config
from lemur_jax.convert.convert import convert
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.model import open_source
from lemur_jax.convert.options import Options
from lemur_jax.convert.verify import verify
from lemur_jax.convert.vocabulary import CHATML
from lemur_jax.data import tokenizer_files
from lemur_jax.data.tokenizer import Tokenizer

TEXT = "def read_lines(path):\n    return [line for line in open(path)]\nwords and other pieces\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "t"
    tokenizer_files.train([TEXT * 40], directory, vocab_size=300)
    return directory


def model(directory, tokenizer, rows=300, dtype="bfloat16", **config):
    """A tiny model with `rows` rows and the tokenizer of 300 pieces."""
    rng = np.random.default_rng(1)
    weights = tiny_hf.weights(dtype)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = rng.normal(1, 1, (rows, 16)).astype(weights[name].dtype)
    config = tiny_hf.CONFIG | {"vocab_size": rows, "torch_dtype": dtype, "eos_token_id": 2} | config
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    tiny_hf.write(directory, weights, config)
    for path in tokenizer.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return weights


@pytest.mark.parametrize("new_rows", ["mean", "zeros"])
@pytest.mark.parametrize("to", ["hf", "lemur", "easylm"])
def test_new_rows(tmp_path, tokenizer, new_rows, to):
    """Red when the mean is of the padded rows, is left in float32, or the head's columns are not
    extended."""
    weights = model(tmp_path / "hf", tokenizer)
    options = Options(to=to, add_tokens=CHATML, new_rows=new_rows)
    convert(tmp_path / "hf", tmp_path / "o", options)
    found = open_source(tmp_path / "o")
    assert found.config.vocab_size == 305
    for ours, theirs in (("table", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        rows = found.read(ours)
        rows = rows if ours == "table" else rows.T
        old = weights[theirs]
        assert rows[:300].tobytes() == old.tobytes()
        mean = old.astype(np.float64).mean(0) if new_rows == "mean" else np.zeros(16)
        for row in rows[300:305]:
            assert row.tobytes() == mean.astype(old.dtype).tobytes()
        assert not rows[305:].astype(np.float32).any()
    assert (
        found.read("layers/wq").tobytes()
        == open_source(tmp_path / "hf").read("layers/wq").tobytes()
    )


@pytest.mark.parametrize(
    ("before", "asked", "after"),
    [(300, None, 305), (300, 324, 324), (324, None, 324), (324, 305, 305), (303, None, 305)],
)
def test_any_row_count(tmp_path, tokenizer, before, asked, after):
    """Red when rows that exist are overwritten, or spare ones cannot be cut (32024 -> 32005)."""
    weights = model(tmp_path / "hf", tokenizer, before)
    options = Options(to="hf", add_tokens=CHATML, vocab_size=asked, new_rows="zeros")
    convert(tmp_path / "hf", tmp_path / "o", options)
    found = open_source(tmp_path / "o")
    rows, old = found.read("table")[:after], weights["model.embed_tokens.weight"]
    kept = min(before, after)
    assert found.config.vocab_size == after
    assert rows[:kept].tobytes() == old[:kept].tobytes()
    assert not rows[kept:].astype(np.float32).any()
    ids = Tokenizer.load(tmp_path / "o").added_tokens
    assert {token: ids[token] for token in CHATML} == dict(zip(CHATML, range(300, 305)))


def test_through_a_checkpoint_and_back(tmp_path, tokenizer):
    """Red when the padding to 128 reaches the export, or the checkpoint forgets the new size."""
    model(tmp_path / "hf", tokenizer)
    convert(tmp_path / "hf", tmp_path / "direct", Options(to="hf", add_tokens=CHATML))
    step_dir = convert(tmp_path / "hf", tmp_path / "ours", Options(to="lemur", add_tokens=CHATML))
    manifest = checkpoint.describe(step_dir)
    assert model_config(manifest.about["model"]).vocab_size == 305
    assert manifest.about["hf_extras"]["config"]["vocab_size"] == 305
    assert manifest.arrays["params/table"].shape == (384, 16)
    convert(step_dir, tmp_path / "back", Options(to="hf"))
    assert verify(tmp_path / "direct", tmp_path / "back") == []
    assert tiny_hf.read_all(tmp_path / "direct") == tiny_hf.read_all(tmp_path / "back")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        one, other = (json.loads((tmp_path / d / name).read_text()) for d in ("direct", "back"))
        assert one == other


def test_generation_stops_at_the_end_of_a_turn(tmp_path, tokenizer):
    """Red when generation_config.json keeps </s> alone, carried or made."""
    model(tmp_path / "hf", tokenizer)
    for carried in (None, {"eos_token_id": 2, "temperature": 0.5}):
        if carried is not None:
            (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(carried))
        out = tmp_path / f"o{carried is None}"
        convert(tmp_path / "hf", out, Options(to="hf", add_tokens=CHATML))
        written = json.loads((out / "generation_config.json").read_text())
        assert written["eos_token_id"] == [302, 2] and written["pad_token_id"] == 300
        assert written.get("temperature") == (carried or {}).get("temperature")
        convert(out, tmp_path / "again", Options(to="hf", add_tokens=CHATML, dtype="float32"))
        again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
        assert again == written
        shutil.rmtree(tmp_path / "again")


def test_a_tied_head(tmp_path, tokenizer):
    """Red when a tied model gets a head."""
    model(tmp_path / "hf", tokenizer, tie_word_embeddings=True)
    convert(tmp_path / "hf", tmp_path / "o", Options(to="hf", add_tokens=("<a>",)))
    assert "lm_head.weight" not in tiny_hf.read_all(tmp_path / "o")
    assert open_source(tmp_path / "o").config.vocab_size == 301


def test_transformers_agrees(tmp_path, tokenizer):
    """Red when tokenizer.json and added_tokens_decoder give a token different ids."""
    transformers = pytest.importorskip("transformers", reason="the reference (extra: test)")
    tokenizer_copy = tmp_path / "t"
    tokenizer_copy.mkdir()
    for path in tokenizer.iterdir():
        (tokenizer_copy / path.name).write_bytes(path.read_bytes())
    tokenizer_files.write_hf_files(tokenizer_copy)
    model(tmp_path / "hf", tokenizer_copy)
    convert(tmp_path / "hf", tmp_path / "o", Options(to="hf", add_tokens=CHATML))
    spec = json.loads((tmp_path / "o" / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    assert [ids[token] for token in CHATML] == list(range(300, 305))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "o")
    assert theirs.convert_tokens_to_ids(list(CHATML)) == list(range(300, 305))
    assert theirs("<|im_start|>x<|im_end|>", add_special_tokens=False).input_ids[0] == 301
    assert theirs.pad_token == "<pad>" and len(theirs) == 305
    network = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "o")
    assert network.get_input_embeddings().weight.shape == (305, 16)
    assert network.generation_config.eos_token_id == [302, 2]


def test_what_cannot_be_added(tmp_path, tokenizer):
    """Red when a token's id lies outside of the table, or a token comes twice."""
    model(tmp_path / "hf", tokenizer)
    with pytest.raises(
        ConversionError, match=r"--vocab_size=302 is too small.*'<\|diff_marker\|>'"
    ):
        convert(
            tmp_path / "hf", tmp_path / "o", Options(to="hf", add_tokens=CHATML, vocab_size=302)
        )
    with pytest.raises(ConversionError, match="each token once"):
        convert(tmp_path / "hf", tmp_path / "o", Options(to="hf", add_tokens=("a", "a")))
    with pytest.raises(ConversionError, match="--new_rows=ones is unknown"):
        convert(
            tmp_path / "hf", tmp_path / "o", Options(to="hf", add_tokens=("a",), new_rows="ones")
        )


def test_fewer_rows_than_the_tokenizer_has_ids(tmp_path, tokenizer):
    """Red when only --add_tokens looks at the tokenizer: `--vocab_size=200` cut rows in use."""
    model(tmp_path / "hf", tokenizer, 320)
    with pytest.raises(ConversionError, match=r"--vocab_size=299 is too small: token .* id 299"):
        convert(tmp_path / "hf", tmp_path / "o", Options(to="hf", vocab_size=299))
    said = []
    convert(tmp_path / "hf", tmp_path / "o", Options(to="hf", vocab_size=300), say=said.append)
    assert "cuts the last 20 of 320 rows; the tokenizer has 300 ids" in said[0]
