"""One compiled step (make_fixture.py), read once."""

import gzip
import types
from pathlib import Path

import pytest

from lemur_jax.plan import buffers, hlo

FIXTURE = Path(__file__).with_name("fixture")
GIB = 2**30


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    """What the compiler wrote, by name."""
    return {
        path.name.removesuffix(".txt.gz"): gzip.decompress(path.read_bytes()).decode()
        for path in FIXTURE.glob("*.txt.gz")
    }


@pytest.fixture(scope="session")
def program(texts) -> hlo.Program:
    return hlo.parse(texts["program"])


@pytest.fixture(scope="session")
def assignment(texts) -> buffers.Assignment:
    return buffers.read_assignment(
        texts["buffer-assignment"], texts["live-range"], texts["buffer-assignment-values"]
    )


@pytest.fixture(scope="session")
def mesh() -> dict[str, int]:
    return {"data": 1, "fsdp": 64, "sequence": 1, "tensor": 4}


@pytest.fixture(scope="session")
def chip():
    """Peaks of a v4 chip, written out again: the table is not what is tested here."""
    return types.SimpleNamespace(
        name="v4",
        dimensions=3,
        clock_hz=1.05e9,
        flops_per_s=275e12,
        hbm_bytes_per_s=1.228e12,
        ici_bytes_per_s=90e9,
        dcn_bytes_per_s=6.25e9,
    )


@pytest.fixture(scope="session")
def model():
    """The fixture's sizes as a model: its MLP has two matrices, which no analysis minds."""
    from lemur_jax.config import ModelConfig, RopeConfig

    return ModelConfig(
        vocab_size=32000,
        embed=1024,
        mlp=4096,
        layers=8,
        heads=8,
        kv_heads=8,
        head_dim=128,
        max_positions=8192,
        rope=RopeConfig(theta=1e4),
        norm_eps=1e-5,
        remat="full",
    )
