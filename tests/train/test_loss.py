"""The loss of the model on a mesh: kernels run on each device's tokens and vocabulary."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from lemur_kernels.cross_entropy import cross_entropy

from lemur_jax import sharding
from lemur_jax.config import ConfigError, LossConfig, MeshConfig
from lemur_jax.data.pipeline import Batch
from lemur_jax.model import param
from lemur_jax.model.decoder import Decoder
from lemur_jax.train import loss
from lemur_jax.train.step import gradients

MODEL = dataclasses.replace(small_models.MODEL, layers=1)


def batch(rows=8, length=16) -> Batch:
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 101, (rows, length + 1)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.8).astype(np.float32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), weights.shape)
    fields = (tokens[:, :-1], tokens[:, 1:], weights, positions, np.ones_like(positions))
    return Batch(*(field[None] for field in fields))


def config(implementation: str) -> LossConfig:
    return LossConfig(z_loss=1e-3, chunk_tokens=3, implementation=implementation)


@pytest.fixture
def interpreted(monkeypatch):
    """pallas_tpu on the CPU; the calls that it saw."""
    calls = []

    def traced(x, w, *args, **kwargs):
        calls.append((x.shape, w.shape, kwargs.get("axis_name")))
        if kwargs["implementation"] == "pallas_tpu":
            kwargs |= {"chip": "v4", "interpret": True}
        return cross_entropy(x, w, *args, **kwargs)

    monkeypatch.setattr(loss, "cross_entropy", traced)
    return calls


@functools.cache
def on_one_device():
    whole = jax.jit(gradients, static_argnums=2)
    return whole(Decoder(MODEL, jax.random.key(0)), batch(), config("reference"))


@pytest.mark.parametrize("implementation", ["chunked", "pallas_tpu"])
@pytest.mark.parametrize(
    "mesh_config",
    [MeshConfig(fsdp=2, sequence=2, tensor=2), MeshConfig(data=2, fsdp=4), MeshConfig(tensor=8)],
    ids=str,
)
def test_kernels_on_a_mesh_are_the_reference(interpreted, mesh_config, implementation):
    """Red when: axis_name is left out on a split vocabulary, the tokens of a sequence shard are
    counted by every device, or the head's gradient is not summed over the devices."""
    mesh = sharding.make_mesh(mesh_config)
    want_sums, want = on_one_device()
    interpreted.clear()
    with jax.set_mesh(mesh):
        model = Decoder(MODEL, jax.random.key(0))
        model = jax.device_put(model, param.shardings(model, mesh))
        placed = Batch(*(sharding.place(x, 0, 8, mesh) for x in batch()))
        sums, got = jax.jit(gradients, static_argnums=2)(model, placed, config(implementation))
    sizes = dict(mesh.shape)
    rows = 8 // (sizes["data"] * sizes["fsdp"])
    split = sizes["tensor"] > 1
    assert set(interpreted) == {
        (
            (rows, 16 // sizes["sequence"], 32),
            (32, 128 // sizes["tensor"]),
            "tensor" if split else None,
        )
    }
    np.testing.assert_allclose(sums, want_sums, rtol=1e-5)
    for name, gradient in param.flatten(want).items():
        np.testing.assert_allclose(
            param.flatten(got)[name], gradient, rtol=1e-4, atol=1e-4, err_msg=name
        )


def test_no_collective_is_repeated_for_each_chunk():
    """Red when: the loss is left to XLA's partitioner, which gathers the head and the logits'
    gradient of all rows, and sums the head's gradient, once for each chunk."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))

    def total(x, w, targets, weights):
        part = functools.partial(
            cross_entropy, z_loss=1e-3, chunk_tokens=4, valid_vocab=101, implementation="chunked"
        )
        return loss._per_device(part, x, w, targets, weights).sum()

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding(axes, mesh))

    tokens = ("batch", "length")
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(jax.grad(total, (0, 1)))
            .lower(
                array((8, 16, 32), jnp.float32, *tokens, None),
                array((32, 128), jnp.float32, "embed", "vocab"),
                array((8, 16), jnp.int32, *tokens),
                array((8, 16), jnp.float32, *tokens),
            )
            .compile()
        )
    text = compiled.as_text()
    inside, outside = text[: text.index("ENTRY")], text[text.index("ENTRY") :]
    collectives = ("all-gather(", "all-reduce(", "all-to-all(", "reduce-scatter(")
    assert "while(" in text
    assert not any(name in inside for name in collectives)
    assert any(name in outside for name in collectives)


@pytest.mark.parametrize(
    ("kind", "named", "want"),
    [
        ("TPU v4", "auto", "pallas_tpu"),
        ("TPU v6 lite", "auto", "pallas_tpu"),
        ("TPU v3", "auto", "chunked"),  # the kernels have no blocks for it
        ("cpu", "auto", "chunked"),
        ("NVIDIA H100 80GB HBM3", "auto", "chunked"),
        ("TPU v4", "chunked", "chunked"),
        ("cpu", "reference", "reference"),
    ],
)
def test_auto_is_resolved_by_the_device(kind, named, want):
    """Red when: auto means a kernel on a device that has none."""
    device = SimpleNamespace(device_kind=kind)
    named = dataclasses.replace(LossConfig(), implementation=named)
    assert loss.resolve_implementation(named, device) == want


def test_kernel_without_its_device_is_an_error():
    """Red when: pallas_tpu is accepted on a CPU and fails while tracing."""
    with pytest.raises(ConfigError, match="'pallas_tpu' needs one of TPU v4.*this is 'cpu'"):
        loss.resolve_implementation(LossConfig(implementation="pallas_tpu"), jax.devices()[0])
    with pytest.raises(ConfigError, match="LossConfig.implementation='fused' is unknown"):
        LossConfig(implementation="fused")
