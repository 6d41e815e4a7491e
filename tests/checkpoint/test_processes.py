"""Checkpoints written by 2 processes x 4 CPU devices over loopback, read by one process.

The workers run this same file as a script; one pair of them goes through all that a pair can
show (starting jax costs more than the rest), and prints what it saw as JSON.
Each docstring ends with the one-line mutation that turns its test red.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from saved_arrays import (
    ABOUT,
    FILES,
    LAYOUT,
    PARAMS,
    assert_same_bits,
    host_arrays,
    make_mesh,
    on,
    split,
    targets_on,
)

from lemur_jax import checkpoint
from lemur_jax.checkpoint import CheckpointError, CheckpointWriter, digest
from lemur_jax.checkpoint.agreement import Agreement

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
PROCESSES = 2
TIMEOUT_SECONDS = 240


# ---------------------------------------------------------------------------------------------
# In the workers
# ---------------------------------------------------------------------------------------------


def place(step: int, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """host_arrays(step) on a mesh that spans processes."""
    return {
        name: jax.make_array_from_callback(
            array.shape, on(mesh, LAYOUT[name][2]), lambda index, array=array: array[index]
        )
        for name, array in host_arrays(step).items()
    }


def same_shards(got: dict[str, jax.Array], want: dict[str, np.ndarray]) -> bool:
    return all(
        np.asarray(shard.data).tobytes() == want[name][shard.index].tobytes()
        for name, array in got.items()
        for shard in array.addressable_shards
    )


def failure_of(act) -> dict:
    """The CheckpointError that `act` raises and the seconds it took to come."""
    start = time.monotonic()
    try:
        act()
    except CheckpointError as error:
        return {"error": str(error), "seconds": time.monotonic() - start}
    return {"error": "", "seconds": 0.0}


def work(process: int, port: int, directory: Path) -> dict:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, process)
    from jax._src import distributed

    assert jax.process_count() == PROCESSES and jax.local_device_count() == 4
    seen: dict = {}

    # Saves, each from another mesh; the third is of the state that a donated step overwrites.
    meshes = {1: make_mesh(2, 4), 2: make_mesh(8, 1), 3: make_mesh(4, 2)}
    writer = CheckpointWriter(directory / "shared", keep_latest=2, timeout_seconds=60)
    for step, mesh in meshes.items():
        writer.save(step, split(place(step, mesh)), ABOUT, FILES)
    writer.close()

    # Restore on these processes, onto another mesh.
    lines: list[str] = []
    step_dir, got = checkpoint.restore_latest(
        directory / "shared", ("params", "opt"), targets_on(make_mesh(1, 8)), report=lines.append
    )
    seen["restored"] = [step_dir.name, same_shards(got, host_arrays(3)), lines]

    # One process cannot read: both pass that checkpoint over.
    if process == 0:
        shutil.copytree(directory / "shared", directory / "partly")
        shutil.rmtree(directory / "partly" / "3" / "params" / "ocdbt.process_1" / "d")
    Agreement(60).reach()
    lines = []
    step_dir, got = checkpoint.restore_latest(
        directory / "partly", ("params",), targets_on(make_mesh(2, 4), PARAMS), report=lines.append
    )
    seen["fallback"] = [step_dir.name, same_shards(got, host_arrays(2)), lines]

    # One process fails in the background: both hear of it at once, and can go on.
    collect = digest.collect
    arrays = split(place(4, make_mesh(2, 4)))
    if process == 1:
        digest.collect = _broken
    writer.save(4, arrays, ABOUT)
    seen["failed"] = failure_of(writer.wait)
    digest.collect = collect
    writer.save(5, arrays, ABOUT)
    writer.close()

    # The coordination service does not fill up: of all saves only the last one's votes remain.
    client = distributed.global_state.client
    for _ in range(2):
        writer.save(5, arrays, ABOUT)
        writer.wait()
    seen["votes"] = [
        len(client.key_value_dir_get(prefix))
        for prefix in (f"{writer._last_agreement._prefix}/", "lemur_checkpoint/")
    ]

    # A host read needs nobody else.
    if process == 0:
        got = checkpoint.read_tensor(directory / "shared" / "5", "params/half")
        assert_same_bits({"": got}, {"": host_arrays(4)["params/half"]})

    # One process is stuck: both hear of it when the deadline has passed.
    hasty = CheckpointWriter(directory / "stuck", keep_latest=1, timeout_seconds=2)
    if process == 1:
        digest.collect = _stuck
    hasty.save(1, arrays, ABOUT)
    seen["stuck"] = failure_of(hasty.wait)
    digest.collect = collect

    # Directories that only look the same; arrays that only one process has.
    seen["private"] = failure_of(
        lambda: CheckpointWriter(directory / f"private{process}", keep_latest=1, timeout_seconds=60)
    )
    local = jax.device_put(np.zeros(4, np.float32), jax.local_devices()[0])
    seen["local"] = failure_of(lambda: writer.save(6, {"params": {"params/w": local}}, {}))
    jax.distributed.shutdown()
    return seen


def _broken(pending):
    raise OSError("the cable is out")


def _stuck(pending):
    time.sleep(6)
    return {}


# ---------------------------------------------------------------------------------------------
# In pytest
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(directory that two workers wrote, what each of them saw)."""
    directory = tmp_path_factory.mktemp("pair")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(process), str(port), str(directory)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(PROCESSES)
    ]
    try:
        outputs = [worker.communicate(timeout=TIMEOUT_SECONDS) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs):
        assert worker.returncode == 0, errors[-8000:]
    return directory, [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.parametrize("step", [3, 5])
@pytest.mark.parametrize("shape", [(4, 2), (1, 8), (2, 2), (1, 1)])
def test_read_by_one_process(pair, step, shape):
    """What 2 x 4 devices wrote comes back bitwise on 8, 4 and 1 devices of one process. Red:
    ignore `targets[name].sharding`, or merge only process 0's items."""
    directory, _ = pair
    want = host_arrays({3: 3, 5: 4}[step])
    got = checkpoint.restore(
        directory / "shared" / str(step), ("params", "opt"), targets_on(make_mesh(*shape))
    )
    assert_same_bits(got, want)


def test_read_on_the_host(pair):
    """Red: drop `verify`'s numpy branch, or read only the chunks of process 0."""
    directory, _ = pair
    step_dir = checkpoint.resolve(directory / "shared")
    assert step_dir == directory / "shared" / "5"
    assert_same_bits(checkpoint.restore(step_dir, ("params", "opt")), host_arrays(4))
    name = "params/layers/wq"
    got = np.stack(list(checkpoint.read_slices(step_dir, name)))
    assert_same_bits({name: got}, {name: host_arrays(4)[name]})


def test_each_process_writes_only_its_shards(pair):
    """Red: gather the arrays to every process before saving (then process 1's directory is gone,
    or holds process 0's rows)."""
    directory, _ = pair
    item = directory / "shared" / "5" / "params"
    written = [
        b"".join(
            path.read_bytes()
            for path in (item / f"ocdbt.process_{process}").rglob("*")
            if path.is_file()
        )
        for process in range(PROCESSES)
    ]
    array = host_arrays(4)["params/embed"]  # on a 2 x 4 mesh: the first axis over processes
    for row in range(2):
        for column in range(4):
            shard = array[row * 256 : (row + 1) * 256, column * 16 : (column + 1) * 16]
            found = [shard.tobytes() in data for data in written]
            assert found == [row == 0, row == 1]


def test_workers_restored_on_another_mesh(pair):
    """Red: compute the digests of local shards only in `digest._sums_on`."""
    _, seen = pair
    assert [worker["restored"] for worker in seen] == [["3", True, []]] * PROCESSES


def test_keep_policy_of_two_processes(pair):
    """Only whole ones are left, and nothing of the failed save. Red: drop the call of `prune`, or
    that of `undo` in `_abandon`."""
    directory, _ = pair
    assert checkpoint.complete_steps(directory / "shared") == [3, 5]
    assert sorted(path.name for path in (directory / "shared").iterdir()) == ["3", "5"]


def test_damage_that_one_process_sees_is_everybodys(pair):
    """Both fall back to the same checkpoint, and both say why. Red: drop `agreement.reach` in
    `restore` (process 0 waits in a collective for ever: the fixture times out)."""
    _, seen = pair
    for worker in seen:
        step, same, lines = worker["fallback"]
        assert (step, same) == ("2", True)
        assert len(lines) == 1 and "checkpoint 3 is passed over" in lines[0]
        assert "process 1 failed unreadable checkpoint" in lines[0]


def test_failure_of_one_process_reaches_all_at_once(pair):
    """Well before the deadline of 60 s, naming the process, the cause and what is intact. Red:
    drop `agreement.fail` in `_abandon`."""
    _, seen = pair
    for worker in seen:
        assert worker["failed"]["seconds"] < 30
        for part in ("step 4", "the cable is out", "previous checkpoint 3 is intact"):
            assert part in worker["failed"]["error"]
    assert "process 1 failed OSError" in seen[0]["failed"]["error"]


def test_votes_are_forgotten(pair):
    """Red: drop `forget` in `CheckpointWriter._finish`."""
    _, seen = pair
    one, everything = seen[0]["votes"]
    assert one > 0
    # Of six successful saves one is left; of the failed one, two writers and restores all.
    assert everything <= 6 * one


def test_a_stuck_process_is_named(pair):
    """Red: no deadline in `Agreement._collect`."""
    _, seen = pair
    for worker in seen:
        assert "process 1 did not answer within 2 s" in worker["stuck"]["error"]
        assert worker["stuck"]["seconds"] < 30


def test_private_directories_and_local_arrays_are_refused(pair):
    """Red: drop the second `agreement.reach` in `_check_shared`; drop the `is_fully_addressable`
    line of `_check_arrays` (Orbax's own error names no fix)."""
    _, seen = pair
    for worker in seen:
        assert "process 1 failed does not see process 0's file" in worker["private"]["error"]
        assert "params/w lies on this process alone" in worker["local"]["error"]


if __name__ == "__main__":
    print(json.dumps(work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
