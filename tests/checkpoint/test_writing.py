"""Writing: what is on disk when, which checkpoints stay, and saves that fail.

Each docstring ends with the one-line mutation that turns its test red.
"""

import functools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_arrays import (
    ABOUT,
    FILES,
    LATE_COMPLAINTS,
    assert_same_bits,
    host_arrays,
    make_mesh,
    on,
    place,
    save_steps,
    split,
)

from lemur_jax import checkpoint
from lemur_jax.checkpoint import CheckpointError, CheckpointWriter, write

pytestmark = LATE_COMPLAINTS
ROOT = Path(__file__).resolve().parents[2]


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
    """Red: in `Keeper.make_room`, remove what the new step will displace."""
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
    dropped in `prune`."""
    save_steps(tmp_path, 3)
    save_steps(tmp_path, 2, keep_latest=1)
    assert checkpoint.complete_steps(tmp_path) == [2, 3]


def _no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_same_step_again_replaces(tmp_path, monkeypatch):
    """Saving a step that exists replaces it when whole, and gives it back when not. Red: drop the
    rename back in `Keeper.undo`, or the removal of what was set aside in `prune`."""
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
    monkeypatch.setattr(write.ocp.AsyncCheckpointer, "save", _no_space)
    with pytest.raises(CheckpointError, match=r"step 1 .* checkpoint 1 is intact.*No space left"):
        writer.save(1, split(place(host_arrays(2), make_mesh(4, 2))), ABOUT)
    assert_same_bits(checkpoint.restore(tmp_path / "1", ("params", "opt")), host_arrays(1))


@pytest.mark.parametrize("megabytes_left", [0, 6])
def test_disk_full(tmp_path, stragglers, megabytes_left):
    """On a really full disk: a clear error, nothing half-written stays, the checkpoint before is
    whole, and after making space the same writer saves. Red: drop `_remove_half_written` in
    `undo` (the last save then finds no space), or swallow the error in `_finish`."""
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
    from etils import epath
    from lemur_jax import checkpoint
    from lemur_jax.checkpoint import keep

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    directory, point = sys.argv[1:]
    arrays = {"params": {"params/w": jax.numpy.full((64, 1024, 64), 2.0)}}
    if point == "while Orbax writes":
        checkpoint.CheckpointWriter._finish = die
    elif point == "before the manifest":
        checkpoint.CheckpointWriter._write_manifest = die
    elif point == "inside the manifest":
        os.replace = die
    elif point == "before deleting old ones":
        keep.Keeper.prune = die
    elif point == "while deleting old ones":
        epath.Path.rmtree = die
        type(epath.Path(".")).rmtree = die
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
