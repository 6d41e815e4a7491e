"""Rows split over devices: both forms give what one device gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lemur_kernels.attention import shapes

from lemur_jax import sharding
from lemur_jax.config import ConfigError, MeshConfig, ModelConfig, RopeConfig
from lemur_jax.model.attention import (
    describe,
    outside_table,
    resolve_implementation,
    row_tokens,
    self_attention,
)

CONFIG = ModelConfig(
    vocab_size=11,
    embed=32,
    mlp=32,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_positions=64,
    rope=RopeConfig(theta=1e4),
    norm_eps=1e-5,
)
F32 = {"rtol": 2e-5, "atol": 2e-5}
ROWS, LENGTH = 2, 48


def batch():
    """Two rows: documents that cross, meet and miss the borders of the parts, and padding."""
    rows = (([1, 2, 3, 0], [6, 21, 13, 8]), ([1, 2, 3, 4], [24, 12, 2, 10]))
    segments = np.stack([np.repeat(ids, lengths) for ids, lengths in rows])
    positions = np.zeros_like(segments)
    for row, ids in enumerate(segments):
        for number in set(ids) - {0}:
            positions[row, ids == number] = np.arange(np.sum(ids == number))
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (ROWS, LENGTH, h, 8)) for key, h in zip(keys, (4, 2, 2, 4))]
    return arrays, jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32)


def compiled(mesh_config, devices, form):
    """The compiled forward and gradient of the whole batch on a mesh, and its arguments."""
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    (q, k, v, dout), positions, segments = batch()
    heads, tokens = ("batch", "length", "act_heads", None), ("batch", "length")
    shardings = [sharding.sharding(heads, mesh, x.shape) for x in (q, dout)]
    kv = sharding.sharding(("batch", "length", "kv_heads", None), mesh, k.shape)
    row = sharding.sharding(tokens, mesh)
    order = (shardings[0], kv, kv, shardings[1], row, row)
    arguments = jax.device_put((q, k, v, dout, positions, segments), order)

    def run(q, k, v, dout, positions, segments):
        def attend(q, k, v):
            return self_attention(q, k, v, positions, segments, "chunked", form)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    with jax.set_mesh(mesh):
        # Results lie as the arguments do: else the compiler may gather them to return them.
        step = jax.jit(run, in_shardings=order, out_shardings=(order[0], *order[:3]))
        return step.lower(*arguments).compile(), arguments


@pytest.fixture(scope="module")
def on_one_device():
    step, arguments = compiled(MeshConfig(fsdp=1), 1, "gather")
    return step(*arguments)


@pytest.mark.parametrize("form", ["gather", "ring"])
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=1, sequence=8),
        MeshConfig(fsdp=2, sequence=2, tensor=2),
        MeshConfig(fsdp=1, sequence=2, tensor=4),  # tensor > kv_heads
    ],
    ids=str,
)
def test_eight_devices_are_one(on_one_device, mesh, form):
    """Red if keys of other parts were missed, or `packed` were promised of a gathered row."""
    step, arguments = compiled(mesh, 8, form)
    for name, a, b in zip(("out", "dq", "dk", "dv"), step(*arguments), on_one_device):
        np.testing.assert_allclose(a, b, err_msg=name, **F32)


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_which_collectives_are_made(form):
    """Red if the keys entered per_device whole: then XLA would gather them, and sum whole dk and dv
    on every device."""
    text = compiled(MeshConfig(fsdp=1, sequence=8), 8, form)[0].as_text()
    assert ("all-gather" in text) == (form == "gather")
    assert ("reduce-scatter" in text) == (form == "gather")
    assert ("collective-permute" in text) == (form == "ring")
    assert "all-reduce" not in text


@pytest.mark.parametrize(
    ("backend", "dtype", "kernel"),
    [
        ("cpu", "bfloat16", "chunked"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "chunked"),
        ("tpu", "bfloat16", "pallas_tpu"),
        ("tpu", "float32", "pallas_tpu"),
        ("tpu", "float16", "chunked"),
    ],
)
def test_what_auto_means(backend, dtype, kernel):
    """Red if a branch of resolve_implementation went."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    assert resolve_implementation(config, backend) == kernel


@pytest.mark.parametrize(
    ("kernel", "backend"), [("cudnn", "tpu"), ("pallas_gpu", "tpu"), ("pallas_tpu", "cpu")]
)
def test_a_kernel_that_the_backend_lacks_is_an_error(kernel, backend):
    """Red if a named kernel were replaced in silence."""
    config = dataclasses.replace(CONFIG, attention=kernel)
    with pytest.raises(ConfigError, match=f"attention='{kernel}' needs a .*'{backend}'"):
        resolve_implementation(config, backend)


LLAMA = dataclasses.replace(CONFIG, heads=64, kv_heads=8, head_dim=128, max_positions=1 << 20)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Certified: v4, bf16, 128 wide, 8 query heads a kv head and 1, rows of 4096; v5e forward."""
    heads = ((64, 8), (32, 32))
    lines = [("v4", d, *h) for d in ("forward", "backward") for h in heads]
    lines.append(("v5e", "forward", 64, 8))
    found = tmp_path / "certified.csv"
    found.write_text(
        shapes.table_text(
            [
                shapes.Certificate(
                    shapes.Shape(chip, direction, "bfloat16", 128, H, K, 4096),
                    {"block": 512, "heads": 4},
                    *(1, 0, {"causal": 1.0}),
                )
                for chip, direction, H, K in lines
            ],
            {},
        )
    )
    monkeypatch.setattr(shapes.certificate_for, "__defaults__", (found,))


@pytest.mark.parametrize(
    ("config", "shape", "reason"),
    [
        ({}, {}, None),
        ({}, {"tokens": 4096}, None),
        ({}, {"tokens": 4097}, "seq=4097"),
        ({}, {"tensor": 8}, None),
        ({}, {"tensor": 16}, "heads / kv_heads=4"),  # 4 heads and 1 kv head a device
        ({"heads": 32, "kv_heads": 32}, {"tensor": 8}, None),
        ({"heads": 32, "kv_heads": 32}, {"tensor": 16}, "heads=2 "),
        ({"head_dim": 64}, {}, "head_dim=64"),
        ({"dtype": "float32"}, {}, "dtype=float32"),
        ({}, {"device_kind": "TPU v5 lite"}, "direction=backward"),
        ({}, {"device_kind": "TPU v3"}, "device_kind='TPU v3'"),
    ],
)
def test_auto_on_a_tpu_is_what_is_certified_there(table, config, shape, reason):
    """Red if resolve asks for one direction, for the heads of all devices, or not for the row."""
    config = dataclasses.replace(LLAMA, **config)
    shape = {"device_kind": "TPU v4"} | shape
    want = "chunked" if reason else "pallas_tpu"
    assert resolve_implementation(config, "tpu", **shape) == want
    why = outside_table(config, "tpu", **shape)
    assert (reason in why) if reason else why is None
    named = dataclasses.replace(config, attention="pallas_tpu")
    assert resolve_implementation(named, "tpu", **shape) == "pallas_tpu"  # fails at its trace
    assert outside_table(named, "tpu", **shape) is None
    assert outside_table(config, "cpu", **shape) is None
    resolved = dataclasses.replace(config, attention=want)
    assert describe(resolved, 1, why) == (f"chunked ({why})" if reason else "pallas_tpu")


def test_a_kernel_sees_the_gathered_row_or_its_part_of_the_ring():
    """Red if row_tokens were alike for both."""
    ring = dataclasses.replace(LLAMA, sequence_attention="ring")
    assert row_tokens(LLAMA, 8192, 4) == 8192 and row_tokens(ring, 8192, 4) == 2048


def test_the_form_is_checked_and_printed():
    """Red if sequence_attention were not validated, or not shown where it matters."""
    with pytest.raises(ConfigError, match="sequence_attention='rings' is unknown"):
        dataclasses.replace(CONFIG, sequence_attention="rings")
    config = dataclasses.replace(CONFIG, attention="chunked", sequence_attention="ring")
    assert describe(config, 1) == "chunked"
    assert describe(config, 4) == "chunked, ring over 4 parts of a row"
