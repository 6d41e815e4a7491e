"""The real TPU compiler accepts the kernel on every chip, ahead of time, without a TPU."""

import importlib.util
import json
import os
import subprocess
import sys

import decode_compile_table
import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu's compiler (extra 'tpu')"
)


def rows(cases: str) -> list[dict]:
    """The table from a process of its own: libtpu's environment is read once per process."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    result = subprocess.run(
        [sys.executable, decode_compile_table.__file__, "--cases", cases],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(cases: str) -> None:
    table = rows(cases)
    assert len(table) == len(decode_compile_table.CHIPS) * len(decode_compile_table.CASES[cases])
    assert not [row for row in table if "error" in row]
    assert max(row["vmem_MiB"] for row in table) < 12


def test_sample_compiles_on_every_chip():
    """Red when DEPTH or BLOCK_BYTES outgrow VMEM, or a float32 iota comes back (N > 1)."""
    check("sample")


@pytest.mark.certify
def test_everything_compiles_on_every_chip():
    """head_dim x page size x heads x dtype, and the other options."""
    check("full")
