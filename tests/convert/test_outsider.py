"""What an outsider found: each of these hung, passed wrong bytes or blamed the wrong thing."""

import dataclasses
import hashlib
import re
import shutil

import numpy as np
import pytest
import tiny_hf

from lemur_jax.convert import disk, engine, grain, plan
from lemur_jax.convert.convert import convert
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.journal import Journal
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
    options = Options(to=to, max_shard_bytes=2000)
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
