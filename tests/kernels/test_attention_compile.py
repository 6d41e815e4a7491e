"""The real TPU compiler accepts what the certification does not compile: rows that are not packed,
and the public function with the tiling that it picks for the chip it is traced for."""

import importlib.util
import json
import os
import subprocess
import sys

import attention_compile_table as table
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install lemur_jax[tpu]",
    ),
]
ONLINE, BACKWARD = "lemur_attention_online", "lemur_attention_backward"


def compiled(chip: str, cases: str) -> list[dict]:
    """Rows of the table, from a process of its own: libtpu reads its environment once."""
    command = [sys.executable, table.__file__, "--chips", chip, "--cases", cases]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == len(table.CASES[cases])
    assert not [row for row in rows if "error" in row], rows
    return rows


@pytest.mark.parametrize("chip", table.CHIPS)
def test_rows_that_are_not_packed_compile(chip):
    """Red when: mark_specs gives the key columns two buffers (v4's backward outgrows 16 MiB)."""
    for row in compiled(chip, "unpacked"):
        assert row["kernels"] == [BACKWARD, ONLINE]  # such rows always take the running maximum


def test_the_public_function_compiles_for_a_chip_that_is_not_attached():
    """Red when: target_device looks at jax.devices() alone, or the second call is left out."""
    (row,) = compiled("v4", "packed")
    assert row["kernels"] == ["lemur_attention_forward", ONLINE]


@pytest.mark.parametrize(("chip", "product_cycles"), [("v4", 306_604), ("v6e", 203_574)])
def test_v_transposed_costs_nothing_beside_its_projection(chip, product_cycles):
    """Red when `forward_heads_first` keeps XLA from writing v^T out of the product, as
    `optimization_barrier(v_KSD)` does (370,092 cycles on v4): what the product takes to write v
    heads first for a kernel that wants it so is all there may be."""
    (row,) = compiled(chip, "projected")
    assert sum(row["outside"].values()) <= 1.01 * product_cycles, row
