"""Checkpoints: what is on disk, what comes back, and what happens when something breaks.

Each docstring ends with the one-line mutation that turns its test red.
"""

import ctypes
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax import checkpoint, digest
from lemur_jax.checkpoint import CheckpointError, CheckpointWriter, TargetMismatchError

ROOT = Path(__file__).parent.parent

# name -> (shape, dtype, partition over the mesh axes x and y); sizes divide by 8. The large ones
# are stored in data files; OCDBT puts small values into its index, where checksums guard them.
LAYOUT = {
    "params/embed": ((512, 64), "float32", ("x", "y")),
    "params/layers/wq": ((3, 64, 32, 16), "bfloat16", (None, "x", "y")),
    "params/layers/norm": ((3, 16), "float32", (None, "y")),
    "params/half": ((64, 512), "float16", ("y",)),
    "params/mask": ((16, 8), "bool", ("x",)),
    "opt/mu/embed": ((512, 64), "float32", ("y", "x")),
    "opt/count": ((), "int32", ()),
    "step": ((), "int32", ()),
}
ABOUT = {"model": {"layers": 3, "rope": {"theta": 1e4}}, "data": {"position": 2**40 + 1}}
FILES = {"config.gin": b"A.b = 1\n", "tokenizer/tokenizer.model": bytes(range(256))}


# When one of many reads or writes fails, Orbax closes its event loop under the others, whose
# complaints come a moment later, as "unraisable" exceptions.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def stragglers():
    """Lets the complaints come while this module, which expects them, still runs."""
    yield
    time.sleep(0.3)


def make_mesh(x: int, y: int) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: x * y]).reshape(x, y)
    return jax.sharding.Mesh(devices, ("x", "y"))


def on(mesh: jax.sharding.Mesh, axes: tuple) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def host_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Random bits of every dtype: NaNs with payloads, infinities and denormals included."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, (shape, dtype, _) in LAYOUT.items():
        if dtype == "bool":
            arrays[name] = rng.random(shape) < 0.5
        else:
            size = jnp.dtype(dtype).itemsize
            bits = rng.integers(0, 256, (*shape, size), dtype=np.uint8)
            arrays[name] = bits.view(jnp.dtype(dtype)).reshape(shape)
    return arrays


def place(arrays: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    return {n: jax.device_put(a, on(mesh, LAYOUT[n][2])) for n, a in arrays.items()}


def split(arrays: dict) -> dict[str, dict]:
    is_param = {name: name.startswith("params/") for name in arrays}
    return {
        "params": {n: a for n, a in arrays.items() if is_param[n]},
        "opt": {n: a for n, a in arrays.items() if not is_param[n]},
    }


def targets_on(mesh: jax.sharding.Mesh, names=LAYOUT) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        n: jax.ShapeDtypeStruct(LAYOUT[n][0], LAYOUT[n][1], sharding=on(mesh, LAYOUT[n][2]))
        for n in names
    }


def assert_same_bits(got: dict, want: dict) -> None:
    assert sorted(got) == sorted(want)
    for name in want:
        a, b = np.asarray(got[name]), np.asarray(want[name])
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert a.tobytes() == b.tobytes(), name


def save_steps(directory: Path, *steps: int, mesh=None, keep_latest=10) -> None:
    """Complete checkpoints; that of step s holds host_arrays(s)."""
    with CheckpointWriter(directory, keep_latest=keep_latest) as writer:
        for step in steps:
            arrays = place(host_arrays(step), mesh or make_mesh(4, 2))
            writer.save(step, split(arrays), {**ABOUT, "step": step}, FILES)


PARAMS = sorted(name for name in LAYOUT if name.startswith("params/"))


# ---------------------------------------------------------------------------------------------
# Digests
# ---------------------------------------------------------------------------------------------


def test_digest_does_not_depend_on_devices():
    """8 devices = 1 device = numpy, every dtype. Red: `iota` of the shard instead of the array
    (or `shape[axis]` left out of the coordinates in `StreamingDigest.add`)."""
    arrays = host_arrays()
    want = {name: digest.digest_numpy(array) for name, array in arrays.items()}
    for mesh in (make_mesh(1, 1), make_mesh(4, 2), make_mesh(2, 4), make_mesh(1, 8)):
        assert digest.digest_arrays(place(arrays, mesh)) == want
    assert all(len(value) == 16 and int(value, 16) for value in want.values())


def test_digest_of_mixed_device_sets():
    """Arrays on several meshes and on one device in one call. Red: `_devices_of` returns one
    constant group."""
    arrays = host_arrays()
    placed = place(arrays, make_mesh(4, 2))
    placed["params/embed"] = place(arrays, make_mesh(2, 1))["params/embed"]
    placed["step"] = jnp.asarray(arrays["step"])
    want = {name: digest.digest_numpy(array) for name, array in arrays.items()}
    assert digest.digest_arrays(placed) == want


def test_digest_is_pinned():
    """The value is part of the disk format. Red: any change of a constant in digest.py."""
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert digest.digest_numpy(array) == "9e86e2c6991fea89"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_digest_notices(dtype):
    """Any flipped bit, swapped elements, rows, layers, transposes. Red: leave `where` out of
    `bits ^ where` (swaps pass), or `bits` out of it (flips pass)."""
    rng = np.random.default_rng(1)
    array = rng.integers(0, 256, (4, 4, 8 * jnp.dtype(dtype).itemsize), dtype=np.uint8)
    array = array.view(jnp.dtype(dtype))
    changed = []
    for _ in range(200):
        copy = array.copy()
        copy.view(np.uint8).reshape(-1)[rng.integers(copy.nbytes)] ^= 1 << rng.integers(8)
        changed.append(copy)
    for axis in range(3):
        changed.append(np.roll(array, 1, axis))
        changed.append(np.flip(array, axis))
        swapped = np.moveaxis(array.copy(), axis, 0)
        swapped[[0, 1]] = swapped[[1, 0]]
        changed.append(np.moveaxis(swapped, 0, axis))
    one = array.copy()
    one[0, 0, 0], one[3, 2, 1] = array[3, 2, 1], array[0, 0, 0]
    changed += [one, array.swapaxes(0, 1), np.zeros_like(array)]
    values = {digest.digest_numpy(array)} | {digest.digest_numpy(c) for c in changed}
    distinct = {array.tobytes()} | {c.tobytes() for c in changed}
    assert len(values) == len(distinct) > 150


def test_digest_streams_in_any_order(monkeypatch):
    """Blocks with offsets add up to the whole. Red: ignore `offset` in `add`, or drop the upper
    half where `add` cuts a large block."""
    array = np.random.default_rng(2).standard_normal((5, 7, 9)).astype(np.float32)
    whole = digest.digest_numpy(array)
    stream = digest.StreamingDigest()
    for layer in (3, 0, 4, 2, 1):
        for start in (6, 0, 3):
            stream.add(array[layer : layer + 1, :, start : start + 3], (layer, 0, start))
    assert stream.hexdigest() == whole
    monkeypatch.setattr(digest, "_BLOCK_ELEMENTS", 10)
    assert digest.digest_numpy(array) == whole
    with pytest.raises(ValueError, match="3 coordinates"):
        stream.add(array, (0,))


def test_digest_refuses_wide_types():
    """Red: add 8: np.uint64 to `_BITS` (its upper half would be ignored)."""
    with pytest.raises(TypeError, match="float64 has no digest"):
        digest.digest_numpy(np.zeros(3))


# ---------------------------------------------------------------------------------------------
# Round trips
# ---------------------------------------------------------------------------------------------


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


def test_donation_right_after_save(tmp_path):
    """What is saved is the state at the call, though its buffers are donated and rewritten at
    once. Red: start the copy to the host (`orbax.save`) in the background thread."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(arrays):
        return jax.tree.map(lambda a: a + 1, arrays)

    mesh = make_mesh(4, 2)
    arrays = {"params/w": jax.device_put(np.zeros((64, 256, 256), np.float32), on(mesh, ("x",)))}
    with CheckpointWriter(tmp_path, keep_latest=10) as writer:
        for number in range(5):
            writer.save(number, {"params": arrays}, {})
            for _ in range(3):
                arrays = step(arrays)
    for number in range(5):
        got = checkpoint.restore(tmp_path / str(number))["params/w"]
        assert (got == 3 * number).all(), number


# ---------------------------------------------------------------------------------------------
# Reading parts
# ---------------------------------------------------------------------------------------------


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
    _overwrite_value(tmp_path / "1", arrays["params/2"])
    got = checkpoint.restore(tmp_path / "1", names=["params/3", "params/1"])
    assert list(got) == ["params/3", "params/1"]
    with pytest.raises(CheckpointError, match=r"digest of params/2 \(in .*/1/params\)"):
        checkpoint.read_tensor(tmp_path / "1", "params/2")
    assert checkpoint.read_tensor(tmp_path / "1", "params/2", verify=False).shape == (256, 1024)
    with pytest.raises(TargetMismatchError, match="no array params/9"):
        checkpoint.read_tensor(tmp_path / "1", "params/9")


def _overwrite_value(step_dir: Path, array: np.ndarray) -> None:
    """Changes one byte of `array` where it is stored: as it is (no compression), and if it is
    small perhaps more than once, in nodes that OCDBT has since replaced."""
    raw = array.tobytes()
    found = 0
    for path in (step_dir / "params").rglob("*"):
        if path.is_file() and (start := path.read_bytes().find(raw)) >= 0:
            data = bytearray(path.read_bytes())
            data[start + len(raw) // 2] ^= 0x10
            path.write_bytes(data)
            found += 1
    assert found


def test_slices_of_a_stacked_tensor(tmp_path):
    """Layers one at a time, each in a chunk of its own, and damage found at the end. Red: drop
    `shard_axes` in `_save_args` (chunks span layers), or the comparison in `read_slices`."""
    array = np.random.default_rng(0).standard_normal((4, 256, 512)).astype(np.float32)
    mesh = make_mesh(1, 1)
    with CheckpointWriter(tmp_path, keep_latest=1) as writer:
        writer.save(1, {"params": {"params/w": jax.device_put(array, on(mesh, ()))}}, {})
    store = checkpoint._open(checkpoint.epath.Path(tmp_path) / "1/params", "params/w").result()
    assert store.chunk_layout.read_chunk.shape == (1, 256, 512)
    got = np.stack(list(checkpoint.read_slices(tmp_path / "1", "params/w")))
    assert_same_bits({"w": got}, {"w": array})
    _overwrite_value(tmp_path / "1", array[2])
    slices = checkpoint.read_slices(tmp_path / "1", "params/w")
    with pytest.raises(CheckpointError, match=r"digest of params/w \(in "):
        for _ in range(5):
            next(slices)


# ---------------------------------------------------------------------------------------------
# Targets that do not fit
# ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("arrays_by_item", "message"),
    [
        ({}, "no items"),
        ({"params": {}}, "'params' has no arrays"),
        ({"Params!": {"a": np.float32(1)}}, "lower-case"),
        ({"params": {"a": "numpy"}}, "a is a ndarray: give a jax.Array"),
        ({"params": {"a": "empty"}}, "a has shape (0, 3)"),
        ({"params": {"a": "ok"}, "opt": {"a": "ok"}}, "a is in items 'params' and 'opt'"),
    ],
)
def test_bad_arguments_of_save(tmp_path, arrays_by_item, message):
    """Red: drop the check that the message comes from."""
    values = {
        "numpy": np.zeros(3, np.float32),
        "empty": jnp.zeros((0, 3)),
        "ok": jnp.zeros(3),
    }
    arrays_by_item = {
        item: {n: values.get(v, v) if isinstance(v, str) else v for n, v in arrays.items()}
        for item, arrays in arrays_by_item.items()
    }
    with CheckpointWriter(tmp_path, keep_latest=1) as writer:
        with pytest.raises(CheckpointError) as caught:
            writer.save(1, arrays_by_item, {})
        assert message in str(caught.value)
        for name in ("/etc/x", "../x", "params/x", "manifest.json", ""):
            with pytest.raises(CheckpointError, match="relative path"):
                writer.save(1, {"params": {"a": jnp.zeros(3)}}, {}, {name: b""})
        with pytest.raises(CheckpointError, match="plain JSON"):
            writer.save(1, {"params": {"a": jnp.zeros(3)}}, {"x": {1, 2}})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="keep_latest=0"):
        CheckpointWriter(tmp_path, keep_latest=0)


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def test_flipped_bits_are_never_accepted(tmp_path):
    """A bit flipped anywhere: the restore fails naming the place, or (in bytes that are not part
    of the contents) gives the right arrays. Red: `verify=False` as the default, or an Orbax error
    that escapes as it is."""
    save_steps(tmp_path, 1)
    want = {n: a for n, a in host_arrays(1).items() if n in PARAMS}
    targets = targets_on(make_mesh(2, 4), PARAMS)
    rng = random.Random(0)
    caught = 0
    files = sorted(path for path in (tmp_path / "1").rglob("*") if path.is_file())
    for path in [path for path in files if "opt" not in path.parts]:
        data = path.read_bytes()
        for _ in range(3):
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                _, got = checkpoint.restore_latest(
                    tmp_path, ("params",), targets, report=lambda line: None
                )
                assert_same_bits(got, want)
            except CheckpointError as error:
                assert str(tmp_path / "1") in str(error)
                caught += 1
        path.write_bytes(data)
    assert caught >= 20  # the data files, the index, the manifest, the small files
    checkpoint.restore(tmp_path / "1", ("params",), targets)


def test_flipped_bit_is_named(tmp_path):
    """Each tensor's damage is laid to that tensor. Red: `found[name] == entry.digest` in
    `_verify`, or a wrong pairing of names and sums in `digest.collect`."""
    save_steps(tmp_path, 1, mesh=make_mesh(1, 1))
    for name in ("params/embed", "params/half", "params/layers/wq"):
        shutil.copytree(tmp_path / "1", tmp_path / "copy")
        _overwrite_value(tmp_path / "copy", host_arrays(1)[name])
        for targets in (None, targets_on(make_mesh(4, 2), PARAMS)):
            with pytest.raises(CheckpointError) as caught:
                checkpoint.restore(tmp_path / "copy", ("params",), targets)
            assert [n for n in PARAMS if n in str(caught.value)] == [name]
        shutil.rmtree(tmp_path / "copy")


def test_lost_data_file(tmp_path, stragglers):
    """Red: `fill_missing_data_reads` true, or an Orbax error that escapes as it is."""
    save_steps(tmp_path, 1)
    shutil.rmtree(tmp_path / "1" / "params" / "ocdbt.process_0" / "d")
    with pytest.raises(CheckpointError, match=r"unreadable checkpoint: .*params.*/1/params"):
        checkpoint.restore(tmp_path / "1")


def test_manifest_edited_by_hand(tmp_path):
    """A manifest that was changed is not believed. Red: skip the self-digest in `describe`."""
    save_steps(tmp_path, 1)
    path = tmp_path / "1" / "manifest.json"
    contents = json.loads(path.read_text())
    contents["about"]["data"]["position"] += 1
    path.write_text(json.dumps(contents))
    with pytest.raises(CheckpointError, match="do not match its own sha256"):
        checkpoint.describe(tmp_path / "1")
    contents["format_version"] = 99
    path.write_text(json.dumps(contents))
    with pytest.raises(CheckpointError, match="format_version=99"):
        checkpoint.describe(tmp_path / "1")
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.describe(tmp_path / "1")


def test_latest_verified_falls_back_loudly(tmp_path):
    """Damaged ones are reported, newest first, and the newest sound one is taken. Red: `return`
    the newest without `restore` having verified it, or drop `report(...)`."""
    save_steps(tmp_path, 1, 2, 3, mesh=make_mesh(1, 1))
    _overwrite_value(tmp_path / "3", host_arrays(3)["params/embed"])
    (tmp_path / "2" / "config.gin").write_bytes(b"A.b = 2\n")
    lines = []
    targets = targets_on(make_mesh(4, 2))
    step_dir, got = checkpoint.restore_latest(
        tmp_path, ("params", "opt"), targets, report=lines.append
    )
    assert step_dir == tmp_path / "1"
    assert_same_bits(got, host_arrays(1))
    assert len(lines) == 2
    assert "checkpoint 3 is passed over" in lines[0] and "params/embed" in lines[0]
    assert "checkpoint 2 is passed over" in lines[1] and "config.gin" in lines[1]


def test_never_starts_over_silently(tmp_path):
    """All damaged: an error that says so of each. Red: `return None` at the end."""
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        shutil.rmtree(tmp_path / str(step) / "params")
    lines = []
    with pytest.raises(CheckpointError, match=r"no sound checkpoint .*2: .*1: "):
        checkpoint.restore_latest(tmp_path, ("params",), None, report=lines.append)
    assert len(lines) == 2
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        (tmp_path / "empty").mkdir()
        checkpoint.restore_latest(tmp_path / "empty", ("params",), None, report=lines.append)


# ---------------------------------------------------------------------------------------------
# Which directories are checkpoints
# ---------------------------------------------------------------------------------------------


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


def test_keep_policy(tmp_path):
    """The newest 2 and multiples of 10 stay. Red: `not old % every`, or `past[:-1]`."""
    arrays = {"params": {"params/w": jnp.zeros(8)}}
    with CheckpointWriter(tmp_path, keep_latest=2, keep_every_steps=10) as writer:
        for step in (5, 10, 15, 20, 25, 30, 35, 37):
            writer.save(step, arrays, {})
    assert checkpoint.complete_steps(tmp_path) == [10, 20, 30, 35, 37]
    with CheckpointWriter(tmp_path, keep_latest=1) as writer:
        writer.save(40, arrays, {})
    assert checkpoint.complete_steps(tmp_path) == [40]


def test_old_ones_go_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    """Red: in `_make_room`, remove what the new step will displace."""
    save_steps(tmp_path, 1, keep_latest=1)
    seen = []
    original = CheckpointWriter._write_manifest

    def spy(self, *args):
        seen.append(checkpoint.complete_steps(tmp_path))
        original(self, *args)

    monkeypatch.setattr(CheckpointWriter, "_write_manifest", spy)
    save_steps(tmp_path, 2, keep_latest=1)
    assert seen == [[1]]
    assert checkpoint.complete_steps(tmp_path) == [2]


def test_checkpoints_of_an_abandoned_future_are_left_alone(tmp_path):
    """After a fallback to 1, saving 2 must not be deleted in favour of 3. Red: `if s <= step`
    dropped in `_prune`."""
    save_steps(tmp_path, 3)
    save_steps(tmp_path, 2, keep_latest=1)
    assert checkpoint.complete_steps(tmp_path) == [2, 3]


def test_same_step_again_replaces(tmp_path, monkeypatch):
    """Saving a step that exists replaces it when whole, and gives it back when not. Red: drop the
    rename back in `_abandon`, or the removal of what was set aside in `_prune`."""
    save_steps(tmp_path, 1)
    with CheckpointWriter(tmp_path, keep_latest=1) as writer:
        writer.save(1, split(place(host_arrays(99), make_mesh(2, 4))), {"second": True})
        writer.wait()
        assert checkpoint.describe(tmp_path / "1").about == {"second": True}
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        monkeypatch.setattr(CheckpointWriter, "_write_manifest", _no_space)
        writer.save(1, split(place(host_arrays(5), make_mesh(2, 4))), {"third": True})
        with pytest.raises(CheckpointError, match="No space left"):
            writer.wait()
    assert checkpoint.describe(tmp_path / "1").about == {"second": True}
    assert_same_bits(checkpoint.restore(tmp_path / "1", ("params", "opt")), host_arrays(99))


# ---------------------------------------------------------------------------------------------
# Saves that fail
# ---------------------------------------------------------------------------------------------


def _no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("surface", ["save", "wait", "close", "with", "with another error"])
def test_background_error_surfaces(tmp_path, monkeypatch, surface):
    """Reported at once, raised wherever the caller looks next, once; the writer works again after.
    Red: drop `raise error` in `wait`, `add_note` in `__exit__`, or `_report` in `_finish`."""
    save_steps(tmp_path, 1)
    arrays = split(place(host_arrays(2), make_mesh(4, 2)))
    lines = []
    writer = CheckpointWriter(tmp_path, keep_latest=1, report=lines.append)
    monkeypatch.setattr(CheckpointWriter, "_write_manifest", _no_space)
    kind = KeyError if surface == "with another error" else CheckpointError
    with pytest.raises(kind) as caught:
        if surface.startswith("with"):
            with writer:
                writer.save(2, arrays, ABOUT)
                if kind is KeyError:
                    raise KeyError("loop")
        else:
            writer.save(2, arrays, ABOUT)
            writer._thread.join()
            writer.save(3, arrays, ABOUT) if surface == "save" else getattr(writer, surface)()
    text = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    for part in ("step 2", str(tmp_path / "2"), "previous checkpoint 1 is intact", "No space left"):
        assert part in text
    assert len(lines) == 1 and "No space left" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    monkeypatch.undo()
    writer.wait()
    writer.save(3, arrays, ABOUT)
    writer.close()
    assert checkpoint.complete_steps(tmp_path) == [3]


def test_error_at_the_start_of_a_save(tmp_path, monkeypatch):
    """What fails before the background thread is reported and cleaned the same way. Red: leave
    `_abandon` out of `save`."""
    save_steps(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, keep_latest=1)
    monkeypatch.setattr(checkpoint.ocp.AsyncCheckpointer, "save", _no_space)
    with pytest.raises(CheckpointError, match=r"step 1 .* checkpoint 1 is intact.*No space left"):
        writer.save(1, split(place(host_arrays(2), make_mesh(4, 2))), ABOUT)
    assert_same_bits(checkpoint.restore(tmp_path / "1", ("params", "opt")), host_arrays(1))


@pytest.mark.parametrize("megabytes_left", [0, 6])
def test_disk_full(tmp_path, stragglers, megabytes_left):
    """On a really full disk: a clear error, nothing half-written stays, the checkpoint before is
    whole, and after making space the same writer saves. Red: drop `_remove_half_written` in
    `_abandon` (the last save then finds no space), or swallow the error in `_finish`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {mounted.stderr.decode().strip()}")
    try:
        directory = disk / "run" / "checkpoints"
        rng = np.random.default_rng(0)
        host = rng.standard_normal((8, 512, 640)).astype(np.float32)  # 10 MB
        arrays = {"params": {"params/w": jax.device_put(host, on(make_mesh(4, 2), (None, "x")))}}
        writer = CheckpointWriter(directory, keep_latest=5)
        writer.save(1, arrays, ABOUT, FILES)
        writer.wait()
        ballast = disk / "ballast"
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(free - megabytes_left * 2**20))
        with pytest.raises(CheckpointError) as caught:
            writer.save(2, arrays, ABOUT, FILES)
            writer.wait()
        text = str(caught.value)
        assert "step 2" in text and str(directory / "2") in text
        assert "previous checkpoint 1 is intact" in text and "Free some space" in text
        assert [path.name for path in directory.iterdir()] == ["1"]
        ballast.unlink()
        step_dir, got = checkpoint.restore_latest(directory, ("params",), None, report=pytest.fail)
        assert step_dir == directory / "1"
        assert_same_bits(got, {"params/w": host})
        writer.save(2, arrays, ABOUT, FILES)
        writer.close()
        assert checkpoint.complete_steps(directory) == [1, 2]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


KILLED = """
    import os, signal, sys
    import jax, numpy as np
    from lemur_jax import checkpoint

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    directory, point = sys.argv[1:]
    arrays = {"params": {"params/w": jax.numpy.full((64, 1024, 64), 2.0)}}
    if point == "while Orbax writes":
        checkpoint.CheckpointWriter._finish = die
    elif point == "before the manifest":
        checkpoint.CheckpointWriter._write_manifest = die
    elif point == "inside the manifest":
        checkpoint.os.replace = die
    elif point == "before deleting old ones":
        checkpoint.CheckpointWriter._prune = die
    elif point == "while deleting old ones":
        checkpoint.epath.Path.rmtree = die
        type(checkpoint.epath.Path(".")).rmtree = die
    writer = checkpoint.CheckpointWriter(directory, keep_latest=1)
    writer.save(2, arrays, {})
    writer.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "survivor"),
    [
        ("while Orbax writes", 1),
        ("before the manifest", 1),
        ("inside the manifest", 1),
        ("before deleting old ones", 2),
        ("while deleting old ones", 2),
    ],
)
def test_kill_during_a_save(tmp_path, point, survivor):
    """kill -9 at each point of a save leaves a checkpoint that verifies, and the next save cleans
    up. Red: write the manifest before `orbax.save`, or delete old ones before it is there."""
    value = {1: 1.0, 2: 2.0}
    with CheckpointWriter(tmp_path, keep_latest=1) as writer:
        writer.save(1, {"params": {"params/w": jnp.full((64, 1024, 64), 1.0)}}, {})
    script = textwrap.dedent(KILLED)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), point],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    step_dir, got = checkpoint.restore_latest(tmp_path, ("params",), None, report=pytest.fail)
    assert step_dir == tmp_path / str(survivor)
    assert (got["params/w"] == value[survivor]).all()
    with CheckpointWriter(tmp_path, keep_latest=1) as writer:
        for step in (2, 3):
            writer.save(step, {"params": {"params/w": jnp.full((4, 4), step)}}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


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
