"""What an outsider found: each of these hung, passed wrong bytes or blamed the wrong thing."""

import dataclasses
import hashlib
import math
import os
import re
import shutil

import foreign
import numpy as np
import pytest
import tiny_hf

from lemur_jax.config import MeshConfig
from lemur_jax.convert import disk, engine, grain, plan
from lemur_jax.convert.convert import convert
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.journal import Journal
from lemur_jax.convert.model import open_source
from lemur_jax.convert.options import Options
from lemur_jax.convert.verify import verify


def refusal(source, destination, **options):
    """What a conversion says when it refuses; it must leave nothing."""
    with pytest.raises(ConversionError) as caught:
        convert(source, destination, Options(**({"to": "lemur"} | options)))
    assert not destination.exists()
    assert not list(destination.parent.glob(f".{destination.name}.*"))
    return str(caught.value)


def tree(path):
    """{name: digest} of every file below a directory."""
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def wide(directory):
    """A model whose table has 4 MiB and can be cut anywhere."""
    config = tiny_hf.CONFIG | {"vocab_size": 65536}
    weights = tiny_hf.weights()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = np.zeros((65536, 16), np.float32)
    return tiny_hf.write(directory, weights, config)


@pytest.mark.parametrize("to", ["lemur", "hf", "easylm"])
def test_a_budget_that_is_too_small_is_refused_at_once(tmp_path, to):
    """Red when `most` may be less than LEAST_BLOCK_BYTES (it counted one block an element), or the
    least that is named does not do."""
    source = wide(tmp_path / "hf")
    for max_ram in (10 << 20, 400 << 20, 512 << 20, 514 << 20):
        text = refusal(source, tmp_path / "o", to=to, max_ram=max_ram)
        least = int(re.search(r"is too little: \S+ .*the least is (\d+)MiB", text)[1])
        assert 514 < least < 600
    convert(source, tmp_path / "o", Options(to=to, max_ram=least << 20), dry_run=True)
    with pytest.raises(ConversionError, match="is too little"):
        convert(source, tmp_path / "o", Options(to=to, max_ram=least - 1 << 20), dry_run=True)


def test_verify_says_the_least(tmp_path):
    """Red when verify cuts without end, or says only to give more."""
    source = wide(tmp_path / "hf")
    with pytest.raises(ConversionError, match=r"514\.0 MiB is too little.*least is 520MiB"):
        verify(source, source, max_ram=514 << 20)
    assert verify(source, source, max_ram=520 << 20) == []


def test_the_number_of_blocks_is_bounded():
    """Red when blocks of less than LEAST_BLOCK_BYTES are made of a leaf that is larger."""
    any_cut = plan.grain.Grain((1, 0, 0), (1, 1, 1))
    parts = [plan.Part("x", (80, 8192, 8192), 2, any_cut, any_cut)]
    shape = plan.block_shapes(parts, plan.PROGRAM_BYTES + (4 << 20), 4)["x"]
    assert np.prod(shape) * 2 >= plan.LEAST_BLOCK_BYTES // 2


# ---------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 300 bytes and chunks of 500, so that tiny models have many."""
    monkeypatch.setattr(plan, "USUAL_BLOCK_BYTES", 300)
    monkeypatch.setattr(grain, "CHUNK_BYTES", 500)
    monkeypatch.setattr(grain, "ALONE_BYTES", 64)


def killed(source, destination, options, after=12):
    """Begins a conversion and stops as a kill does once `after` blocks are journaled."""
    with pytest.MonkeyPatch.context() as patch:
        append, count = Journal.append, []

        def stop(self, lines):
            append(self, lines)
            count.extend(lines)
            if len(count) >= after:
                raise Killed

        patch.setattr(Journal, "append", stop)
        patch.setattr(engine, "_SYNC_SECONDS", 0)
        with pytest.raises(Killed):
            convert(source, destination, options)
    return destination.with_name(f".{destination.name}.partial")


def place_of_table(directory):
    """The file and byte at which the first row of the table lies: written first in any format."""
    row = tiny_hf.weights()["model.embed_tokens.weight"][0].tobytes()
    found = [(path, path.read_bytes().find(row)) for path in directory.rglob("*") if path.is_file()]
    return next((path, at) for path, at in found if at >= 0)


def delete(directory):
    place_of_table(directory)[0].unlink()


def zero(directory):
    for path in directory.rglob("*"):
        if path.is_file() and path.name[0] not in "._":
            path.write_bytes(bytes(path.stat().st_size))


def flip(directory):
    path, at = place_of_table(directory)
    raw = bytearray(path.read_bytes())
    raw[at + 20] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", [delete, zero, flip])
@pytest.mark.parametrize("to", ["lemur", "hf", "easylm"])
def test_what_is_gone_from_the_partial_is_done_again(tmp_path, small_blocks, to, harm):
    """Red when `still_there` believes the journal: the outcome was "wrote" with wrong bytes."""
    source = tiny_hf.write(tmp_path / "hf")
    options = Options(to=to, max_shard_bytes=2000 if to == "hf" else None)
    convert(source, tmp_path / "whole", options)
    harm(killed(source, tmp_path / "o", options))
    said = []
    convert(source, tmp_path / "o", options, say=said.append)
    assert tree(tmp_path / "o") == tree(tmp_path / "whole")
    again = [re.match(r"done again: (\d+) blocks", line) for line in said]
    assert sum(int(found[1]) for found in again if found) >= 1
    assert not list(tmp_path.glob(".*"))


def test_what_is_there_is_not_done_again(tmp_path, small_blocks):
    """Red when the comparison finds differences where there are none: padding, a tied head."""
    config = tiny_hf.CONFIG | {"tie_word_embeddings": True}
    weights = tiny_hf.weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    tied = tiny_hf.write(tmp_path / "tied", weights, config)
    for source, to in ((tiny_hf.write(tmp_path / "hf"), "lemur"), (tied, "hf"), (tied, "lemur")):
        out = tmp_path / f"{source.name}_{to}"
        killed(source, out, Options(to=to), after=25)
        said = []
        convert(source, out, Options(to=to), say=said.append)
        assert any(re.match(r"going on: (2[5-9]|3\d) of", line) for line in said)
        assert not any(line.startswith("done again") for line in said)


def test_what_an_absent_process_wrote_is_compared(tmp_path, small_blocks):
    """Red when process 0 finishes with blocks that nobody has compared since their process died."""
    source = tiny_hf.write(tmp_path / "hf")
    first = Options(to="hf", processes=2, timeout_seconds=0.5)
    second = dataclasses.replace(first, process=1)
    for options in (first, second):
        with pytest.raises(ConversionError):
            convert(source, tmp_path / "o", options)
    zero(tmp_path / ".o.partial")
    with pytest.raises(ConversionError, match=r"start the processes \[1\] again"):
        convert(source, tmp_path / "o", first)
    with pytest.raises(ConversionError, match="process 0 has not finished"):
        convert(source, tmp_path / "o", second)
    convert(source, tmp_path / "o", first)
    assert verify(source, tmp_path / "o") == []


@pytest.mark.parametrize("text", ["{", "[1]", "", "\x00\xff"])
def test_a_damaged_journal_says_what_to_do(tmp_path, small_blocks, text):
    """Red when the JSON error of the journal's header reaches the user."""
    source = tiny_hf.write(tmp_path / "hf")
    partial = killed(source, tmp_path / "o", Options(to="hf"))
    (tmp_path / ".o.journal" / "header.json").write_text(text)
    with pytest.raises(ConversionError, match=r"header\.json is damaged.*Remove .*\.o\.journal"):
        convert(source, tmp_path / "o", Options(to="hf"))
    shutil.rmtree(partial)
    shutil.rmtree(tmp_path / ".o.journal")
    convert(source, tmp_path / "o", Options(to="hf"))


def test_lines_that_are_json_but_no_blocks(tmp_path, small_blocks):
    """Red when a line without its keys ends in a traceback."""
    source = tiny_hf.write(tmp_path / "hf")
    killed(source, tmp_path / "o", Options(to="hf"))
    lines = tmp_path / ".o.journal" / "blocks.0.jsonl"
    lines.write_text('7\n{"block": 1}\n[]\n' + lines.read_text())
    convert(source, tmp_path / "o", Options(to="hf"))
    assert verify(source, tmp_path / "o") == []


def test_a_full_disk_names_file_and_leaf(tmp_path, monkeypatch):
    """Red when the kernel's bare "No space left on device" is all there is."""
    source = tiny_hf.write(tmp_path / "hf")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "_pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device \(writing \S+\): '.*\.o\.partial"):
        convert(source, tmp_path / "o", Options(to="lemur"))


# ---------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["vocab_size", "max_positions"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(flag, value):
    """Red when 0 is taken for "not given", or -1 reaches numpy."""
    with pytest.raises(ConversionError, match=f"--{flag}={value} must be positive"):
        Options(to="lemur", **{flag: value})


def test_max_positions_where_they_are_stated(tmp_path):
    """Red when the flag is ignored without a word."""
    source = tiny_hf.write(tmp_path / "hf")
    text = refusal(source, tmp_path / "o", max_positions=32)
    assert "--max_positions=32 is of Meta's weights" in text and "(hf) states 64" in text
    with pytest.raises(ConversionError, match="--max_positions=32 is of Meta's weights"):
        verify(source, source, max_positions=32)


def test_cut_rows_are_told(tmp_path):
    """Red when trained rows go without a word."""
    said = []
    options = Options(to="hf", vocab_size=90)
    convert(tiny_hf.write(tmp_path / "hf"), tmp_path / "o", options, say=said.append)
    assert said[0].startswith("note: --vocab_size=90 cuts the last 11 of 101 rows; no tokenizer")


def test_a_cast_of_nan_is_counted_not_warned_of(tmp_path):
    """Red when numpy's warning (an error here) comes through, or NaN counts as changed."""
    weights = tiny_hf.weights()
    weights["model.norm.weight"][3:6] = np.nan, np.inf, -np.inf
    source, said = tiny_hf.write(tmp_path / "hf", weights), []
    convert(source, tmp_path / "o", Options(to="hf", dtype="bfloat16"), say=said.append)
    line = next(line for line in said if line.startswith("cast norm"))
    assert line.endswith("; 3 are NaN or infinite, as before")
    assert not any("NaN" in line for line in said if not line.startswith("cast norm"))
    convert(source, tmp_path / "h", Options(to="hf", dtype="float16"))


def test_easylm_has_neither_head_dim_nor_scaling(tmp_path):
    """Red when a model is written that EasyLM would read as another."""
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    source = tiny_hf.write(tmp_path / "scaled", config=tiny_hf.CONFIG | scaling)
    assert "no RoPE scaling (linear)" in refusal(source, tmp_path / "o", to="easylm")
    config = tiny_hf.CONFIG | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    weights = tiny_hf.weights()
    for name, array in weights.items():
        if "q_proj" in name:
            weights[name] = array[:8]
        if "k_proj" in name or "v_proj" in name:
            weights[name] = array[:4]
        if "o_proj" in name:
            weights[name] = np.ascontiguousarray(array[:, :8])
    source = tiny_hf.write(tmp_path / "wide", weights, config)
    assert "no head_dim=4 other than" in refusal(source, tmp_path / "o", to="easylm")


def test_a_mesh_that_does_not_divide(tmp_path):
    """Red when NamedSharding's own text reaches the user, once for each leaf."""
    source = tiny_hf.write(tmp_path / "hf")
    text = refusal(source, tmp_path / "o", mesh=MeshConfig(fsdp=1, tensor=3))
    assert re.search(
        r"--mesh: tensor=3 does not divide 4, axis \d of layers/wq \[2, 16, 4, 4\]", text
    )
    assert "NamedSharding" not in text and len(text.splitlines()) <= 6


# ---------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------


def test_a_header_of_lists_in_lists(tmp_path):
    """Red when json's RecursionError comes through."""
    source = tiny_hf.write(tmp_path / "hf")
    deep = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    tiny_hf.write_raw(source / "model.safetensors", deep, b"")
    assert "header is not valid JSON" in refusal(source, tmp_path / "o")


@pytest.mark.parametrize("layers", [3, 1_000_000, 10**9])
def test_more_layers_than_there_are(tmp_path, layers):
    """Red when a list of the names of all claimed layers is built first (it took all memory)."""
    config = tiny_hf.CONFIG | {"num_hidden_layers": layers}
    source = tiny_hf.write(tmp_path / "hf", config=config)
    text = refusal(source, tmp_path / "o")
    assert f"says {layers} layers" in text and "have 2: there is no layer 2" in text
    assert len(text) < 1000


def test_many_layers_of_nobodys_names(tmp_path):
    """Red when the limit on listing holds only where some names are known."""
    config = tiny_hf.CONFIG | {"num_hidden_layers": 10**9}
    source = tiny_hf.write(tmp_path / "hf", {"a.0.b": np.zeros(3, np.float32)}, config)
    assert "the weights have 0" in refusal(source, tmp_path / "o")


KINDS = {
    "a directory": lambda path: path.mkdir(),
    "a named pipe": os.mkfifo,
    "a link to device": lambda path: path.symlink_to("/dev/zero"),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_is_no_file(tmp_path, kind):
    """Red when a pipe is opened (it hung), or a device is said to be missing."""
    source = tiny_hf.write(tmp_path / "hf", shards=2)
    path = source / "model-00002-of-00002.safetensors"
    path.unlink()
    KINDS[kind](path)
    text = refusal(source, tmp_path / "o")
    assert f"which is {kind}, not a regular file" in text
    assert "missing" not in text and "download it" not in text
    path.rename(source / "elsewhere") if kind != "a directory" else path.rmdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (source / name).unlink()
    KINDS[kind](source / "model.safetensors")
    assert f"is {kind}, not a regular file" in refusal(source, tmp_path / "o")
    (source / "config.json").unlink()
    KINDS[kind](source / "config.json")
    text = refusal(source, tmp_path / "o")
    assert f"is {kind}, not a regular file" in text or "config.json" in text


def test_a_wrong_name_in_the_index_blames_no_other_shard(tmp_path):
    """Red when shards are called another download's because the index is wrong."""
    source = tiny_hf.write(tmp_path / "hf", shards=2)
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of", "../model-00002-of"))
    text = refusal(source, tmp_path / "o")
    assert "no plain file name" in text and "another download" not in text


def test_long_lists_are_summarised(tmp_path):
    """Red when each of hundreds of tensors has its line."""
    extra = {f"model.layers.0.x{n}.weight": np.zeros(2, np.float32) for n in range(50)}
    source = tiny_hf.write(tmp_path / "hf", tiny_hf.weights() | extra)
    lines = refusal(source, tmp_path / "o").splitlines()
    assert len(lines) == 5 and lines[-1] == "and 46 more tensors like these"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    """Red when a pointer is called a truncated or damaged file."""
    source = tiny_hf.write(tmp_path / "hf")
    if name.endswith(".bin"):
        (source / "model.safetensors").unlink()
    (source / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"
    )
    text = refusal(source, tmp_path / "o")
    assert f"{name} is a pointer of git-lfs" in text and "`git lfs pull`" in text
    assert "truncated" not in text and "header" not in text and len(text.splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": math.nan},
        {"initializer_range": math.inf},
        {"rope_theta": math.inf},
        {"rope_scaling": {"rope_type": "dynamic", "factor": math.inf}},
    ],
)
def test_numbers_of_the_config_are_finite(tmp_path, change):
    """Red when NaN passes for a number: no comparison with it is true."""
    source = tiny_hf.write(tmp_path / "hf", config=tiny_hf.CONFIG | change)
    assert "must be a finite number" in refusal(source, tmp_path / "o")


def test_a_zip_that_is_cut_short(tmp_path):
    """Red when half a zip archive is taken for the older format, whose pickle breaks off."""
    torch = pytest.importorskip("torch")
    source = foreign.write_bin(tmp_path / "bin", tiny_hf.weights(), torch, shards=2)
    path = source / "pytorch_model-00002-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-100])
    text = refusal(source, tmp_path / "o")
    assert "the zip archive is cut short at byte" in text and "pickle" not in text
    assert f"{path.name} is cut short; by the index it holds " in text
    assert "model.layers.0.input_layernorm.weight" in text


def test_metas_last_file_is_missing_or_a_copy(tmp_path):
    """Red when params.json is blamed for a missing part, or a part is taken twice."""
    torch = pytest.importorskip("torch")
    weights = tiny_hf.weights()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:100]
    sizes = {"multiple_of": 8, "ffn_dim_multiplier": 0.5}  # 24 hidden units
    source = foreign.write_meta(tmp_path / "meta", weights, 2, torch=torch, **sizes)
    assert open_source(source, max_positions=64).config.layers == 2
    second = source / "consolidated.01.pth"
    shutil.copy(source / "consolidated.00.pth", second)
    text = refusal(source, tmp_path / "o", max_positions=64)
    assert "consolidated.01.pth in" in text and "is a copy of consolidated.00.pth" in text
    second.unlink()
    text = refusal(source, tmp_path / "o", max_positions=64)
    assert "has 8 of 16 rows, which makes 2 files: consolidated.01.pth must be missing" in text
    assert "params.json" not in text
