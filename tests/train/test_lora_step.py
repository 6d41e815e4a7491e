"""A step of LoRA: the base stays, the adapters move as PEFT's do, on every mesh alike."""

import dataclasses

import jax
import numpy as np
import pytest
from small_models import MODEL

from lemur_jax import sharding
from lemur_jax.config import (
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
)
from lemur_jax.data.pipeline import Batch
from lemur_jax.model import param
from lemur_jax.model.decoder import Decoder
from lemur_jax.train.optimizer import optimizer, schedule
from lemur_jax.train.state import abstract_state, state_from_model
from lemur_jax.train.step import make_step

LORA = LoraConfig(rank=4, alpha=8.0, embeddings=True)
OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-2, schedule="constant", weight_decay=0.0)
LOSS = LossConfig(chunk_tokens=8, implementation="chunked")


def batch(rows=8, length=24):
    """[1, rows, length]: one document a row, uneven weights."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 101, (rows, length + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    weights = (rng.random((rows, length)) < np.linspace(0.1, 1, rows)[:, None]).astype(np.float32)
    ones = np.ones((rows, length), np.int32)
    return Batch(*(x[None] for x in (tokens[:, :-1], tokens[:, 1:], weights, positions, ones)))


ONE = MeshConfig(fsdp=1)


def run(mesh_config=ONE, micro=1, explicit=False, steps=3, optim=OPTIMIZER, **over):
    """(losses and norms, first state, last state) of some steps."""
    devices = jax.devices()[: int(np.prod(list(dataclasses.asdict(mesh_config).values())))]
    mesh = sharding.make_mesh(mesh_config, devices)
    config = dataclasses.replace(MODEL, **over)
    transform = optimizer(optim)
    step = jax.jit(make_step(transform, schedule(optim, 10), optim, LOSS, explicit))
    rows = 8 // micro
    placed = Batch(*(sharding.place(x.reshape(micro, rows, -1), 0, rows, mesh) for x in batch()))
    model = Decoder(config, jax.random.key(0))
    with jax.set_mesh(mesh):
        state = first = state_from_model(
            jax.device_put(model, param.shardings(model, mesh)), transform, mesh, LORA, seed=3
        )
        history = []
        for _ in range(steps):
            state, metrics = step(state, placed)
            history.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(history), first, state


@pytest.fixture(scope="module")
def on_one_device():
    return run()


def test_only_adapters_are_trained(on_one_device):
    """Red if the optimizer were initialised with the model, or the model's leaves moved."""
    history, first, last = on_one_device
    assert history[-1, 0] < history[0, 0]
    for name, weight in param.flatten(first.model).items():
        assert np.array_equal(weight, param.flatten(last.model)[name]), name
    moments = param.flatten(last.opt_state)
    assert moments and not any(n.endswith(("/wq", "/wo", "norm")) for n in moments)
    changed = param.flatten(first.adapters)
    moved = {
        n for n, w in param.flatten(last.adapters).items() if not np.array_equal(w, changed[n])
    }
    assert moved == set(changed)


@pytest.mark.parametrize(
    ("mesh", "micro", "explicit", "over"),
    [
        (MeshConfig(fsdp=8), 1, False, {}),
        pytest.param(
            *(MeshConfig(data=2, fsdp=2, tensor=2), 2, False, {"remat": "full"}),
            marks=pytest.mark.slow,
        ),
        # tensor > kv_heads
        pytest.param(MeshConfig(fsdp=1, tensor=8), 1, False, {}, marks=pytest.mark.slow),
        pytest.param(
            *(MeshConfig(fsdp_outer=2, fsdp=2, sequence=2), 2, True, {"scan_unroll": 2}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_same_losses_on_every_mesh(on_one_device, mesh, micro, explicit, over):
    """Red if an adapter's gradient were summed twice or not at all over the batch's devices
    (sum_over_batch by the model's specs), or its axes put B's heads on the rank's dimension."""
    history, _, last = run(mesh, micro, explicit, **over)
    np.testing.assert_allclose(history, on_one_device[0], rtol=2e-5)
    if mesh.fsdp == 8:
        spec = param.flatten(last.adapters)["layers/wq_a"].sharding.spec
        assert "fsdp" in str(spec)


def test_the_frozen_base_has_no_gradient():
    """Red if the step differentiated the model as well and dropped the result: the compiled step
    would then multiply as much as one that trains everything."""
    transform = optimizer(OPTIMIZER)
    step = jax.jit(make_step(transform, schedule(OPTIMIZER, 10), OPTIMIZER, LOSS))

    def compiled(adapt):
        state = abstract_state(MODEL, transform, adapt=adapt)
        return step.lower(state, batch()).compile()

    few, all_ = compiled(LoraConfig(rank=1, targets=("wq",))), compiled(None)
    flops = [c.cost_analysis()["flops"] for c in (few, all_)]
    assert flops[0] < 0.8 * flops[1]
    assert few.memory_analysis().temp_size_in_bytes < all_.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_adafactor_takes_adapters():
    """Red if per_layer wanted a table and a head of what it updates."""
    history, *_ = run(optim=dataclasses.replace(OPTIMIZER, name="adafactor"), steps=2)
    assert np.isfinite(history).all()
