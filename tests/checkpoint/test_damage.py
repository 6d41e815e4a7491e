"""Damage: whatever breaks on disk is noticed, named, and never taken for the real thing.

Each docstring ends with the one-line mutation that turns its test red.
"""

import json
import random
import shutil

import pytest
from saved_arrays import (
    LATE_COMPLAINTS,
    PARAMS,
    assert_same_bits,
    host_arrays,
    make_mesh,
    overwrite_value,
    save_steps,
    targets_on,
)

from lemur_jax import checkpoint
from lemur_jax.checkpoint import CheckpointError

pytestmark = LATE_COMPLAINTS


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
        overwrite_value(tmp_path / "copy", host_arrays(1)[name])
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
    overwrite_value(tmp_path / "3", host_arrays(3)["params/embed"])
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
