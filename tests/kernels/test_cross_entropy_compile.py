"""The TPU compiler accepts the loss kernels and keeps f32 logits out of HBM, without a TPU here."""

import importlib.util
import json
import subprocess
import sys

import cross_entropy_compile_table
import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install lemur_jax[tpu]",
)
MIB = 2**20


def table(*arguments: str) -> list[dict]:
    """Rows of the table, from a process of its own: libtpu reads its environment once."""
    command = [sys.executable, cross_entropy_compile_table.__file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(row: dict) -> None:
    assert "error" not in row, row
    assert not row["f32_logits"], row


@needs_libtpu
def test_the_70b_loss_compiles_and_its_logits_stay_in_vmem():
    """Red when: v4's blocks outgrow its 16 MiB (columns 1024), or project returns f32 logits."""
    for row in table("--chips", "v4", "--cases", "quick"):
        check(row)
        # The bf16 probabilities alone: neither f32 logits nor an f32 gradient of the head.
        assert row["temp_MiB"] * MIB < 1.1 * 2 * 4096 * row["vocab"]


@needs_libtpu
@pytest.mark.certify
def test_every_chip_and_shape_compiles():
    """Red when: a chip's blocks outgrow its VMEM for some width, vocabulary or dtype."""
    rows = table("--cases", "whole")
    assert len(rows) == 5 * 14
    for row in rows:
        check(row)
