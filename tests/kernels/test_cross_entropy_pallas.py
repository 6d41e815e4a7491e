"""The TPU kernels of the loss, run by Pallas's interpreters on a CPU.

Axis key: B batch, T length, E embed, V vocab.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from lemur_kernels.cross_entropy import blocks, cross_entropy

# The interpreters run these blocks: several tiles in every direction of the shapes below.
SMALL = blocks.Blocks(tokens=64, columns=128, depth=128, vmem_bytes=16 * 2**20, gradient_tokens=64)
F32 = {"rtol": 2e-5, "atol": 2e-5}
BF16 = 2e-2
# tokens 2 x 50 = 64 + 36; columns 3 x 128 - 84, of which 290 exist; embed 2 x 128.
B, T, E, V, VALID = 2, 50, 256, 300, 290


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(blocks.CHIPS, "v4", SMALL)


def inputs(seed, dtype=jnp.float32, scale=1.0, T=T, V=V):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(scale * rng.normal(size=(B, T, E)), dtype)
    w = jnp.asarray(rng.normal(size=(E, V)) / 16, dtype)
    targets = jnp.asarray(rng.integers(0, VALID, (B, T)), jnp.int32)
    weights = jnp.asarray(np.round(2 * rng.random((B, T)), 1) * (rng.random((B, T)) > 0.2))
    return x, w, targets, weights.astype(jnp.float32)


def float64(x, w, targets, weights, z_loss, g_z=1.0):
    x, w, weights = (np.asarray(jnp.asarray(a, jnp.float32), np.float64) for a in (x, w, weights))
    targets = np.asarray(targets)
    logits = x @ w
    logits[..., VALID:] = -np.inf
    top = logits.max(-1)
    log_z = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    p = np.exp(logits - log_z[..., None])
    dlogits = p * (1 + 2 * g_z * z_loss * log_z)[..., None] - np.eye(w.shape[1])[targets]
    dlogits *= weights[..., None]
    values = (weights * nll).sum(), (weights * z_loss * log_z**2).sum(), nll
    return values, (dlogits @ w.T, np.einsum("bte,btv->ev", x, dlogits))


def call(z_loss=0.0, chunk_tokens=T, interpret=True):
    return functools.partial(
        cross_entropy,
        z_loss=z_loss,
        chunk_tokens=chunk_tokens,
        valid_vocab=VALID,
        implementation="pallas_tpu",
        chip="v4",
        interpret=interpret,
    )


def test_the_gradient_is_not_differentiated_again():
    """Red when: no_derivative goes from _project."""
    args = inputs(1)

    def loss(x):
        return call()(x, *args[1:]).loss

    gradient = jax.grad(loss)
    with pytest.raises(NotImplementedError, match="'pallas_tpu' is differentiable once"):
        jax.eval_shape(jax.grad(lambda x: jnp.sum(gradient(x) ** 2)), args[0])


def test_a_chip_without_a_tpu_is_an_error_when_it_is_compiled():
    """Red when: needs_tpu goes from _project: Pallas would speak of interpret mode alone."""
    x, *rest = inputs(1)
    f = jax.jit(lambda x: call(interpret=False)(x, *rest).loss)
    with pytest.raises(ValueError, match="cross_entropy .* needs a TPU.*implementation='chunked'"):
        f.lower(x)
    with pytest.raises(ValueError, match="x_BTE is float16; pass float32 or bfloat16"):
        call()(x.astype(jnp.float16), *rest)


def test_a_target_out_of_range_is_nan_unless_its_weight_is_zero():
    """Red when: such an id is clamped, or makes a NaN at weight 0; padding columns matter."""
    x, w, targets, weights = inputs(1)
    weights = weights.at[0].set(0).at[1, 0].set(1)
    f = call(1e-2)
    want, gradients = value_and_gradients(f, (x, w, targets, weights))
    w = w.at[:, VALID:].set(1e30)
    hidden, same = value_and_gradients(f, (x, w, targets.at[0].set(VALID), weights))
    assert hidden.loss == want.loss and hidden.z_loss == want.z_loss
    for a, b in zip(same, gradients):
        assert np.array_equal(a, b)
    for wrong in (-1, VALID):
        out, (dx, _) = value_and_gradients(f, (x, w, targets.at[1, 0].set(wrong), weights))
        assert np.isnan(out.loss) and np.isnan(out.nll_BT[1, 0]) and np.isnan(dx[1, 0]).all()


def value_and_gradients(f, args):
    def total(x, w):
        out = f(x, w, *args[2:])
        return out.loss + out.z_loss, out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*args[:2])
    return out, gradients


@pytest.mark.parametrize(("z_loss", "chunk_tokens"), [(0.0, T), (1e-2, 33)])
def test_values_and_gradients_are_those_of_float64(z_loss, chunk_tokens):
    """Red when: columns from `limit` on are not masked, the running sum is not rescaled
    (exp(old - top)), or the gradient's reference is another tile's."""
    args = inputs(1)
    values, gradients = float64(*args, z_loss)
    again, got = value_and_gradients(call(z_loss, chunk_tokens), args)
    for out in (jax.jit(call(z_loss, chunk_tokens))(*args), again):
        for a, b in zip(out, values):
            np.testing.assert_allclose(a, b, **F32)
    for a, b in zip(got, gradients):
        np.testing.assert_allclose(a, b, **F32)
    assert not np.any(got[1][:, VALID:])


def test_loss_and_z_loss_may_be_weighed_apart():
    """Red when: _backward scales the saved gradient by g_loss though g_z differs."""
    args = inputs(2, jnp.bfloat16)

    def total(x, w):
        out = call(1e-2)(x, w, *args[2:])
        return out.loss + out.z_loss * 3

    _, want = float64(*args, 1e-2, g_z=3.0)
    for a, b in zip(jax.jit(jax.grad(total, (0, 1)))(*args[:2]), want):
        assert np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b) < BF16


def test_bf16_gradient_is_as_close_as_chunked():
    """Red when: p keeps bf16 logits instead of exp(logits - maximum), or the target's entry is
    p - 1 of a rounded p (a confident token then has a wrong gradient)."""
    x, w, targets, weights = inputs(3, jnp.bfloat16, scale=3.0)
    # The second row alone counts, and is confident: its targets' columns point along its x.
    w = w.at[:, targets[1]].add((1.5 * x[1].T / E).astype(w.dtype))
    for counted in (weights, weights.at[0].set(0)):
        args = (x, w, targets, counted)
        values, gradients = float64(*args, 0.0)
        out, got = value_and_gradients(call(), args)
        np.testing.assert_allclose(out.loss, values[0], **F32)
        assert out.loss.dtype == out.nll_BT.dtype == jnp.float32
        chunked = functools.partial(
            cross_entropy, chunk_tokens=T, valid_vocab=VALID, implementation="chunked"
        )
        _, other = value_and_gradients(chunked, args)
        for a, c, b in zip(got, other, gradients):
            error, allowed = (
                np.linalg.norm(g.astype(np.float32) - b) / np.linalg.norm(b) for g in (a, c)
            )
            assert a.dtype == jnp.bfloat16
            assert error < 1.5 * allowed, (error, allowed)


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_logits_of_ten_thousand(scale):
    """Red when: exp is taken without the running maximum."""
    x, w, targets, weights = inputs(4)
    args = (x * scale * 1e4, w, targets, weights)
    values, gradients = float64(*args, 0.0)
    out, got = value_and_gradients(call(), args)
    np.testing.assert_allclose(out.nll_BT, values[2], rtol=1e-5, atol=1e-2)
    for a, b in zip(got, gradients):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_weight_zero_hides_a_token():
    """Red when: token_weights are not multiplied by the weights."""
    x, w, targets, weights = inputs(5)
    weights = weights.at[1].set(0)
    _, (dx, _) = value_and_gradients(call(1e-2), (x, w, targets, weights))
    assert not np.any(dx[1])
    assert np.any(dx[0])


def test_under_x64():
    """Red when: `without_x64` goes from project or logits_gradient."""
    args = inputs(0)
    f = jax.value_and_grad(lambda x, w: call()(x, w, *args[2:]).loss, (0, 1))
    want = f(*args[:2])
    with jax.enable_x64(True):
        got = f(*args[:2])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_shard_map_that_checks_axes_is_told_not_to():
    """Red when: refuse_varying goes from cross_entropy."""
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    specs = {"in_specs": (jax.P("data"), jax.P(), jax.P("data"), jax.P("data"))}
    with pytest.raises(ValueError, match="inside shard_map over data: .*; pass check_vma=False"):
        jax.shard_map(call(), mesh=mesh, **specs, out_specs=jax.P())(*inputs(0))


def test_same_bits_twice():
    """Red when: the sums depend on anything but the inputs (a scratch that is not set)."""
    args = inputs(6, jnp.bfloat16)

    @jax.jit
    def f(*args):
        return jax.vjp(lambda x, w: call(1e-2)(x, w, *args[2:])[:2], *args[:2])[1]((1.0, 1.0))

    for a, b in zip(f(*args), f(*args)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("form", ["values", "gradients"])
def test_no_races_on_two_cores(form):
    """Red when: the vocabulary or the embed axis of the grid is marked parallel."""
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    if form == "values":
        args = inputs(7)
        values, _ = float64(*args, 1e-2)
        out = jax.jit(call(1e-2, interpret=interpret))(*args)
    else:
        # Whole tiles: this interpreter fails on an aliased output whose last tile is not whole.
        args = inputs(7, T=64, V=384)
        values, gradients = float64(*args, 1e-2)
        out, got = value_and_gradients(call(1e-2, 64, interpret=interpret), args)
        for a, b in zip(got, gradients):
            np.testing.assert_allclose(a, b, **F32)
    for a, b in zip(out, values):
        np.testing.assert_allclose(a, b, **F32)
    assert not interpret_pallas_call.races.races_found


def test_gradient_kernel_works_in_place():
    """Red when: input_output_aliases goes (a second [N,V] buffer then exists)."""
    args = inputs(8, jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(lambda *a: value_and_gradients(call(), a))(*args))
    assert "input_output_aliases=((5, 0),)" in jaxpr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chip": None}, "no blocks for device 'cpu'"),
        ({"chip": "v9"}, "chip='v9' is unknown; legal: v4, v5e"),
        ({"implementation": "chunked"}, "chip='v4' and interpret=True are for"),
    ],
)
def test_errors_name_the_value_and_the_fix(change, message):
    """Red when: a check of api.cross_entropy or chip_of goes."""
    with pytest.raises(ValueError, match=message):
        functools.partial(call(), **change)(*inputs(9))


def test_embed_that_no_block_divides():
    """Red when: choose lets a partial block of E through (its sums would read garbage)."""
    with pytest.raises(ValueError, match="embed=1000 is more than 128 .* nearest 1024"):
        blocks.choose("v4", 64, 1000, 300, jnp.bfloat16)
    assert blocks.choose("v4", 64, 1000 - 1000 % 128, 300, jnp.bfloat16).depth == 128
    assert blocks.choose("v4", 64, 100, 300, jnp.bfloat16).depth == 100
