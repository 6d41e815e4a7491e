"""The loss with its vocabulary split over a mesh axis equals the loss on one device.

Axis key: B batch, T length, E embed, V vocab.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lemur_kernels.cross_entropy import blocks, cross_entropy

P = jax.sharding.PartitionSpec
F32 = {"rtol": 2e-5, "atol": 2e-5}
# 4 shards of 48 columns; 130 exist, so the third is padded in part and the fourth is padding.
B, T, E, V, VALID, WAYS = 2, 24, 32, 192, 130, 4
SMALL = blocks.Blocks(tokens=64, columns=128, depth=128, vmem_bytes=16 * 2**20, gradient_tokens=64)
IMPLEMENTATIONS = ("reference", "chunked", "pallas_tpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(blocks.CHIPS, "v4", SMALL)


def inputs(dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(11)
    x = jnp.asarray(scale * rng.normal(size=(B, T, E)), dtype)
    w = jnp.asarray(rng.normal(size=(E, V)) / 4, dtype)
    targets = jnp.asarray(rng.integers(0, VALID, (B, T)), jnp.int32)
    # The first and last column of each shard that has any.
    targets = targets.at[0, :6].set(jnp.asarray([0, 47, 48, 95, 96, VALID - 1]))
    weights = jnp.asarray(np.round(rng.random((B, T)), 1), jnp.float32)
    return x, w, targets, weights


def call(implementation, axis_name=None, z_loss=1e-2, chunk_tokens=10):
    kernel = {"chip": "v4", "interpret": True} if implementation == "pallas_tpu" else {}
    return functools.partial(
        cross_entropy,
        z_loss=z_loss,
        chunk_tokens=chunk_tokens,
        valid_vocab=VALID,
        axis_name=axis_name,
        implementation=implementation,
        **kernel,
    )


def sharded(implementation, check_vma, z_weight=1.0):
    """Loss, and nll_BT, on 2 x 4 devices: rows over one axis, the vocabulary over the other."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, WAYS), ("data", "tensor"))

    def local(x, w, targets, weights):
        out = call(implementation, "tensor")(x, w, targets, weights)
        return jax.lax.psum(out.loss + z_weight * out.z_loss, "data"), out.nll_BT

    rows = P("data")
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, P(None, "tensor"), rows, rows),
        out_specs=(P(), rows),
        check_vma=check_vma,
    )


# Pallas kernels carry no varying-axes annotations, so shard_map cannot check them.
FORMS = [("reference", True), ("chunked", True), *((name, False) for name in IMPLEMENTATIONS)]


@pytest.mark.parametrize(("implementation", "check_vma"), FORMS)
def test_four_shards_are_one_device(implementation, check_vma):
    """Red when: log Z is one shard's, a target of another shard is read, the share is not the
    loss over the number of shards, or dx is not summed over them."""
    args = inputs()
    f = sharded(implementation, check_vma)
    (value, nll), got = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(*args)

    def one_device(*a):
        out = call("reference")(*a)
        return out.loss + out.z_loss, out.nll_BT

    (want, want_nll), gradients = jax.value_and_grad(one_device, (0, 1), has_aux=True)(*args)
    np.testing.assert_allclose(value, want, **F32)
    np.testing.assert_allclose(nll, want_nll, **F32)
    for a, b in zip(got, gradients):
        np.testing.assert_allclose(a, b, **F32)
    assert not np.any(got[1][:, VALID:])


@pytest.mark.parametrize("implementation", ["chunked", "pallas_tpu"])
def test_losses_weighed_apart_over_shards(implementation):
    """Red when: _backward takes a saved gradient whose z-loss has another weight."""
    args = inputs()
    got = jax.jit(jax.grad(lambda *a: sharded(implementation, False, z_weight=3.0)(*a)[0], (0, 1)))(
        *args
    )

    def one_device(x, w):
        out = call("reference")(x, w, *args[2:])
        return out.loss + 3 * out.z_loss

    for a, b in zip(got, jax.grad(one_device, (0, 1))(*args[:2])):
        np.testing.assert_allclose(a, b, **F32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_huge_logits_over_shards(implementation):
    """Red when: each shard takes its own maximum instead of the common one."""
    args = inputs(scale=1e4)
    (value, nll), gradients = jax.jit(
        jax.value_and_grad(sharded(implementation, False), (0, 1), has_aux=True)
    )(*args)
    out = call("reference")(*args)
    np.testing.assert_allclose(nll, out.nll_BT, rtol=1e-5, atol=1e-2)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_bf16_over_shards():
    """Red when: psum runs on a rounded share, or p is rounded before log Z is known."""
    args = inputs(jnp.bfloat16)
    (value, _), got = jax.jit(
        jax.value_and_grad(sharded("pallas_tpu", False), (0, 1), has_aux=True)
    )(*args)

    def one_device(x, w):
        out = call("reference")(x, w, *args[2:])
        return out.loss + out.z_loss

    wide = [a.astype(jnp.float32) for a in args[:2]]
    want, gradients = jax.value_and_grad(one_device, (0, 1))(*wide)
    np.testing.assert_allclose(value, want, **F32)
    for a, b in zip(got, gradients):
        assert np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b) < 2e-2
