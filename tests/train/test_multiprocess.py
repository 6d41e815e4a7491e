"""Two processes with four devices each, over loopback, are one process with eight."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lemur_jax import checkpoint
from lemur_jax.data import audit, ledger
from lemur_jax.train import metrics

TIMEOUT_SECONDS = 400

# What each process does: the real command, after noting which rows it was asked to load.
PROGRAM = """
import json, sys
from lemur_jax.data import pipeline
rows = set()
original = pipeline.Pipeline.rows
def noted(self, step, start, stop):
    rows.add((start, stop))
    return original(self, step, start, stop)
pipeline.Pipeline.rows = noted
from lemur_jax import cli
status = cli.main(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(sorted(rows)))
sys.exit(status)
"""


def command(data: Path, run: Path, *more: str) -> list[str]:
    return [
        *("train", "--gin_file=models/tiny.gin", "--gin.DataConfig.sequence_length=64"),
        *(f"--gin.DataConfig.path={json.dumps(str(data))}", "--gin.DataConfig.batch_size=8"),
        *("--gin.OptimizerConfig.peak_learning_rate=1e-3", "--gin.TrainConfig.steps=4"),
        *("--gin.MeshConfig.data=2", "--gin.MeshConfig.fsdp=2", "--gin.MeshConfig.tensor=2"),
        *('--gin.ModelConfig.dtype="float32"', "--gin.TrainConfig.steps_per_log=1"),
        *("--gin.CheckpointConfig.steps_per_save=2", "--gin.EvaluationConfig.batches=2"),
        *(f"--gin.TrainConfig.run_dir={json.dumps(str(run))}", *more),
    ]


def start(devices: int, note: Path, arguments: list[str]) -> subprocess.Popen:
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(note), *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(run: Path) -> list[float]:
    lines = metrics.read_metrics(run)
    return [
        line[tag] for line in lines for tag in ("train/loss", "evaluation/code/loss") if tag in line
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_are_one(tiny_data, tmp_path):
    """Red if a process loaded the rows of another, or wrote arrays that it does not own."""
    one = start(8, tmp_path / "one.json", command(tiny_data, tmp_path / "one"))
    out, _ = one.communicate(timeout=TIMEOUT_SECONDS)
    assert one.returncode == 0, out

    address = f"127.0.0.1:{free_port()}"
    two = [
        start(
            4,
            tmp_path / f"two{index}.json",
            command(
                tiny_data,
                tmp_path / "two",
                *(f"--coordinator={address}", "--processes=2", f"--process={index}"),
            ),
        )
        for index in range(2)
    ]
    for process in two:
        out, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 0, out

    # float32 sums in another order: the collectives of gloo are not those of one process.
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    # Each loaded its own half and no other row.
    notes = [json.loads((tmp_path / f"two{index}.json").read_text()) for index in range(2)]
    assert notes == [[[0, 4]], [[4, 8]]]
    # What two processes fed is, row for row, what one fed; and each run can be proved.
    found = {name: ledger.read(tmp_path / name / ledger.LEDGER).entries for name in ("one", "two")}
    sums = {
        name: [entry["reads"] for entry in entries if entry.event == "saved"]
        for name, entries in found.items()
    }
    assert len(sums["one"]) == 2 and sums["one"] == sums["two"]
    assert (found["two"][0]["processes"], found["two"][0]["ranges"]) == (2, [[0, 4], [4, 8]])
    assert audit.audit(tmp_path / "two", {}, full=True).violations == []
    # Each wrote its own shards; together they are the whole.
    step_dir = tmp_path / "two" / "checkpoints" / "4"
    written = {path.name for path in (step_dir / "params").glob("ocdbt.process_*")}
    assert written == {"ocdbt.process_0", "ocdbt.process_1"}
    found = checkpoint.restore(step_dir)
    for name, array in checkpoint.restore(tmp_path / "one" / "checkpoints" / "4").items():
        # Adam divides by the root of tiny second moments, which enlarges rounding.
        np.testing.assert_allclose(found[name], array, atol=2e-4, err_msg=name)
