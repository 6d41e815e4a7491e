"""Cross-entropy kernels: values and gradients against float64, chunks, memory, errors.

Axis key: B batch, T length, E embed, V vocab.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lemur_kernels.cross_entropy import cross_entropy

IMPLEMENTATIONS = ("reference", "chunked")
# f32 sums of some 100 terms of order one, in another order than float64's.
F32 = {"rtol": 2e-5, "atol": 2e-5}
# bf16 keeps 8 bits, and dlogits are rounded to it before the two products.
BF16 = 2e-2
B, T, E, V = 3, 50, 32, 100
VALID = 90


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (B, T, E), dtype)
    w = jax.random.normal(keys[1], (E, V), dtype) / 4
    targets = jax.random.randint(keys[2], (B, T), 0, VALID)
    weights = jnp.round(2 * jax.random.uniform(keys[3], (B, T)), 1)
    return x, w, targets, weights


def float64(x, w, targets, weights, z_loss, valid, g_z=1.0):
    """Values, and the gradient of loss + g_z * z_loss, from whole logits in float64."""
    x, w, weights = (np.asarray(a, np.float64) for a in (x, w, weights))
    targets = np.asarray(targets)
    logits = x @ w
    logits[..., valid:] = -np.inf
    top = logits.max(-1)
    log_z = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    p = np.exp(logits - log_z[..., None])
    one_hot = np.eye(w.shape[1])[targets]
    dlogits = p * (1 + 2 * g_z * z_loss * log_z)[..., None] - one_hot
    dlogits *= weights[..., None]
    values = (weights * nll).sum(), (weights * z_loss * log_z**2).sum(), nll
    return values, (dlogits @ w.T, np.einsum("bte,btv->ev", x, dlogits))


def call(implementation, z_loss=0.0, chunk_tokens=16, valid=VALID):
    return functools.partial(
        cross_entropy,
        z_loss=z_loss,
        chunk_tokens=chunk_tokens,
        valid_vocab=valid,
        implementation=implementation,
    )


@pytest.mark.parametrize("chunk_tokens", [1, 16, 999])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients_are_those_of_float64(implementation, z_loss, chunk_tokens):
    """Red when: padding columns are not masked, weights are dropped, or dw is not accumulated."""
    if implementation == "reference" and chunk_tokens != 16:
        pytest.skip("the reference has no chunks")
    args = inputs()
    f = call(implementation, z_loss, chunk_tokens)
    values, gradients = float64(*args, z_loss, VALID)
    got = jax.jit(f)(*args)
    for a, b in zip(got, values):
        np.testing.assert_allclose(a, b, **F32)

    def total(x, w):
        out = f(x, w, *args[2:])
        return out.loss + out.z_loss, out

    (_, again), got = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*args[:2])
    for a, b in zip(again, values):
        np.testing.assert_allclose(a, b, **F32)
    for a, b in zip(got, gradients):
        np.testing.assert_allclose(a, b, **F32)
    assert not np.any(got[1][:, VALID:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_loss_and_z_loss_may_be_weighed_apart(implementation):
    """Red when: _backward scales the saved gradient by g_loss though g_z differs."""
    args = inputs()

    def total(x, w):
        out = call(implementation, 1e-2)(x, w, *args[2:])
        return out.loss / 7 + out.z_loss * 3 / 7

    _, want = float64(*args, 1e-2, VALID, g_z=3.0)
    for a, b in zip(jax.jit(jax.grad(total, (0, 1)))(*args[:2]), want):
        np.testing.assert_allclose(7 * a, b, **F32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weight_zero_hides_a_token(implementation):
    """Red when: dlogits are not multiplied by the weights."""
    x, w, targets, weights = inputs()
    weights = weights.at[1].set(0)

    def loss(x, targets):
        return call(implementation)(x, w, targets, weights).loss

    gradient = jax.grad(loss)(x, targets)
    assert not np.any(gradient[1])
    assert np.any(gradient[0])
    assert loss(x, targets) == loss(x.at[1].set(5.0), targets.at[1].set(0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_to_weights_or_through_nll(implementation):
    """Red when: a stop_gradient of the reference goes, or _backward reads nll's cotangent."""
    x, w, targets, weights = inputs()
    f = call(implementation)
    assert not np.any(jax.grad(lambda a: f(x, w, targets, a).loss)(weights))
    assert not np.any(jax.grad(lambda a: f(a, w, targets, weights).nll_BT.sum())(x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_huge_logits_stay_finite(implementation):
    """Red when: log-sum-exp is taken without the maximum."""
    x, w, targets, weights = inputs()

    def loss(x, w):
        return call(implementation)(x * 1e3, w, targets, weights).loss

    value, gradients = jax.value_and_grad(loss, (0, 1))(x, w)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16_in_f32_out(implementation, z_loss):
    """Red when: the product or the softmax runs in bf16 (the loss then has 2 digits), or the two
    forms of the gradient have different dtypes."""
    args = inputs(jnp.bfloat16)
    wide = (a.astype(jnp.float32) for a in args[:2])
    values, gradients = float64(*wide, *args[2:], z_loss, VALID)
    f = call(implementation, z_loss)
    out = f(*args)
    assert out.loss.dtype == out.nll_BT.dtype == jnp.float32
    np.testing.assert_allclose(out.loss, values[0], **F32)

    def total(x, w):
        out = f(x, w, *args[2:])
        return out.loss + out.z_loss

    got = jax.grad(total, (0, 1))(*args[:2])
    for a, b in zip(got, gradients):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b) < BF16


def test_chunked_under_shard_map():
    """Red when: varying_alike goes, or dw is not summed over the devices."""
    args = inputs()
    mesh = jax.sharding.Mesh(jax.devices()[:B], ("data",))
    rows = jax.P("data")

    def local(x, w, targets, weights):
        return jax.lax.psum(call("chunked", 1e-2)(x, w, targets, weights).loss, "data")

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, jax.P(), rows, rows), out_specs=jax.P()
    )
    got = jax.jit(jax.grad(mapped, (0, 1)))(*args)
    want = jax.grad(lambda *a: call("reference", 1e-2)(*a).loss, (0, 1))(*args)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, **F32)


def test_full_logits_never_exist():
    """Red when: a scan stacks logits, or chunk_tokens is ignored."""

    def temporary_bytes(T):
        x = jax.ShapeDtypeStruct((2, T, 16), jnp.float32)
        w = jax.ShapeDtypeStruct((16, 1024), jnp.float32)
        row = jax.ShapeDtypeStruct((2, T), jnp.int32)

        def loss(x, w, targets, weights):
            return call("chunked", chunk_tokens=64, valid=None)(x, w, targets, weights).loss

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, w, row, row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 2 * 4096 * 1024 * 4 / 4  # a quarter of the f32 logits
    assert temporary_bytes(4096) < 2.5 * temporary_bytes(2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "auto"}, "'auto' is unknown"),
        ({"valid": 101}, r"valid_vocab=101 must be in 1..100 \(the columns of w\)"),
        ({"valid": 90.0}, "valid_vocab=90.0 must be in 1..100"),
        ({"valid": True}, "valid_vocab=True must be in 1..100"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be an integer from 1 on"),
        ({"chunk_tokens": True}, "chunk_tokens=True must be an integer from 1 on"),
        ({"chunk_tokens": 8.0}, "chunk_tokens=8.0 must be an integer"),
        ({"z_loss": -1e-4}, "z_loss=-0.0001 must be a finite number from 0 on"),
        ({"z_loss": float("nan")}, "z_loss=nan must be a finite number"),
        ({"z_loss": None}, "z_loss=None must be a finite number"),
        ({"x": jnp.zeros((B, T, E), jnp.int32)}, "x_BTE is int32; pass float32 or bfloat16 or f"),
        ({"x": jnp.zeros((B, 0, E))}, r"x_BTE \[3, 0, 32\] is empty: T=0 must be at least 1"),
        ({"w": jnp.zeros((E, V), jnp.int8)}, "w_EV is int8"),
        ({"w": jnp.zeros(E)}, r"w_EV has shape \[32\]; pass \[E,V\]"),
        ({"w": jnp.zeros((E, 0))}, "w_EV .* is empty: V=0"),
        ({"weights": jnp.zeros((B, T), complex)}, "weights_BT is complex64"),
        ({"weights": None}, r"weights_BT is None; pass an array \[B,T\]"),
        ({"targets": None}, r"targets_BT is None"),
        ({"w": jnp.zeros((7, V))}, r"x \[B,T,E\] and w \[E,V\]"),
        ({"w": jnp.zeros((E, V), jnp.bfloat16)}, "share a dtype"),
        ({"targets": jnp.zeros((B, 2), jnp.int32)}, r"targets_BT is int32\[3, 2\]; pass int"),
        (
            {"targets": jnp.zeros((B, T))},
            r"targets_BT is float32\[3, 50\]; pass integers \[3, 50\]",
        ),
    ],
)
def test_errors_name_the_value_and_the_fix(change, message):
    """Red when: a check is removed from api.cross_entropy."""
    x, w, targets, weights = inputs()
    arrays = {"x": x, "w": w, "targets": targets, "weights": weights}
    arrays = {name: change.pop(name, value) for name, value in arrays.items()}
    with pytest.raises(ValueError, match=message):
        call(**({"implementation": "chunked"} | change))(*arrays.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numbers_of_numpy_are_taken(implementation):
    """Red when: arguments.integer or number asks for Python's own types."""
    args = inputs()
    plain = call(implementation, 0.5, 16)(*args)
    of_numpy = call(implementation, np.float32(0.5), np.int64(16), np.int32(VALID))(*args)
    assert plain.loss == of_numpy.loss and plain.z_loss == of_numpy.z_loss


@pytest.mark.parametrize("wrong", [-1, VALID, V, 2**31 - 1])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_target_out_of_range_is_nan_unless_its_weight_is_zero(implementation, wrong):
    """Red when: such an id is clamped (a plausible loss, or nll at weight 0), or makes a NaN at
    weight 0."""
    x, w, targets, weights = inputs()
    weights = weights.at[1].set(0).at[0, 0].set(1)

    @jax.jit
    def both(targets):
        def loss(x, w):
            out = call(implementation, 1e-2)(x, w, targets, weights)
            return out.loss, out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)

    (_, want), gradients = both(targets)
    (_, hidden), same = both(targets.at[1].set(wrong))
    assert hidden.loss == want.loss and hidden.z_loss == want.z_loss
    assert not np.any(hidden.nll_BT[1]) and np.all(np.isfinite(hidden.nll_BT))
    for a, b in zip(same, gradients):
        assert np.array_equal(a, b)
    (_, out), (dx, dw) = both(targets.at[0, 0].set(wrong))
    assert np.isnan(out.loss) and np.isnan(out.nll_BT[0, 0])
    assert np.array_equal(out.nll_BT[2], want.nll_BT[2])
    assert np.isnan(dx[0, 0]).all() and np.isnan(dw).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_columns_of_padding_never_matter(implementation):
    """Red when: padding columns reach log Z (finite of any size)."""
    x, w, targets, weights = inputs()
    run = jax.jit(
        jax.value_and_grad(
            lambda x, w: sum(call(implementation, 1e-2)(x, w, targets, weights)[:2]), (0, 1)
        )
    )
    want, (dx, dw) = run(x, w)
    got, (dx_padded, dw_padded) = run(x, w.at[:, VALID:].set(1e30))
    assert got == want and np.array_equal(dx, dx_padded) and np.array_equal(dw, dw_padded)
    assert not np.any(dw[:, VALID:])
