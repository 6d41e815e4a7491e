"""HF -> ours -> HF gives back every bit, name and attribute; transformers reads a trained run."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf

from lemur_jax import checkpoint
from lemur_jax.config import ModelConfig, RopeConfig, model_config
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.hf import export_hf, import_hf
from lemur_jax.convert.recognise import recognise
from lemur_jax.model import param
from lemur_jax.model.decoder import abstract


@pytest.mark.parametrize(
    ("dtype", "shards", "max_shard_bytes"),
    [("float32", 1, 10**9), ("bfloat16", 3, 10**9), ("float16", 1, 4000), ("bfloat16", 2, 2500)],
)
def test_bits_names_and_config_come_back(tmp_path, dtype, shards, max_shard_bytes):
    """Red when a leaf passes through float32, the padding rows are exported (vocabulary 101), or
    two layers are exchanged in `_write_weights`."""
    tensors = tiny_hf.weights(dtype)
    # NaN payloads and signed zeros are bits like any other.
    tensors["model.norm.weight"].view("u4" if dtype == "float32" else "u2")[:2] = [0x7FA1, 0x8000]
    config = tiny_hf.CONFIG | {"torch_dtype": dtype}
    source = tiny_hf.write(tmp_path / "hf", tensors, config, shards=shards)
    import_hf(source, tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", max_shard_bytes=max_shard_bytes)
    assert tiny_hf.read_all(tmp_path / "back") == tiny_hf.read_all(source)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (max_shard_bytes == 10**9)


def test_what_is_stored_says_what_it_is(tmp_path):
    """Red when the dtype is widened on disk or `about` lacks the model."""
    source = tiny_hf.write(
        tmp_path / "hf", tiny_hf.weights("bfloat16"), tiny_hf.CONFIG | {"torch_dtype": "bfloat16"}
    )
    assert recognise(source) == "hf"
    step_dir = import_hf(source, tmp_path / "ours")
    assert recognise(tmp_path / "ours") == recognise(step_dir) == "lemur"
    manifest = checkpoint.describe(step_dir)
    config = model_config(manifest.about["model"])
    assert (config.vocab_size, config.param_dtype, config.dtype) == (101, "bfloat16", "bfloat16")
    assert {entry.dtype for entry in manifest.arrays.values()} == {"bfloat16"}
    assert manifest.arrays["params/table"].shape == (128, 16)
    assert manifest.arrays["params/layers/wk"].shape == (2, 16, 2, 4)


def test_mixed_dtypes_are_kept(tmp_path):
    """Red when all leaves get the dtype of the first: norms are often float32 beside bfloat16."""
    tensors = {
        name: array if "norm" in name else array.astype("bfloat16")
        for name, array in tiny_hf.weights().items()
    }
    source = tiny_hf.write(tmp_path / "hf", tensors)
    import_hf(source, tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    assert tiny_hf.read_all(tmp_path / "back") == tiny_hf.read_all(source)


@pytest.mark.parametrize("side", ["import", "export"])
def test_a_cast_is_made_when_asked_for_and_said(tmp_path, side):
    """Red when `dtype` is ignored, truncates instead of rounding, or config.json keeps the old."""
    source = tiny_hf.write(tmp_path / "hf")
    to_import = "bfloat16" if side == "import" else None
    to_export = "bfloat16" if side == "export" else None
    import_hf(source, tmp_path / "ours", dtype=to_import)
    export_hf(tmp_path / "ours", tmp_path / "back", dtype=to_export)
    found = tiny_hf.read_all(tmp_path / "back")
    for name, array in tiny_hf.weights().items():
        assert found[name] == ("bfloat16", array.shape, array.astype("bfloat16").tobytes())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written == tiny_hf.CONFIG | {"torch_dtype": "bfloat16"}


def test_small_files_travel(tmp_path):
    """Red when a file is dropped from TOKENIZER_FILES or generation_config.json is made anew."""
    source = tiny_hf.write(tmp_path / "hf")
    files = {
        "tokenizer.json": b'{"a": 1}',
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{}",
        "generation_config.json": b'{"temperature": 0.6, "eos_token_id": [2, 7]}',
        "LICENSE.txt": b"Llama",
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    (source / "README.md").write_text("about another directory")
    import_hf(source, tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    for name, content in files.items():
        assert (tmp_path / "back" / name).read_bytes() == content
    assert not (tmp_path / "back" / "README.md").exists()


def test_generation_config_is_made_when_there_is_none(tmp_path):
    """Red when the list of end tokens is cut to one."""
    source = tiny_hf.write(tmp_path / "hf")
    import_hf(source, tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert written == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 7]}


def test_a_tied_head_stored_twice_comes_back_twice(tmp_path):
    """Red when lm_head.weight of a tied model is dropped from the export."""
    tensors = tiny_hf.weights()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    config = tiny_hf.CONFIG | {"tie_word_embeddings": True}
    source = tiny_hf.write(tmp_path / "hf", tensors, config)
    step_dir = import_hf(source, tmp_path / "ours")
    assert "params/head" not in checkpoint.describe(step_dir).arrays
    export_hf(tmp_path / "ours", tmp_path / "back")
    assert tiny_hf.read_all(tmp_path / "back") == tiny_hf.read_all(source)


def test_known_buffers_are_checked_and_dropped(tmp_path):
    """Red when rotary_emb.inv_freq is an unmatched tensor, or is not compared with the config."""
    tensors = tiny_hf.weights()
    for layer in range(2):
        frequencies = (1e4 ** -(np.arange(0, 4, 2) / 4)).astype(np.float32)
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies
    source = tiny_hf.write(tmp_path / "hf", tensors)
    import_hf(source, tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    expected = {n: v for n, v in tiny_hf.read_all(source).items() if "inv_freq" not in n}
    assert tiny_hf.read_all(tmp_path / "back") == expected
    with pytest.raises(ConversionError, match=r"layers\.0.*inv_freq.*rope_theta=500000"):
        tiny_hf.write(tmp_path / "hf", tensors, tiny_hf.CONFIG | {"rope_theta": 5e5})
        import_hf(source, tmp_path / "no")


# ---------------------------------------------------------------------------------------------
# A run of ours
# ---------------------------------------------------------------------------------------------

TRAINED = ModelConfig(
    vocab_size=325,
    embed=32,
    mlp=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_positions=64,
    rope=RopeConfig(theta=5e5, kind="linear", factor=2.0),
    norm_eps=1e-5,
    initializer_range=0.2,
    dtype="float32",
    attention="reference",
)


def save_run(run_dir, config, files=None):
    """A run directory with two checkpoints as the training loop writes them; returns the model."""
    rng, like = np.random.default_rng(7), abstract(config)
    flat = {  # drawn by numpy: nothing to compile
        name: jnp.asarray(rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype))
        for name, leaf in param.flatten(like).items()
    }
    model = param.unflatten(like, flat)
    params = {f"params/{name}": leaf for name, leaf in param.flatten(model).items()}
    about = {"kind": "train_state", "model": dataclasses.asdict(config)}
    with checkpoint.CheckpointWriter(run_dir / "checkpoints", keep_latest=2) as writer:
        for step in (1, 2):
            moments = {f"opt/{name}": leaf * 0 for name, leaf in params.items()}
            writer.save(step, {"params": params, "opt": moments}, about=about, files=files)
    return model


def test_a_trained_run_is_exported_by_its_path_alone(tmp_path):
    """Red when the export needs more than a path, or takes bos and eos from LlamaConfig's
    defaults instead of the tokenizer."""
    hf_models = pytest.importorskip("hf_models", reason="needs torch and transformers (test)")
    from lemur_jax.data import tokenizer_files

    text = "def add(a, b):\n    return a + b  # the sum of two numbers\n"
    tokenizer = tokenizer_files.train([text * 3], tmp_path / "tokenizer", vocab_size=300)
    files = {
        f"tokenizer/{path.name}": path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()
    }
    model = save_run(tmp_path / "run", TRAINED, files | {"config.gin": b""})
    export_hf(tmp_path / "run", tmp_path / "hf")

    theirs = hf_models.transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert str(theirs.dtype) == "torch.float32"  # master weights, as they are stored
    tokens = hf_models.random_tokens(325, 2, 24)
    ours = hf_models.decoder_logits(model, tokens)
    assert np.abs(ours[..., :325] - hf_models.their_logits(theirs, tokens)).max() < 1e-4
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    fast = hf_models.transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert fast(text).input_ids == tokenizer.encode(text, bos=True)


def test_a_tokenizer_model_alone_gets_its_hf_files(tmp_path):
    """Red when write_hf_files is not called for a SentencePiece tokenizer of ours."""
    from lemur_jax.data import tokenizer_files

    tokenizer_files.train(["some words\nin lines\n" * 20], tmp_path / "tokenizer", vocab_size=300)
    files = {"tokenizer/tokenizer.model": (tmp_path / "tokenizer/tokenizer.model").read_bytes()}
    save_run(tmp_path / "run", TRAINED, files)
    export_hf(tmp_path / "run", tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 2)


def test_without_a_tokenizer_there_are_no_token_ids(tmp_path):
    """Red when ids are left out: transformers would fill in 1 and 2."""
    save_run(tmp_path / "run", TRAINED)
    export_hf(tmp_path / "run", tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["bos_token_id"] is None and written["eos_token_id"] is None


@pytest.mark.parametrize("change", [{}, {"tie_embeddings": True}, {"mlp_bias": True}])
def test_ours_to_hf_to_ours(tmp_path, change):
    """Red when export and import disagree about any leaf or any field of the config."""
    config = dataclasses.replace(TRAINED, **change)
    model = save_run(tmp_path / "run", config)
    export_hf(tmp_path / "run", tmp_path / "hf", max_shard_bytes=30_000)
    step_dir = import_hf(tmp_path / "hf", tmp_path / "ours")
    found = model_config(checkpoint.describe(step_dir).about["model"])
    assert dataclasses.replace(found, attention="reference") == config
    for name, leaf in param.flatten(model).items():
        expected = np.array(leaf)
        if name in ("table", "head"):  # padding rows are not exported: zeros come back
            rows = [slice(None)] * 2
            rows[name == "head"] = slice(config.vocab_size, None)
            expected[tuple(rows)] = 0
        assert np.array_equal(checkpoint.read_tensor(step_dir, f"params/{name}"), expected), name


def test_transformers_to_ours_to_transformers(tmp_path):
    """Red when the exported directory does not load, or its logits differ by one bit."""
    hf_models = pytest.importorskip("hf_models", reason="needs torch and transformers (test)")
    hf_models.make(
        tmp_path / "hf", dtype="bfloat16", vocab_size=101, num_key_value_heads=2,
        attention_bias=True, max_shard_size="10KB",
    )  # fmt: skip
    import_hf(tmp_path / "hf", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", max_shard_bytes=9000)
    assert tiny_hf.read_all(tmp_path / "back") == tiny_hf.read_all(tmp_path / "hf")
    before = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == before
    tokens, logits = hf_models.random_tokens(101, 2, 16), []
    for directory in ("hf", "back"):
        model = hf_models.transformers.LlamaForCausalLM.from_pretrained(tmp_path / directory)
        assert str(model.dtype) == "torch.bfloat16"
        logits.append(hf_models.their_logits(model.eval().float(), tokens))
    assert np.array_equal(*logits)
