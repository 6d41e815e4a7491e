"""Blocks, journal, processes: the same result whatever the budget, the kills and the processes."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import threading

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_hf

from lemur_jax import checkpoint
from lemur_jax.config import MeshConfig
from lemur_jax.convert import chunks, engine, grain, plan
from lemur_jax.convert.chunks import ChunksTarget
from lemur_jax.convert.convert import convert
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.grain import Grain
from lemur_jax.convert.hf import import_hf
from lemur_jax.convert.load import load_model
from lemur_jax.convert.model import open_source
from lemur_jax.convert.options import Options
from lemur_jax.convert.targets import FilesTarget
from lemur_jax.convert.verify import verify
from lemur_jax.sharding import make_mesh


def tree(path):
    """{name: digest} of every file below a directory."""
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 300 bytes and chunks of 500, so that tiny models have many."""
    monkeypatch.setattr(plan, "USUAL_BLOCK_BYTES", 300)
    monkeypatch.setattr(grain, "CHUNK_BYTES", 500)
    monkeypatch.setattr(grain, "ALONE_BYTES", 64)


# ---------------------------------------------------------------------------------------------
# Every pair of formats
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_target_gives_back_every_bit(tmp_path, small_blocks, dtype):
    """Red when a block is written one row off, a layer is skipped, or EASYLM's q is not turned
    back."""
    source = tiny_hf.write(tmp_path / "hf", tiny_hf.weights(dtype))
    formats = ("hf", "lemur", "easylm")
    for first in formats:
        convert(source, tmp_path / f"a_{first}", Options(to=first))
        for second in formats:
            out = tmp_path / f"b_{first}_{second}"
            convert(tmp_path / f"a_{first}", out, Options(to=second))
            assert verify(source, out) == []
        assert tiny_hf.read_all(tmp_path / f"b_{first}_hf") == tiny_hf.read_all(source)
    for path in ("a_lemur", "b_easylm_lemur", "b_lemur_lemur"):
        for name, array in checkpoint.restore(checkpoint.resolve(tmp_path / path)).items():
            expected = open_source(source).read(name.removeprefix("params/"))
            assert array.tobytes() == expected.tobytes()


def test_orbax_reads_it(tmp_path, small_blocks):
    """Red when _METADATA does not name an array, or a chunk at the edge is cut short."""
    step_dir = import_hf(tiny_hf.write(tmp_path / "hf"), tmp_path / "ours")
    reader = ocp.PyTreeCheckpointHandler()
    names = list(checkpoint.describe(step_dir).arrays)
    how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    found = reader.restore(step_dir / "params", args=ocp.args.PyTreeRestore(restore_args=how))
    assert {n: a.tobytes() for n, a in found.items()} == {
        n: a.tobytes() for n, a in checkpoint.restore(step_dir).items()
    }


def test_easylm_and_flax_read_what_we_write(tmp_path, small_blocks):
    """Red when a header is a byte off, or `params` is left out of the keys."""
    import foreign
    import msgpack
    from flax.serialization import from_bytes

    weights = tiny_hf.weights()
    convert(tiny_hf.write(tmp_path / "hf", weights), tmp_path / "o", Options(to="easylm"))
    with open(tmp_path / "o" / "streaming_params", "rb") as file:
        found = {
            tuple(k): from_bytes(None, v) for k, v in msgpack.Unpacker(file, max_buffer_size=0)
        }
    expected = foreign.easylm_weights(weights)
    assert set(found) == {("params", *key) for key in expected}
    for key, array in expected.items():
        assert np.array_equal(found["params", *key], array)


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.data())
def test_blocks_cover_everything_once_and_keep_to_the_grain(data):
    """Red when `regions` forgets the end of an axis, or `_cut` an alignment that must be."""
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))

    def multiples():
        return tuple(data.draw(st.sampled_from([0, 1, max(1, n // 3), 7])) for n in shape)

    a, b = (Grain(multiples(), multiples()) for _ in range(2))
    usual, most = data.draw(st.integers(1, 9000)), data.draw(st.integers(1, 9000))
    block = grain.block_shape(shape, 2, a, b, usual, most)
    seen = np.zeros(shape, int)
    for region in grain.regions(shape, block):
        seen[region] += 1
        for axis, part in enumerate(region):
            for side in (a, b):
                must = side.must[axis] or shape[axis]
                whole_cheap = part.start % (side.cheap[axis] or shape[axis]) == 0
                assert part.start % must == 0 or whole_cheap
    assert (seen == 1).all()


def test_the_least_memory_is_named(tmp_path):
    """Red when a block that does not fit the budget is planned all the same."""
    source = tiny_hf.write(tmp_path / "hf")
    with pytest.raises(ConversionError, match=r"--max_ram=1\.0 MiB is too little.*least is \d+MiB"):
        convert(source, tmp_path / "o", Options(to="lemur", max_ram=1 << 20))
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("text", "count"), [("4GiB", 4 << 30), ("1.5 MB", 1500000), ("77", 77), ("2kib", 2048)]
)
def test_sizes(text, count):
    """Red when GB is taken for GiB."""
    assert plan.parse_bytes(text) == count
    with pytest.raises(ConversionError, match="is no size"):
        plan.parse_bytes(text + "x")


def run(*argv):
    return subprocess.run(
        [sys.executable, "-m", "lemur_jax.cli", "convert", *map(str, argv)],
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_budget_holds_by_the_kernels_count(tmp_path):
    """Red when a leaf is read whole: the table alone has 1.05 GB here."""
    config = tiny_hf.CONFIG | {
        "vocab_size": 128000, "hidden_size": 4096, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16",
    }  # fmt: skip
    sizes = {16: 4096, 8: 1024, 24: 8192, 101: 128000}
    path = tmp_path / "hf"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, array in tiny_hf.weights().items():
        shape = [sizes[n] for n in array.shape]
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    tiny_hf.write_raw(path / "model.safetensors", header, b"")
    with open(path / "model.safetensors", "r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(start + at)
    code = (
        "import sys; from lemur_jax import cli; from lemur_jax.convert import engine; "
        "code = cli.main(sys.argv[1:]); print('peak', engine.peak_resident_bytes()); sys.exit(code)"
    )
    for source, out, to in ((path, "o", "lemur"), (tmp_path / "o", "back", "hf")):
        done = subprocess.run(
            [sys.executable, "-c", code, "convert", source, tmp_path / out, f"--to={to}",
             "--max_ram=900MiB"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[-1]) < 900 << 20


# ---------------------------------------------------------------------------------------------
# Resume
# ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killing(monkeypatch, to, after):
    """Lets `after` blocks be written and journaled, then stops as a kill does."""
    kind = ChunksTarget if to == "lemur" else FilesTarget
    write, count = kind.write, []

    def stop(self, name, region, array):
        count.append(name)
        if len(count) > after:
            write(self, name, region, np.zeros_like(array))  # half-written: wrong bytes
            raise Killed
        write(self, name, region, array)

    monkeypatch.setattr(kind, "write", stop)
    monkeypatch.setattr(engine, "WORKERS", 1)
    monkeypatch.setattr(engine, "_SYNC_SECONDS", 0)


@pytest.mark.parametrize("to", ["lemur", "hf", "easylm"])
def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path, small_blocks, monkeypatch, to):
    """Red when the journal names a block before its data is there, or sums of earlier blocks are
    forgotten."""
    source = tiny_hf.write(tmp_path / "hf")
    convert(source, tmp_path / "whole", Options(to=to))
    for after in (0, 1, 7, 30):
        out = tmp_path / f"o{after}"
        with monkeypatch.context() as patch:
            killing(patch, to, after)
            with pytest.raises(Killed):
                convert(source, out, Options(to=to))
        assert not out.exists()
        lines = tmp_path / f".o{after}.journal" / "blocks.0.jsonl"
        if lines.exists():
            lines.write_bytes(lines.read_bytes()[:-3])  # torn
        said = []
        convert(source, out, Options(to=to), say=said.append)
        assert tree(out) == tree(tmp_path / "whole")
        going_on = [line for line in said if line.startswith("going on")]
        assert bool(going_on) == (after > 1)
    assert not list(tmp_path.glob(".*"))


def test_another_journal_is_refused_by_name(tmp_path, small_blocks, monkeypatch):
    """Red when the header is not compared: half of the result would be of another source."""
    source = tiny_hf.write(tmp_path / "hf")
    with monkeypatch.context() as patch:
        killing(patch, "hf", 3)
        with pytest.raises(Killed):
            convert(source, tmp_path / "o", Options(to="hf"))
    with pytest.raises(ConversionError, match=r"--dtype was None and is 'bfloat16'"):
        convert(source, tmp_path / "o", Options(to="hf", dtype="bfloat16"))
    other = tiny_hf.write(tmp_path / "other", tiny_hf.weights(seed=1))
    with pytest.raises(ConversionError, match=r"source was '.*/hf' and is '.*/other'"):
        convert(other, tmp_path / "o", Options(to="hf"))
    tiny_hf.write(tmp_path / "hf", tiny_hf.weights(seed=1))  # the same path, changed
    with pytest.raises(ConversionError, match="source_files was"):
        convert(source, tmp_path / "o", Options(to="hf"))
    assert (tmp_path / ".o.partial").exists()


def test_two_commands_do_not_write_one_destination(tmp_path, small_blocks, monkeypatch):
    """Red when no lock is taken."""
    source = tiny_hf.write(tmp_path / "hf")
    write, errors = FilesTarget.write, []

    def second(self, name, region, array):
        if not errors:
            errors.append(None)
            with pytest.raises(ConversionError, match="another command is at work") as caught:
                convert(source, tmp_path / "o", Options(to="hf"))
            errors.append(caught)
        write(self, name, region, array)

    monkeypatch.setattr(engine, "WORKERS", 1)
    monkeypatch.setattr(FilesTarget, "write", second)
    convert(source, tmp_path / "o", Options(to="hf"))
    assert len(errors) == 2
    assert verify(source, tmp_path / "o") == []


@pytest.mark.slow
@pytest.mark.parametrize("to", ["lemur", "hf"])
def test_kill_minus_nine(tmp_path, to):
    """Red when the destination gets its name early. (20 points: tools/benchmarks/convert.py.)"""
    source = tiny_hf.write(tmp_path / "hf")
    if to == "hf":
        convert(source, tmp_path / "ours", Options(to="lemur"))
        source = tmp_path / "ours"
    convert(source, tmp_path / "whole", Options(to=to))
    kills = 0
    for seconds in (2.5, 3, 3.5, 4, 4.5, 60):
        child = subprocess.Popen(
            [sys.executable, "-m", "lemur_jax.cli", "convert", source, tmp_path / "o",
             f"--to={to}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            child.wait(seconds)
            break
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            kills += 1
    assert tree(tmp_path / "o") == tree(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------
# Processes, object stores, meshes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["lemur", "hf"])
def test_processes_share_the_work(tmp_path, small_blocks, to):
    """Red when a process leaves out its own blocks, or process 0 does not wait for all of them."""
    source = tiny_hf.write(tmp_path / "hf")
    convert(source, tmp_path / "whole", Options(to=to, processes=1))
    results = []

    def work(process):
        options = Options(to=to, process=process, processes=3, timeout_seconds=60)
        results.append(convert(source, tmp_path / "o", options))

    workers = [threading.Thread(target=work, args=(process,)) for process in (2, 1, 0)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 3 and len(set(map(str, results))) == 1
    assert tree(tmp_path / "o") == tree(tmp_path / "whole")


def test_a_process_that_does_not_come(tmp_path, small_blocks):
    """Red when process 0 finishes without the others, or waits for ever."""
    source = tiny_hf.write(tmp_path / "hf")
    options = Options(to="hf", processes=2, timeout_seconds=0.5)
    with pytest.raises(ConversionError, match=r"\d+ of \d+ blocks of the other processes"):
        convert(source, tmp_path / "o", options)
    assert not (tmp_path / "o").exists()
    second = dataclasses.replace(options, process=1)
    with pytest.raises(ConversionError, match="process 0 has not finished"):
        convert(source, tmp_path / "o", second)
    convert(source, tmp_path / "o", options)
    assert verify(source, tmp_path / "o") == []


@pytest.mark.parametrize("bad", ["model.norm.weight", "lm_head.weight"])
def test_what_one_process_finds_impossible_ends_all(tmp_path, small_blocks, monkeypatch, bad):
    """Red when `fail` writes nothing, `append` does not look (the other goes on to write what
    process 0 has cleared away), or process 0 does not wait: something is left then."""
    weights = tiny_hf.weights()
    weights[bad].reshape(-1)[-1] = 1e30
    source = tiny_hf.write(tmp_path / "hf", weights)
    said, begun, run = {}, threading.Barrier(2, timeout=30), engine.run

    def together(*arguments):
        begun.wait()
        run(*arguments)

    monkeypatch.setattr(engine, "run", together)

    def work(process):
        options = Options(to="lemur", dtype="float16", processes=2, process=process)
        with pytest.raises(ConversionError) as raised:
            convert(source, tmp_path / "o", options)
        said[process] = str(raised.value)

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in (1, 0)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert len(said) == 2 and all("1e+30" in text for text in said.values()), said
    assert sum("has failed" in text for text in said.values()) <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_destination_that_is_a_link(tmp_path):
    """Red when the link is renamed over, or what is unfinished lies beside the link."""
    source = tiny_hf.write(tmp_path / "hf")
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name in ("empty", "dangling"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "disk" / name)
        convert(source, link, Options(to="hf"))
        assert link.is_symlink() and verify(source, tmp_path / "disk" / name) == []
    with pytest.raises(ConversionError, match="empty name"):
        convert(source, "", Options(to="hf"))
    with pytest.raises(ConversionError, match="where a disk is mounted"):
        convert(source, "/proc", Options(to="hf"))


def test_through_tensorstore_as_on_an_object_store(tmp_path, small_blocks, monkeypatch):
    """Red when `_filled` puts ones behind the array, or a chunk is named by its first element."""
    source = tiny_hf.write(tmp_path / "hf")

    def uneven(leaf, shards):  # chunks that do not divide their leaf
        return tuple(max(1, 2 * size // 3) for size in leaf.shape)

    monkeypatch.setattr(chunks, "_chunks", uneven)
    convert(source, tmp_path / "files", Options(to="lemur"))
    make = ChunksTarget.__init__

    def remote(self, *arguments):
        make(self, *arguments)
        self._local = False

    monkeypatch.setattr(ChunksTarget, "__init__", remote)
    convert(source, tmp_path / "stores", Options(to="lemur"))
    assert tree(tmp_path / "stores") == tree(tmp_path / "files")
    assert verify(source, tmp_path / "stores") == []


def test_chunks_of_a_mesh(tmp_path, monkeypatch):
    """Red when --mesh is ignored, or chunks do not divide what a device holds."""
    source = tiny_hf.write(tmp_path / "hf")
    monkeypatch.setattr(grain, "ALONE_BYTES", 64)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    step_dir = convert(source, tmp_path / "o", Options(to="lemur", mesh=mesh))
    entry = checkpoint.describe(step_dir).arrays["params/layers/wq"]
    opened = checkpoint.OpenArray(step_dir, "params/layers/wq", entry)
    assert entry.shape == (2, 16, 4, 4) and opened.chunks == (1, 8, 2, 4)
    model, _ = load_model(step_dir, mesh=make_mesh(mesh, jax.devices()[:8]))
    assert model.config.embed == 16
    assert verify(source, tmp_path / "o") == []
    with pytest.raises(ConversionError, match=r"--mesh: fsdp=3 does not divide 16, axis"):
        convert(source, tmp_path / "p", Options(to="lemur", mesh=MeshConfig(fsdp=3)))
    with pytest.raises(ConversionError, match="of checkpoints of ours"):
        Options(to="hf", mesh=mesh)


# ---------------------------------------------------------------------------------------------
# Casts and comparisons
# ---------------------------------------------------------------------------------------------


def test_a_cast_says_what_it_costs(tmp_path, small_blocks):
    """Red when errors of blocks are added up, or taken of the last block."""
    weights = tiny_hf.weights()
    source, said = tiny_hf.write(tmp_path / "hf", weights), []
    convert(source, tmp_path / "o", Options(to="hf", dtype="bfloat16"), say=said.append)
    report = json.loads((tmp_path / "o" / "conversion.json").read_text())
    cast = report["about"]["cast"]["layers/w_up"]
    old = np.stack([weights[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(2)]).astype(
        float
    )
    new = old.astype("float32").astype("bfloat16").astype(float)
    assert cast["absolute"] == np.abs(new - old).max()
    assert cast["relative"] == (np.abs(new - old) / np.abs(old)).max()
    assert cast["changed"] == np.count_nonzero(new != old)
    assert any(line.startswith("cast layers/w_up: float32 -> bfloat16, ") for line in said)
    convert(source, tmp_path / "p", Options(to="hf"))
    report = json.loads((tmp_path / "p" / "conversion.json").read_text())
    assert report["about"]["cast"] == {}
    entries = checkpoint.describe(import_hf(source, tmp_path / "q")).arrays
    assert {f"params/{n}": leaf["digest"] for n, leaf in report["leaves"].items()} == {
        n: entry.digest for n, entry in entries.items()
    }


def test_verify_names_what_differs(tmp_path, small_blocks):
    """Red when only the first leaf is compared, or -0.0 is 0.0."""
    weights = tiny_hf.weights()
    source = tiny_hf.write(tmp_path / "hf", weights)
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][3, 5] += 0.5
    weights["model.norm.weight"][:] = -0.0
    other = tiny_hf.write(tmp_path / "other", weights | {"model.norm.weight": np.zeros(16, "f4")})
    same = tiny_hf.write(tmp_path / "same", weights)
    found = {d.name: d for d in verify(source, other)}
    assert set(found) == {"layers/w_down", "norm"}
    assert found["layers/w_down"].index == (1, 5, 3) and found["layers/w_down"].count == 1
    assert name in str(found["layers/w_down"]) and "model.safetensors" in str(
        found["layers/w_down"]
    )
    assert abs(found["layers/w_down"].largest - 0.5) < 1e-6
    assert [d.name for d in verify(other, same)] == ["norm"]
    config = tiny_hf.CONFIG | {"rope_theta": 5e5, "rms_norm_eps": 1e-6}
    changed = tiny_hf.write(tmp_path / "changed", tiny_hf.weights(), config)
    with pytest.raises(ConversionError) as caught:
        verify(source, changed)
    assert "ModelConfig.rope" in str(caught.value) and "norm_eps" in str(caught.value)


def test_verify_across_dtypes(tmp_path):
    """Red when a rounding counts as equal, or an exact widening as a difference."""
    source = tiny_hf.write(tmp_path / "hf")
    convert(source, tmp_path / "half", Options(to="lemur", dtype="bfloat16"))
    convert(tmp_path / "half", tmp_path / "wide", Options(to="hf", dtype="float32"))
    said = []
    assert verify(tmp_path / "half", tmp_path / "wide", say=said.append) == []
    assert "in float32: 12 leaves have other dtypes" in said[0]
    assert len(verify(source, tmp_path / "half")) == 12
    assert verify(source, tmp_path / "half", dtype="bfloat16") == []


def test_a_flipped_bit_is_found_by_the_report(tmp_path):
    """Red when conversion.json is not compared with what is read."""
    convert(tiny_hf.write(tmp_path / "hf"), tmp_path / "o", Options(to="hf"))
    path = tmp_path / "o" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-10] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ConversionError, match=r"damaged: the digest of 'head'.*lm_head.weight"):
        convert(tmp_path / "o", tmp_path / "p", Options(to="lemur"))
    assert not (tmp_path / "p").exists() and not list(tmp_path.glob(".p*"))


# ---------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------


def test_all_options_are_checked():
    """Red when a flag passes that no target understands."""
    with pytest.raises(ConversionError, match="--process=2 must be from 0 to --processes=2"):
        Options(to="hf", process=2, processes=2)
    with pytest.raises(ConversionError, match="--to=gguf is unknown; legal: hf, lemur, easylm"):
        Options(to="gguf")
