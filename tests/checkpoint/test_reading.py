"""Reading: what was saved comes back, whole or in parts, and no other file is opened.

Each docstring ends with the one-line mutation that turns its test red.
"""

import ctypes
import functools
import os
import random
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from saved_arrays import (
    ABOUT,
    FILES,
    LATE_COMPLAINTS,
    LAYOUT,
    PARAMS,
    assert_same_bits,
    host_arrays,
    make_mesh,
    on,
    overwrite_value,
    place,
    save_steps,
    split,
    targets_on,
)

from lemur_jax import checkpoint
from lemur_jax.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    TargetMismatchError,
    digest,
    items,
    manifest,
)

pytestmark = LATE_COMPLAINTS


@pytest.mark.parametrize("seed", range(4))
def test_random_mesh_to_random_mesh_to_one_device(tmp_path, seed):
    """Bitwise, every dtype and scalars, onto targets and onto the host. Red: restore with the
    shape of one shard, or ignore `targets[name].sharding`."""
    rng = random.Random(seed)
    meshes = [(8, 1), (1, 8), (4, 2), (2, 4), (2, 2), (1, 1), (1, 2)]
    arrays = host_arrays(seed)
    save_steps(tmp_path, seed, mesh=make_mesh(*rng.choice(meshes)))
    step_dir = checkpoint.resolve(tmp_path)
    items = ("params", "opt")
    for mesh in (make_mesh(*rng.choice(meshes)), make_mesh(1, 1)):
        targets = targets_on(mesh)
        got = checkpoint.restore(step_dir, items, targets)
        assert_same_bits(got, arrays)
        assert all(got[n].sharding == targets[n].sharding for n in got)
    on_host = checkpoint.restore(step_dir, items)
    assert all(type(array) is np.ndarray for array in on_host.values())
    assert_same_bits(on_host, arrays)


def test_manifest_and_files(tmp_path):
    """Manifest and small files come back as given. Red: leave `about` or a file out of the save."""
    save_steps(tmp_path, 7)
    manifest = checkpoint.describe(tmp_path / "7")
    assert manifest.step == 7
    assert manifest.jax_version == jax.__version__
    assert manifest.about == {**ABOUT, "step": 7}
    assert {n: (e.shape, e.dtype) for n, e in manifest.arrays.items()} == {
        n: (shape, dtype) for n, (shape, dtype, _) in LAYOUT.items()
    }
    want = {n: digest.digest_numpy(a) for n, a in host_arrays(7).items()}
    assert {n: e.digest for n, e in manifest.arrays.items()} == want
    assert {n: checkpoint.read_file(tmp_path / "7", n) for n in manifest.files} == FILES
    with pytest.raises(CheckpointError, match=r"nothing.txt is not part .* config.gin"):
        checkpoint.read_file(tmp_path / "7", "nothing.txt")


class WatchOpens:
    """Counts opens of files below a directory, also by C++ (Linux inotify)."""

    IN_OPEN, IN_ISDIR, IN_NONBLOCK = 0x20, 0x40000000, 0x800

    def __init__(self, top: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(self.IN_NONBLOCK)
        for directory in [top, *(path for path in top.rglob("*") if path.is_dir())]:
            assert libc.inotify_add_watch(self._descriptor, bytes(directory), self.IN_OPEN) > 0

    def count(self) -> int:
        opened = 0
        try:
            data = os.read(self._descriptor, 1 << 20)
        except BlockingIOError:
            return 0
        while data:
            mask, length = (int.from_bytes(data[i : i + 4], "little") for i in (4, 12))
            opened += not mask & self.IN_ISDIR
            data = data[16 + length :]
        return opened

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")
def test_params_only_opens_no_optimizer_file(tmp_path):
    """Red: `restore` reads all items and drops what was not asked for."""
    save_steps(tmp_path, 1)
    watch = {item: WatchOpens(tmp_path / "1" / item) for item in ("params", "opt")}
    got = checkpoint.restore(tmp_path / "1", ("params",), targets_on(make_mesh(2, 4), PARAMS))
    checkpoint.restore_latest(tmp_path, ("params",), None, report=pytest.fail)
    list(checkpoint.read_slices(tmp_path / "1", "params/embed"))
    opened = {item: watcher.count() for item, watcher in watch.items()}
    for watcher in watch.values():
        watcher.close()
    assert_same_bits(got, {n: a for n, a in host_arrays(1).items() if n in PARAMS})
    assert opened["opt"] == 0
    assert opened["params"] > 0


def test_params_only_with_the_optimizer_gone(tmp_path):
    """Red: `restore` reads all items and drops what was not asked for."""
    save_steps(tmp_path, 1)
    shutil.rmtree(tmp_path / "1" / "opt")
    got = checkpoint.restore(tmp_path / "1", ("params",), targets_on(make_mesh(2, 4), PARAMS))
    assert_same_bits(got, {n: a for n, a in host_arrays(1).items() if n in PARAMS})
    with pytest.raises(CheckpointError, match="unreadable checkpoint: opt/mu/embed"):
        checkpoint.restore(tmp_path / "1", ("opt",))


def _bytes_read() -> int:
    """Bytes that this process has read from files so far, C++ included."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/io")
def test_one_tensor_at_a_time(tmp_path):
    """`read_tensor` and `restore(names=)` read no other tensor's data. Red: `wanted` from
    `manifest.arrays` instead of `entries` in `restore`."""
    mesh = make_mesh(1, 1)
    arrays = {f"params/{i}": np.full((256, 1024), i, np.float32) for i in range(4)}
    placed = {n: jax.device_put(a, on(mesh, ())) for n, a in arrays.items()}
    with CheckpointWriter(tmp_path, keep_latest=1) as writer:
        writer.save(1, {"params": placed}, {})
    for name, array in arrays.items():
        before = _bytes_read()
        got = checkpoint.read_tensor(tmp_path / "1", name)
        assert 1.0 <= (_bytes_read() - before) / array.nbytes < 1.9
        assert_same_bits({name: got}, {name: array})
    before = _bytes_read()
    checkpoint.restore(tmp_path / "1")
    assert 4.0 <= (_bytes_read() - before) / array.nbytes < 4.9
    overwrite_value(tmp_path / "1", arrays["params/2"])
    got = checkpoint.restore(tmp_path / "1", names=["params/3", "params/1"])
    assert list(got) == ["params/3", "params/1"]
    with pytest.raises(CheckpointError, match=r"digest of params/2 \(in .*/1/params\)"):
        checkpoint.read_tensor(tmp_path / "1", "params/2")
    assert checkpoint.read_tensor(tmp_path / "1", "params/2", verify=False).shape == (256, 1024)
    with pytest.raises(TargetMismatchError, match="no array params/9"):
        checkpoint.read_tensor(tmp_path / "1", "params/9")


def test_slices_of_a_stacked_tensor(tmp_path):
    """Layers one at a time, each in a chunk of its own, and damage found at the end. Red: drop
    `shard_axes` in `save_args` (chunks span layers), or the comparison in `read_slices`."""
    array = np.random.default_rng(0).standard_normal((4, 256, 512)).astype(np.float32)
    mesh = make_mesh(1, 1)
    with CheckpointWriter(tmp_path, keep_latest=1) as writer:
        writer.save(1, {"params": {"params/w": jax.device_put(array, on(mesh, ()))}}, {})
    store = items.open_array(epath.Path(tmp_path) / "1/params", "params/w").result()
    assert store.chunk_layout.read_chunk.shape == (1, 256, 512)
    got = np.stack(list(checkpoint.read_slices(tmp_path / "1", "params/w")))
    assert_same_bits({"w": got}, {"w": array})
    overwrite_value(tmp_path / "1", array[2])
    slices = checkpoint.read_slices(tmp_path / "1", "params/w")
    with pytest.raises(CheckpointError, match=r"digest of params/w \(in "):
        for _ in range(5):
            next(slices)


def test_targets_that_do_not_fit(tmp_path):
    """All mismatches in one error, before any data is read. Red: drop any `problems.append` in
    `_check_targets`, or call it after reading."""
    save_steps(tmp_path, 1)
    targets = targets_on(make_mesh(4, 2), PARAMS)
    sharding = targets["params/embed"].sharding
    del targets["params/half"]
    targets["params/new"] = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
    targets["params/embed"] = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=sharding)
    targets["params/mask"] = jax.ShapeDtypeStruct((16, 8), jnp.int8, sharding=sharding)
    targets["params/layers/norm"] = jax.ShapeDtypeStruct((3, 16), jnp.float32)
    shutil.rmtree(tmp_path / "1" / "params")  # nothing may be read
    with pytest.raises(TargetMismatchError) as caught:
        checkpoint.restore(tmp_path / "1", ("params",), targets)
    for part in (
        "the checkpoint lacks params/new",
        "more than the targets: params/half",
        "params/embed: saved shape (512, 64), target (64, 512)",
        "params/mask: saved dtype bool, target int8",
        "params/layers/norm: the target has no sharding",
    ):
        assert part in str(caught.value)
    with pytest.raises(TargetMismatchError, match="no item ema; it has opt, params"):
        checkpoint.restore(tmp_path / "1", ("ema",))


def test_mismatch_does_not_fall_back(tmp_path):
    """A model that does not fit is not a damaged checkpoint. Red: drop `except
    TargetMismatchError: raise` in `restore_latest`."""
    save_steps(tmp_path, 1, 2)
    targets = targets_on(make_mesh(4, 2), PARAMS)
    del targets["params/half"]
    with pytest.raises(TargetMismatchError, match="params/half"):
        checkpoint.restore_latest(tmp_path, ("params",), targets, report=pytest.fail)


def test_incomplete_directories_are_ignored_and_named(tmp_path):
    """Red: `complete_steps` without the test for the manifest."""
    run = tmp_path / "run"
    directory = run / "checkpoints"
    save_steps(directory, 1, 2)
    (directory / "2" / "manifest.json").unlink()
    (directory / "3.orbax-checkpoint-tmp").mkdir()
    (directory / "04").mkdir()
    assert checkpoint.complete_steps(directory) == [1]
    for path in (run, directory, directory / "1"):
        assert checkpoint.resolve(path) == directory / "1"
    assert checkpoint.latest(directory) == directory / "1"
    with pytest.raises(CheckpointError, match=r"/2 is not a complete .* beside it: 1"):
        checkpoint.resolve(directory / "2")
    with pytest.raises(CheckpointError, match="2 is not a complete checkpoint"):
        checkpoint.describe(directory / "2")
    shutil.rmtree(directory / "1")
    with pytest.raises(CheckpointError, match=r"looked for <step>/manifest.json.*: .*2, 3.orbax"):
        checkpoint.resolve(run)
    assert checkpoint.latest(directory) is None
    assert checkpoint.complete_steps(tmp_path / "nowhere") == []
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        checkpoint.resolve(tmp_path / "nowhere")


def test_relative_paths(tmp_path, monkeypatch):
    """Every reader takes a path from the working directory, as text or as a Path. Red: `return
    epath.Path(path)` in `manifest.absolute` (Orbax then calls the checkpoint unreadable)."""
    directory = tmp_path / "run" / "checkpoints"
    save_steps(directory, 1)
    want = {n: a for n, a in host_arrays(1).items() if n in PARAMS}
    name = "params/layers/wq"
    monkeypatch.chdir(tmp_path)
    for path in ("run/checkpoints/1", Path("run/checkpoints/1")):
        assert_same_bits(checkpoint.restore(path), want)
        assert_same_bits({name: checkpoint.read_tensor(path, name)}, {name: want[name]})
        assert_same_bits(
            {name: np.stack(list(checkpoint.read_slices(path, name)))}, {name: want[name]}
        )
        assert checkpoint.describe(path) == checkpoint.describe(directory / "1")
        assert checkpoint.read_file(path, "config.gin") == FILES["config.gin"]
    assert checkpoint.resolve("run") == directory / "1"
    assert checkpoint.latest("run/checkpoints") == directory / "1"
    step_dir, got = checkpoint.restore_latest(
        "run/checkpoints", ("params",), targets_on(make_mesh(4, 2), PARAMS), report=pytest.fail
    )
    assert step_dir == directory / "1"
    assert_same_bits(got, want)
    assert str(manifest.absolute("s3://bucket/run")) == "s3://bucket/run"


def test_an_object_store_that_cannot_be_read_is_named(monkeypatch):
    """Red if the package were left to be missed in the middle of a conversion."""
    with pytest.raises(checkpoint.CheckpointError, match="az:// is not known; legal: gs://, s3://"):
        checkpoint.resolve("az://bucket/run")
    monkeypatch.setattr(manifest.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(checkpoint.CheckpointError, match="pip install gcsfs"):
        checkpoint.resolve("gs://bucket/run")


def test_transfer_guard(tmp_path):
    """Saving and restoring work inside a loop that forbids implicit transfers. Red: drop
    `jax.transfer_guard("allow")` around the digests of `restore` (red on an accelerator only:
    the guard does not see CPU copies)."""
    arrays = split(place(host_arrays(1), make_mesh(4, 2)))
    targets = targets_on(make_mesh(2, 4), PARAMS)
    with jax.transfer_guard("disallow"):
        with CheckpointWriter(tmp_path, keep_latest=1) as writer:
            writer.save(1, arrays, ABOUT)
        checkpoint.restore(tmp_path / "1", ("params",), targets)


def test_resume_is_bitwise(tmp_path):
    """20 steps = 10 + save + restore + 10, with the data position from the checkpoint, from and
    to the same mesh. Red: leave the step or the moments out of the restore."""
    mesh = make_mesh(4, 2)
    layout = {"params/w": ("x", "y"), "opt/mu/w": ("x", "y"), "step": ()}
    shapes = {"params/w": (64, 32), "opt/mu/w": (64, 32), "step": ()}

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state, batch):
        w, mu, step = state["params/w"], state["opt/mu/w"], state["step"]
        gradient = jax.grad(lambda w: jnp.mean(jnp.tanh(batch @ w) ** 2))(w)
        mu = 0.9 * mu + gradient
        return {"params/w": w - mu / (1 + step), "opt/mu/w": mu, "step": step + 1}

    def batch(position):
        return np.random.default_rng(position).standard_normal((16, 64)).astype(np.float32)

    def start():
        w = np.random.default_rng(9).standard_normal((64, 32)).astype(np.float32)
        state = {"params/w": w, "opt/mu/w": np.zeros_like(w), "step": np.int32(0)}
        return {name: jax.device_put(a, on(mesh, layout[name])) for name, a in state.items()}

    straight = start()
    for position in range(20):
        straight = train(straight, batch(position))
    state = start()
    with CheckpointWriter(tmp_path, keep_latest=1) as writer:
        for position in range(13):  # three more than are saved: they must not matter
            if position == 10:
                writer.save(10, split(state), {"data": {"position": position}})
            state = train(state, batch(position))
    targets = {
        name: jax.ShapeDtypeStruct(
            shapes[name], jnp.int32 if name == "step" else jnp.float32, sharding=on(mesh, axes)
        )
        for name, axes in layout.items()
    }
    step_dir, state = checkpoint.restore_latest(
        tmp_path, ("params", "opt"), targets, report=pytest.fail
    )
    for position in range(checkpoint.describe(step_dir).about["data"]["position"], 20):
        state = train(state, batch(position))
    assert_same_bits(state, straight)
