"""Damaged and foreign directories: an error that names what, and a destination left as it was."""

import json
import shutil

import numpy as np
import pytest
import tiny_hf

from lemur_jax import checkpoint
from lemur_jax.convert import engine, plan
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.hf import export_hf, import_hf
from lemur_jax.convert.hf_source import open_hf
from lemur_jax.convert.options import Options
from lemur_jax.convert.recognise import recognise
from lemur_jax.convert.targets import FilesTarget

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def refuses(source, destination, *words):
    """Importing fails with all of `words`, and writes nothing."""
    with pytest.raises(ConversionError) as caught:
        import_hf(source, destination)
    for word in words:
        assert word in str(caught.value)
    assert not destination.exists()
    return caught.value.problems


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_missing_tensor(tmp_path):
    """Red when the leaf is left as zeros."""
    tensors = tiny_hf.weights()
    del tensors[K_PROJ]
    refuses(tiny_hf.write(tmp_path / "hf", tensors), tmp_path / "o", K_PROJ, "layers/wk", "[8, 16]")


def test_extra_tensor(tmp_path):
    """Red when a tensor that nothing takes is ignored."""
    tensors = tiny_hf.weights() | {
        "model.layers.0.self_attn.q_norm.weight": np.ones(4, np.float32),
        "model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32),
    }
    problems = refuses(
        tiny_hf.write(tmp_path / "hf", tensors), tmp_path / "o",
        "q_norm.weight", "[4]", SINGLE, "q_proj.bias", "attention_bias=False",
    )  # fmt: skip
    assert len(problems) == 2


def test_misshapen_tensor(tmp_path):
    """Red when num_key_value_heads of config.json is not compared with the weights."""
    source = tiny_hf.write(tmp_path / "hf", config=tiny_hf.CONFIG | {"num_key_value_heads": 4})
    refuses(source, tmp_path / "o", K_PROJ, "expected [16, 16]", "found [8, 16]")


def test_tensor_in_two_shards(tmp_path):
    """Red when the last shard wins."""
    tensors = tiny_hf.weights()
    source = tiny_hf.write(tmp_path / "hf", tensors, shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    names = json.loads((source / INDEX).read_text())["weight_map"]
    second = {n: tensors[n] for n in tensors if names[n] == shard.name}
    first = next(n for n in tensors if names[n] != shard.name)
    tiny_hf.write_file(shard, second | {first: tensors[first]})
    refuses(
        source,
        tmp_path / "o",
        "filled twice",
        first,
        shard.name,
        "model-00001-of-00002.safetensors",
    )


@pytest.mark.parametrize("keep", [0.9, 0.2, 0.001])
def test_truncated_file(tmp_path, keep):
    """Red when the size of the file is not compared with its header."""
    source = tiny_hf.write(tmp_path / "hf")
    raw = (source / SINGLE).read_bytes()
    (source / SINGLE).write_bytes(raw[: int(keep * len(raw))])
    found = str(int(keep * len(raw)))
    refuses(source, tmp_path / "o", str(source / SINGLE), "truncated", found)


def test_truncated_shard_among_whole_ones(tmp_path):
    """Red when only the first shard is checked, or only the first problem told."""
    source = tiny_hf.write(tmp_path / "hf", shards=3)
    for number in (2, 3):
        path = source / f"model-0000{number}-of-00003.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    problems = refuses(source, tmp_path / "o", "model-00002-of-00003", "model-00003-of-00003")
    damaged = [problem for problem in problems if "is damaged" in problem]
    assert len(damaged) == 2 and len(problems) == 4
    assert "not whole: lm_head.weight" in problems[-1]


def test_corrupted_header(tmp_path):
    """Red when a JSON error reaches the user without the file's name."""
    source = tiny_hf.write(tmp_path / "hf")
    raw = bytearray((source / SINGLE).read_bytes())
    raw[20] ^= 0xFF
    (source / SINGLE).write_bytes(raw)
    refuses(source, tmp_path / "o", str(source / SINGLE), "damaged", "header")


def test_shard_named_by_the_index_is_not_there(tmp_path):
    """Red when missing files surface as FileNotFoundError."""
    source = tiny_hf.write(tmp_path / "hf", shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    refuses(source, tmp_path / "o", INDEX, "model-00002-of-00003.safetensors", "download")


def test_shard_that_the_index_does_not_name(tmp_path):
    """Red when stray shards of another download are ignored."""
    source = tiny_hf.write(tmp_path / "hf", shards=2)
    stray = "model-00003-of-00003.safetensors"
    tiny_hf.write_file(source / stray, {"a": np.zeros(1)})
    refuses(source, tmp_path / "o", stray, INDEX, "remove")


def test_index_and_shards_disagree(tmp_path):
    """Red when weight_map is not compared with the headers."""
    source = tiny_hf.write(tmp_path / "hf", shards=2)

    def change(index):
        del index["weight_map"]["model.norm.weight"]
        index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"

    edit(source / INDEX, change)
    refuses(source, tmp_path / "o", "'model.norm.weight'", "not in", "'ghost'")


def test_index_that_leads_out_of_the_directory(tmp_path):
    """Red when a shard's name is joined to the directory unchecked."""
    source = tiny_hf.write(tmp_path / "hf", shards=2)
    edit(source / INDEX, lambda index: index["weight_map"].update(x="../other.safetensors"))
    refuses(source, tmp_path / "o", "../other.safetensors", "plain file name")


def test_single_file_beside_an_index(tmp_path):
    """Red when one of the two is taken without a word."""
    source = tiny_hf.write(tmp_path / "hf", shards=2)
    tiny_hf.write_file(source / SINGLE, tiny_hf.weights())
    refuses(source, tmp_path / "o", SINGLE, INDEX, "remove")


def test_shards_without_their_index_or_params(tmp_path):
    """Red when what is missing is not named: the index of .bin shards, Meta's params.json."""
    source = tiny_hf.write(tmp_path / "hf")
    shard = source / "pytorch_model-00001-of-00002.bin"
    (source / SINGLE).rename(shard)
    refuses(source, tmp_path / "o", shard.name, "pytorch_model.bin.index.json")
    shard.rename(source / "consolidated.00.pth")
    refuses(source, tmp_path / "o", "params.json does not exist")


def test_no_weights(tmp_path):
    """Red when what is there is not listed."""
    source = tiny_hf.write(tmp_path / "hf")
    (source / SINGLE).unlink()
    refuses(source, tmp_path / "o", SINGLE, INDEX, "config.json")


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_bad_config(tmp_path, text):
    """Red when config.json's absence or damage is not named."""
    source = tiny_hf.write(tmp_path / "hf")
    if text is None:
        (source / "config.json").unlink()
    else:
        (source / "config.json").write_text(text)
    refuses(source, tmp_path / "o", str(source / "config.json"))


def test_unknown_attribute_and_model_type(tmp_path):
    """Red when import does not use the whitelist."""
    source = tiny_hf.write(tmp_path / "hf", config=tiny_hf.CONFIG | {"logit_scale": 0.5})
    refuses(source, tmp_path / "o", "logit_scale=0.5", "unknown attribute", "remove")
    source = tiny_hf.write(tmp_path / "hf", config=tiny_hf.CONFIG | {"model_type": "qwen2"})
    refuses(source, tmp_path / "o", "model_type='qwen2'", "'llama'")


def test_tied_head_that_differs(tmp_path):
    """Red when lm_head.weight of a tied model is dropped unread."""
    source = tiny_hf.write(tmp_path / "hf", config=tiny_hf.CONFIG | {"tie_word_embeddings": True})
    refuses(source, tmp_path / "o", "tie_word_embeddings", "'lm_head.weight'", "differs")


def test_dtypes_that_are_not_weights(tmp_path):
    """Red when int8 weights are taken for numbers, or float64 silently kept."""
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = tiny_hf.weights()
    tensors[name] = tensors[name].astype(np.int8)
    refuses(tiny_hf.write(tmp_path / "hf", tensors), tmp_path / "o", name, "int8", "unquantised")
    tensors[name] = tensors[name].astype(np.float64)
    refuses(tiny_hf.write(tmp_path / "hf", tensors), tmp_path / "o", name, "float64", "dtype=")


def test_layers_of_different_dtypes(tmp_path):
    """Red when a stacked leaf takes the dtype of its first layer and the others lose bits."""
    tensors = tiny_hf.weights()
    tensors[K_PROJ] = tensors[K_PROJ].astype("bfloat16")
    refuses(
        tiny_hf.write(tmp_path / "hf", tensors), tmp_path / "o",
        "layers/wk", K_PROJ, "float32", "bfloat16", "dtype=",
    )  # fmt: skip
    open_hf(tmp_path / "hf", dtype="float32")


def test_a_cast_that_overflows(tmp_path):
    """Red when 1e6 becomes inf in float16."""
    tensors = tiny_hf.weights()
    tensors[K_PROJ][0, 0] = -1e6
    source = tiny_hf.write(tmp_path / "hf", tensors)
    with pytest.raises(ConversionError, match=r"k_proj.*1e\+06.*float16.*bfloat16"):
        import_hf(source, tmp_path / "o", dtype="float16")
    with pytest.raises(ConversionError, match="dtype='int4' is unknown; legal: float32"):
        import_hf(source, tmp_path / "o", dtype="int4")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("convert", [import_hf, export_hf])
def test_a_destination_with_something_in_it_is_left_alone(tmp_path, convert):
    """Red when files are written beside, or over, what is there."""
    source = tiny_hf.write(tmp_path / "hf")
    if convert is export_hf:
        source = import_hf(source, tmp_path / "ours")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "precious").write_text("x")
    with pytest.raises(ConversionError, match=r"not empty.*precious.*does not exist"):
        convert(source, tmp_path / "o")
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["precious"]
    with pytest.raises(ConversionError, match="is a file"):
        convert(source, tmp_path / "o" / "precious")


def test_a_full_disk_leaves_nothing_that_looks_whole_and_is_gone_on_from(tmp_path, monkeypatch):
    """Red when `convert` works under the final name, or throws away what was written."""
    import_hf(tiny_hf.write(tmp_path / "hf"), tmp_path / "ours")
    (tmp_path / "o").mkdir()  # empty: allowed
    written = []
    write = FilesTarget.write

    def fail(self, name, region, array):
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(name)
        write(self, name, region, array)

    with monkeypatch.context() as patch:
        patch.setattr(FilesTarget, "write", fail)
        patch.setattr(engine, "WORKERS", 1)
        with pytest.raises(OSError, match="No space left"):
            export_hf(tmp_path / "ours", tmp_path / "o")
    assert list((tmp_path / "o").iterdir()) == []
    assert (tmp_path / ".o.partial" / SINGLE).exists()
    assert not (tmp_path / ".o.partial" / "config.json").exists()
    export_hf(tmp_path / "ours", tmp_path / "o")
    assert tiny_hf.read_all(tmp_path / "o") == tiny_hf.read_all(tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "o", "ours"]


def test_a_refused_conversion_leaves_nothing(tmp_path):
    """Red when a value that does not fit leaves its partial directory behind."""
    tensors = tiny_hf.weights()
    tensors[K_PROJ][0, 0] = -1e6
    source = tiny_hf.write(tmp_path / "hf", tensors)
    with pytest.raises(ConversionError, match="does not fit"):
        import_hf(source, tmp_path / "o", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_too_little_disk_is_said_first(tmp_path, monkeypatch):
    """Red when the free space is not compared with what will be written."""
    source = tiny_hf.write(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConversionError, match=r"1000 bytes free, \d+ are needed"):
        import_hf(source, tmp_path / "o")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    """Red when the export does not check digests, or leaves a directory of wrong weights."""
    step_dir = import_hf(tiny_hf.write(tmp_path / "hf"), tmp_path / "ours")
    data = max(
        (p for p in step_dir.rglob("table/*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    with pytest.raises(checkpoint.CheckpointError, match=r"damaged|unreadable"):
        export_hf(tmp_path / "ours", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_that_lacks_a_weight(tmp_path):
    """Red when the checkpoint is not compared with its own config."""
    import jax.numpy as jnp

    step_dir = import_hf(tiny_hf.write(tmp_path / "hf"), tmp_path / "ours")
    about = checkpoint.describe(step_dir).about
    arrays = {name: jnp.asarray(a) for name, a in checkpoint.restore(step_dir).items()}
    arrays["params/other"] = arrays.pop("params/norm")
    arrays["params/table"] = arrays["params/table"][:101]
    with checkpoint.CheckpointWriter(tmp_path / "wrong", keep_latest=1) as writer:
        writer.save(0, {"params": arrays}, about=about)
    with pytest.raises(ConversionError) as caught:
        export_hf(tmp_path / "wrong", tmp_path / "o")
    for word in ("lacks params/norm", "params/other", "params/table", "[101, 16]", "[128, 16]"):
        assert word in str(caught.value)


def test_what_is_no_checkpoint_at_all(tmp_path):
    """Red when `recognise` guesses or does not list what it saw, or gs: becomes a directory."""
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConversionError, match=r"manifest\.json.*config\.json.*notes\.txt"):
        recognise(tmp_path)
    with pytest.raises(ConversionError, match="not a directory"):
        recognise(tmp_path / "none")
    assert recognise("gs://bucket/run") == "lemur"
    with pytest.raises(ConversionError, match="gs://bucket/hf is not local"):
        export_hf(tmp_path, "gs://bucket/hf")
    with pytest.raises(ConversionError, match="max_shard_bytes=0"):
        export_hf(tmp_path, tmp_path / "o", max_shard_bytes=0)


def test_flags_without_effect():
    """Red if a flag that changes nothing were taken silently."""
    with pytest.raises(ConversionError, match="--to=lemur has no shards: leave it out"):
        Options(to="lemur", max_shard_bytes=1000)
    with pytest.raises(ConversionError, match="--new_rows .* give --add_tokens or --vocab_size"):
        Options(to="hf", new_rows="zeros")
    Options(to="hf", new_rows="zeros", vocab_size=32128, max_shard_bytes=1000)
