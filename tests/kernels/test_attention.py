"""Attention kernels: one suite for every implementation that runs on a CPU.

Axis key: B batch, T query length, S key length, H heads, K kv heads, G = H / K, D head dim.
"""

import functools

import jax
import jax.numpy as jnp
import lemur_kernels.attention.chunked as chunked
import numpy as np
import pytest
from attention_float64 import float64, packed_rows, qkv
from lemur_kernels.attention import api, attention, attention_with_lse
from lemur_kernels.attention.api import SAVED_NAMES
from lemur_kernels.attention.mask import Options, Rows

ON_CPU = ("reference", "chunked")
# f32 sums of at most 300 terms of order one, in another order than float64's.
F32 = {"rtol": 2e-5, "atol": 2e-5}
# bf16 keeps 8 bits: 2^-8 of values of order one, times a few roundings.
BF16 = {"rtol": 3e-2, "atol": 3e-2}


# Two hundred tokens would cross blocks and runs of the real size; forty cross these.
SMALL_BLOCK = 8
jitted = jax.jit(
    attention, static_argnames=("packed", "scale", "window", "soft_cap", "implementation")
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """40 tokens make 5 blocks in 3 runs: two of two blocks and one of one."""
    monkeypatch.setattr(chunked, "QUERY_BLOCK", SMALL_BLOCK)
    monkeypatch.setattr(chunked, "RUNS", 3)


def attend(q, k, v, positions, segments, implementation, packed=True, **kw):
    return jitted(
        q, k, v,
        q_positions_BT=positions, kv_positions_BS=kw.pop("kv_positions", positions),
        q_segments_BT=segments, kv_segments_BS=kw.pop("kv_segments", segments),
        packed=packed, implementation=implementation, **kw,
    )  # fmt: skip


def attend_now(q, k, v, positions, segments, implementation, packed=True, **kw):
    """Not jitted: static arguments of any type."""
    return attention(
        q, k, v,
        q_positions_BT=positions, kv_positions_BS=kw.pop("kv_positions", positions),
        q_segments_BT=segments, kv_segments_BS=kw.pop("kv_segments", segments),
        packed=packed, implementation=implementation, **kw,
    )  # fmt: skip


def everything_forward(implementation, q, k, v, positions, segments, packed=True, **options):
    return attention_with_lse(
        q, k, v, q_positions_BT=positions, kv_positions_BS=positions,
        q_segments_BT=segments, kv_segments_BS=segments,
        packed=packed, implementation=implementation, **options,
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("packed", "window", "soft_cap", "scale")
)
def compiled(implementation, q, k, v, dout, positions, segments, **options):
    def forward(q, k, v):
        return everything_forward(implementation, q, k, v, positions, segments, **options)

    (out, lse), pull = jax.vjp(forward, q, k, v)
    return out, lse, *pull((dout, jnp.full_like(lse, jnp.nan)))


def everything(*args, **options):
    """out, lse, dq, dk, dv. lse is a constant: what flows into it must go nowhere."""
    return [np.asarray(x) for x in compiled(*args, **options)]


def gradients(*args, **options):
    return everything(*args, **options)[2:]


OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "window 1": {"window": 1},
    "soft cap": {"soft_cap": 2.0},
    "both, scaled": {"window": 13, "soft_cap": 0.7, "scale": 1.5},
}


@pytest.mark.parametrize(
    ("packed", "options"),
    [*((True, name) for name in OPTIONS), (False, "plain"), (False, "both, scaled")],
)
@pytest.mark.parametrize("implementation", ON_CPU)
def test_values_lse_and_gradients_are_those_of_float64(implementation, packed, options):
    """Red when: visible_BTS compares `<` instead of `<=`, drops the segment or the window's term,
    or reads the window as `<=`; chunked.backward leaves out `- delta`, the slope of the cap or the
    scale on dq; a run starts at its window's end; lse is of uncapped scores."""
    options = OPTIONS[options]
    q, k, v, dout = qkv(T=43)
    positions, segments = packed_rows([15, 20], [43], T=43)
    want = float64(q, k, v, dout, (positions, positions, segments, segments), **options)
    out, lse, *gradient = everything(
        implementation, q, k, v, dout, positions, segments, packed=packed, **options
    )
    for name, a, b in zip(want._fields, (out, lse, *gradient), want):
        np.testing.assert_allclose(a, b, err_msg=name, **F32)


@pytest.mark.parametrize("options", [{}, {"window": 2, "soft_cap": 0.7}], ids=str)
def test_float64_gradients_are_its_own_central_differences(options):
    """Red when: attention_float64.float64 leaves out a slope or a scale."""
    inputs = [np.asarray(x, np.float64) for x in qkv(B=1, T=6, H=2, K=1, D=4)]
    positions, segments = packed_rows([2, 3], T=6)
    rows = (positions, positions, segments, segments)
    got = float64(*inputs, rows, **options)
    step = 1e-6
    for which, gradient in enumerate((got.dq, got.dk, got.dv)):
        for i in np.ndindex(gradient.shape):
            ends = []
            for sign in (1, -1):
                moved = [x.copy() for x in inputs]
                moved[which][i] += sign * step
                ends.append(np.sum(float64(*moved, rows, **options).out * inputs[3]))
            np.testing.assert_allclose(gradient[i], (ends[0] - ends[1]) / (2 * step), atol=1e-8)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_one_token(implementation):
    """Red when: a block or a run may be empty."""
    q, k, v, dout = qkv(T=1)
    positions, segments = packed_rows([1], [], T=1)
    want = float64(q, k, v, dout, (positions, positions, segments, segments))
    got = everything(implementation, q, k, v, dout, positions, segments)
    for name, a, b in zip(want._fields, got, want):
        np.testing.assert_allclose(a, b, err_msg=name, **F32)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_documents_are_isolated_exactly(implementation):
    """Red when: a hidden score is made small instead of -inf. Twice the same bits, too."""
    q, k, v, dout = qkv(B=1, T=43)
    rows = packed_rows([12, 12, 15], T=43)
    before = everything(implementation, q, k, v, dout, *rows)
    moved = [x.at[:, 12:24].add(1000.0) for x in (q, k, v, dout)]
    after = everything(implementation, *moved, *rows)
    again = everything(implementation, q, k, v, dout, *rows)
    others = np.r_[0:12, 24:43]
    for name, *arrays in zip(("out", "lse", "dq", "dk", "dv"), before, after, again):
        axis = 2 if name == "lse" else 1
        a, b, c = arrays
        assert np.array_equal(a, c)
        assert np.array_equal(np.take(a, others, axis), np.take(b, others, axis)), name
        assert not np.array_equal(a, b)


def test_a_policy_that_saves_the_named_residuals_runs_the_forward_once():
    """Red when: one of the two names is removed from _attend_forward."""
    q, k, v, _ = qkv(B=1, T=8, H=2, K=1, D=4)
    positions, segments = packed_rows([8], T=8)

    def exponentials(policy):
        """One in the forward pass, one in the backward pass, one in a recomputation."""

        @functools.partial(jax.checkpoint, policy=policy)
        def layer(q, k, v):
            return jnp.sum(attend(q, k, v, positions, segments, "chunked") ** 2)

        lowered = jax.jit(jax.value_and_grad(layer, (0, 1, 2))).lower(q, k, v)
        return lowered.as_text().count("stablehlo.exponential")

    names = jax.checkpoint_policies.save_only_these_names
    assert exponentials(names()) == 3
    assert exponentials(names(*SAVED_NAMES)) == 2


@pytest.mark.parametrize("implementation", ON_CPU)
def test_causality_by_gradient(implementation):
    """Red when: `not_later` is dropped from visible_BTS, or a run sees keys past its end."""
    q, k, v, dout = qkv(B=1, T=43)
    rows = packed_rows([43], T=43)
    for t in (0, 7, 8, 30, 42):
        only_t = dout.at[:, :t].set(0).at[:, t + 1 :].set(0)
        for gradient in gradients(implementation, q, k, v, only_t, *rows)[1:]:
            assert not np.any(gradient[:, t + 1 :])
            # One visible key has probability 1 whatever its score.
            assert t == 0 or np.all(np.any(gradient[:, : t + 1], axis=(0, 2, 3)))


@pytest.mark.parametrize("implementation", ON_CPU)
def test_packed_documents_equal_separate_rows(implementation):
    """Red when: `same_segment` is dropped from visible_BTS."""
    lengths = [12, 12, 12]
    q, k, v, _ = qkv(B=1, T=40)
    packed = attend(q, k, v, *packed_rows(lengths, T=40), implementation)
    start = 0
    for length in lengths:
        alone = [x[:, start : start + length] for x in (q, k, v)]
        out = attend(*alone, *packed_rows([length], T=length), implementation)
        np.testing.assert_allclose(packed[:, start : start + length], out, **F32)
        start += length
    assert not np.any(packed[:, start:])


@pytest.mark.parametrize(("packed", "size"), [(True, 1e4), (True, -1e4), (False, -1e4)])
@pytest.mark.parametrize("implementation", ON_CPU)
def test_rows_that_see_nothing_give_zero(implementation, size, packed):
    """Red when: the `empty` guard goes (0 / 0), or lse of an empty row is left at log(0)."""
    q, k, v, dout = qkv(B=2, T=40, D=4)
    q, k = jnp.ones_like(q), jnp.full_like(k, size / 2)  # scores D * size / 2 / sqrt(D) = size
    rows = packed_rows([10, 20], [], T=40)
    out = attend(q, k, v, *rows, implementation, packed=packed)
    dq, dk, dv = gradients(implementation, q, k, v, dout, *rows, packed=packed)
    for x in (out, dq, dk, dv):
        assert np.all(np.isfinite(x))
        assert not np.any(x[0, 30:])
        assert not np.any(x[1])
    assert np.any(dv[0, :30])


@pytest.mark.parametrize("implementation", ON_CPU)
def test_each_query_head_reads_its_own_kv_head(implementation):
    """Red when: heads are read as [G, K] instead of [K, G]."""
    q, k, v, _ = qkv(H=6, K=3)
    rows = packed_rows([40], [40], T=40)
    out = attend(q, k, v, *rows, implementation)
    k2, v2 = (x.at[:, :, 1].set(x[:, :, 2]).at[:, :, 2].set(x[:, :, 1]) for x in (k, v))
    q2 = q[:, :, [0, 1, 4, 5, 2, 3]]
    swapped = attend(q2, k2, v2, *rows, implementation)
    np.testing.assert_allclose(swapped[:, :, [0, 1, 4, 5, 2, 3]], out, **F32)
    repeated = attend(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2), *rows, implementation)
    np.testing.assert_allclose(repeated, out, **F32)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("implementation", ON_CPU)
def test_decoding_against_a_cache(implementation, T):
    """Red when: packed=False uses the index instead of the position, or reads free slots."""
    q, k, v, _ = qkv(T=T, S=50)
    lengths = np.array([20, 33])
    slots = np.arange(50)
    # The cache is a ring: slot 40 holds position 0. Slots beyond the length are free.
    kv_positions = np.broadcast_to((slots - 40) % 50, (2, 50)).astype(np.int32)
    kv_segments = (kv_positions < lengths[:, None]).astype(np.int32)
    positions = (lengths[:, None] - T + np.arange(T)).astype(np.int32)
    segments = np.ones((2, T), np.int32)
    want = float64(q, k, v, None, (positions, kv_positions, segments, kv_segments)).out
    got = attend(
        q, k, v, jnp.array(positions), jnp.array(segments), implementation, packed=False,
        kv_positions=jnp.array(kv_positions), kv_segments=jnp.array(kv_segments),
    )  # fmt: skip
    np.testing.assert_allclose(got, want, **F32)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_bf16_in_bf16_out(implementation):
    """Red when: the softmax's sum runs in bf16, or the output is left in f32."""
    q, k, v, dout = qkv(T=43, dtype=jnp.bfloat16)
    rows = packed_rows([20, 15], [43], T=43)
    out = attend(q, k, v, *rows, implementation)
    assert out.dtype == jnp.bfloat16
    rows64 = (rows[0], rows[0], rows[1], rows[1])
    want = float64(*(x.astype(jnp.float32) for x in (q, k, v)), None, rows64).out
    np.testing.assert_allclose(out.astype(np.float32), want, **BF16)
    up = [x.astype(jnp.float32) for x in (q, k, v, dout)]
    for a, b in zip(
        gradients(implementation, q, k, v, dout, *rows), gradients("reference", *up, *rows)
    ):
        assert a.dtype == jnp.bfloat16
        error = np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b)
        assert error < BF16["rtol"]


@pytest.mark.parametrize("implementation", ON_CPU)
def test_16_bits_are_not_rounded_after_scaling(implementation):
    """Red when: chunked scales 16-bit queries before the product."""
    q, k, v, dout = qkv(T=43, D=12, dtype=jnp.bfloat16)
    q *= 30
    positions, segments = packed_rows([20, 15], [43], T=43)
    rows64 = (positions, positions, segments, segments)
    want = float64(*(x.astype(jnp.float32) for x in (q, k, v, dout)), rows64)
    got = everything(implementation, q, k, v, dout, positions, segments, packed=True)
    for name, a in zip(("out", "lse", "dq", "dk", "dv"), got):
        b = getattr(want, name)
        seen = np.isfinite(b)
        error = np.linalg.norm(a.astype(np.float64)[seen] - b[seen]) / np.linalg.norm(b[seen])
        assert error < 2e-2, (name, error)
    half = [jnp.full((1, 2, 1, 1), x, jnp.float16) for x in (1000.0, 0.0, 0.0)]
    half[1], half[2] = (x.at[0, 1].set(1) for x in half[1:])
    out = attend(*half, *packed_rows([2], T=2), implementation, scale=100.0)  # 1e5: inf in f16
    assert np.array_equal(np.ravel(out), [0, 1])


def test_chunked_on_a_mesh_with_explicit_axes():
    """Red when: varying_alike reads one element of an array that lies on several devices."""
    q, k, v, _ = qkv()
    rows = packed_rows([40], [10, 20], T=40)
    want = attend(q, k, v, *rows, "chunked")
    axis = (jax.sharding.AxisType.Explicit,)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis, devices=jax.devices()[:2])):
        parts = [jax.device_put(x, jax.P("data")) for x in (q, k, v, *rows)]
        np.testing.assert_allclose(attend(*parts, "chunked"), want, **F32)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_under_scan_checkpoint_and_shard_map(implementation):
    """Red when: varying_alike goes. Queries are cut over two devices, keys are whole on both."""
    q, k, v, _ = qkv(T=44)
    positions, segments = packed_rows([44], [20, 12], T=44)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("sequence",))
    cut, whole = jax.P(None, "sequence"), jax.P()

    def stacked(q, k, v, positions, segments, kv_positions, kv_segments):
        @jax.checkpoint
        def layer(x, _):
            out = attend(
                x, k, v, positions, segments, implementation, packed=False,
                kv_positions=kv_positions, kv_segments=kv_segments,
            )  # fmt: skip
            return x + out, None

        return jax.lax.scan(layer, q, length=2)[0]

    specs = (cut, whole, whole, cut, cut, whole, whole)
    local = jax.shard_map(stacked, mesh=mesh, in_specs=specs, out_specs=cut)
    rows = (positions, segments, positions, segments)

    def gradient(f):
        return jax.jit(jax.grad(lambda *x: jnp.sum(f(*x, *rows) ** 2), (0, 1, 2)))(q, k, v)

    for a, b in zip(gradient(local), gradient(stacked)):
        np.testing.assert_allclose(a, b, **F32)


def test_chunked_leaves_out_keys_that_no_query_of_a_run_can_see():
    """Red when: a run of packed rows starts before its window or ends after its last query."""
    runs = functools.partial(chunked._runs, 43, 43, SMALL_BLOCK)
    queries = [slice(0, 16), slice(16, 32), slice(32, 48)]

    def keys(**options):
        found = runs(Options(scale=1.0, **options))
        assert [q for q, _ in found] == (queries if options["packed"] else [slice(0, 48)])
        return [(k.start, k.stop) for _, k in found]

    assert keys(packed=False, window=5) == [(0, 43)]
    assert keys(packed=True) == [(0, 16), (0, 32), (0, 43)]
    assert keys(packed=True, window=5) == [(0, 16), (12, 32), (28, 43)]


def test_chunked_memory_is_linear_in_the_length(monkeypatch):
    """Red when: QUERY_BLOCK grows with T, or a backward pass saves probabilities."""

    monkeypatch.setattr(chunked, "QUERY_BLOCK", 128)
    monkeypatch.setattr(chunked, "RUNS", 2)

    def temporary_bytes(T):
        shapes = [jax.ShapeDtypeStruct((1, T, h, 8), jnp.float32) for h in (4, 2, 2)]
        row = jax.ShapeDtypeStruct((1, T), jnp.int32)

        def loss(q, k, v, positions, segments):
            return attend(q, k, v, positions, segments, "chunked").sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, row, row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one, two = temporary_bytes(2048), temporary_bytes(4096)
    assert two < 2.5 * one  # quadratic would be 4
    assert two < 4 * 4096 * 4096 * 4 / 4  # a quarter of one f32 score matrix of all heads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "auto"}, "'auto' is unknown"),
        ({"window": 0}, "window=0 must be an integer from 1 on"),
        ({"window": 2.0}, "window=2.0 must be an integer"),
        ({"window": True}, "window=True must be an integer"),
        ({"window": 2**31}, "window=2147483648 must be in 1..2147483647 or None"),
        ({"soft_cap": 1e39}, "above 0 or None for no cap; in float32 it is inf"),
        ({"soft_cap": 1e-50}, "above 0 or None for no cap; in float32 it is 0.0"),
        ({"scale": 1e300}, "scale=1e[+]300 must be a finite number; in float32 it is inf"),
        ({"segments": np.ones((2, 40), np.int64)}, "q_segments_BT is int64, which int32 would cut"),
        ({"segments": jnp.ones((2, 40), jnp.uint32)}, r"pass q_segments_BT.astype\(jnp.int32\)"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0 must be a finite number above 0 or None for no cap"),
        ({"soft_cap": np.inf}, "soft_cap=inf must be a finite number above 0"),
        ({"soft_cap": "2"}, "soft_cap='2' must be a finite number"),
        ({"scale": np.nan}, "scale=nan must be a finite number"),
        ({"scale": True}, "scale=True must be a finite number"),
        ({"packed": 1}, "packed=1 must be True or False"),
        ({"dtype": jnp.int32}, "q_BTHD is int32; pass float32 or bfloat16 or float16"),
        ({"dtype": jnp.float8_e4m3fn}, "q_BTHD is float8_e4m3fn; pass float32"),
        ({"empty": "H"}, r"q_BTHD \[2, 40, 0, 8\] is empty: H=0 must be at least 1"),
        ({"empty": "T"}, "q_BTHD .* is empty: T=0"),
        ({"empty": "D"}, "q_BTHD .* is empty: D=0"),
        ({"empty": "K"}, "k_BSKD .* is empty: K=0"),
        ({"empty": "S"}, "k_BSKD .* is empty: S=0"),
        ({"segments": None}, r"q_segments_BT is None; pass integers \[2, 40\]"),
        ({"implementation": "cudnn"}, "needs an NVIDIA GPU, the backend is 'cpu'"),
        ({"packed": True, "T": 3}, "T=3, S=40: pass packed=False"),
        ({"H": 5}, "heads=5 must be a multiple of kv_heads=2"),
        ({"segments": jnp.ones((2, 7), jnp.int32)}, "q_segments_BT is int32"),
        ({"k_dtype": jnp.bfloat16}, "share a dtype"),
        ({"k_batch": 3}, "agree in batch and head_dim"),
    ],
)
def test_errors_name_the_value_and_the_fix(change, message):
    """Red when: a check is removed from api.checked or cudnn._check."""
    T = change.get("T", 40)
    q, k, v, _ = qkv(T=T, S=40, H=change.get("H", 6))
    if "k_batch" in change:
        k, v = (jnp.concatenate([x, x[:1]]) for x in (k, v))
    if "dtype" in change:
        q, k, v = (x.astype(change["dtype"]) for x in (q, k, v))
    if (axis := change.get("empty", "x")) in "THD":
        q = jnp.take(q, jnp.zeros(0, int), "BTHD".index(axis))
    if axis in "SK":
        k, v = (jnp.take(x, jnp.zeros(0, int), "BSKD".index(axis)) for x in (k, v))
    positions, segments = packed_rows([T], [T], T=T)
    with pytest.raises(ValueError, match=message):
        attend_now(
            q, k.astype(change.get("k_dtype", k.dtype)), v,
            positions, change.get("segments", segments),
            change.get("implementation", "chunked"), change.get("packed", True),
            kv_positions=jnp.zeros((2, 40), jnp.int32), kv_segments=jnp.ones((2, 40), jnp.int32),
            window=change.get("window"), soft_cap=change.get("soft_cap"), scale=change.get("scale"),
        )  # fmt: skip


def test_numbers_of_numpy_are_taken():
    """Red when: arguments.integer or number asks for Python's own types."""
    options = api.checked(
        *qkv(B=1)[:3], Rows(*(jnp.ones((1, 40), jnp.int32),) * 4), np.bool_(True),
        np.float32(0.5), np.int64(7), np.float64(2),
    )  # fmt: skip
    assert options == Options(packed=True, scale=0.5, window=7, soft_cap=2.0)
    assert hash(options) and type(options.window) is int and type(options.packed) is bool


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("twice", [jax.grad, jax.jacfwd], ids=["reverse", "forward"])
def test_a_second_derivative_is_an_error(implementation, twice):
    """Red when: differentiable_once goes from _attend_backward: the result would be wrong, as lse's
    cotangent is dropped."""
    q, k, v, _ = qkv(B=1, T=8, H=2, K=1, D=4)
    rows = packed_rows([8], T=8)

    def loss(q, k):
        return jnp.sum(attend_now(q, k, v, *rows, implementation) ** 2)

    gradient = jax.jit(jax.grad(loss))
    with pytest.raises(NotImplementedError, match="attention is differentiable once"):
        jax.eval_shape(twice(lambda k: jnp.sum(gradient(q, k) ** 2)), k)
    other = jax.grad(lambda x: jnp.sum(gradient(q, k)) * x)
    jax.eval_shape(other, 1.0)  # of something else


def test_any_segment_but_the_reserved_one_is_a_document():
    """Red when: 0 is not the only padding. Negative segments, and the largest."""
    q, k, v, dout = qkv(B=1)
    positions, segments = packed_rows([12, 12, 12], T=40)
    names = jnp.asarray([0, -1, 2**31 - 1, -(2**31) + 1], jnp.int32)
    for implementation in ON_CPU:
        for packed in (True, False):
            want = everything(implementation, q, k, v, dout, positions, segments, packed=packed)
            named = everything(
                implementation, q, k, v, dout, positions, names[segments], packed=packed
            )
            for a, b in zip(want, named):
                assert np.array_equal(a, b)
