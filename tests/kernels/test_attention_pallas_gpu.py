"""The GPU kernels without a GPU: their numbers in interpret mode, and that they lower for CUDA.

Axis key: B batch, T query length, S key length, H heads, K kv heads, D head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_float64 import float64, packed_rows, qkv, visible
from lemur_kernels.attention import attention, pallas_gpu
from lemur_kernels.attention.mask import Options, Rows
from lemur_kernels.attention.pallas_gpu import Tiling

NAMES = ("out", "lse", "dq", "dk", "dv")
F32 = {"rtol": 2e-5, "atol": 2e-5}
SMALL = Tiling(16, 16, 4, 2)
PLAIN = Options(packed=True, scale=0.25)
B, T, H, K, D = 2, 43, 4, 2, 20  # ragged blocks, a padded head


def everything(q, k, v, dout, rows, options=PLAIN, tiling=SMALL):
    """out, lse, dq, dk, dv."""
    return compiled(options, tiling, q, k, v, dout, rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled(options, tiling, q, k, v, dout, rows):
    settings = {"tiling": tiling, "interpret": True}
    out, lse = pallas_gpu.forward(q, k, v, rows, options, **settings)
    gradients = pallas_gpu.backward(q, k, v, rows, options, out, lse, dout, **settings)
    return out, lse, *gradients


def rows_of(*lengths, T=T):
    positions, segments = packed_rows(*lengths, T=T)
    return Rows(positions, positions, segments, segments)


def wanted(arrays, rows, options):
    arrays = [x.astype(jnp.float32) for x in arrays]
    return float64(
        *arrays, rows, scale=options.scale, window=options.window, soft_cap=options.soft_cap
    )


def shuffled(rows):
    """The same tokens in any order, other orders for queries and keys; some segments fall."""
    rng = np.random.default_rng(5)
    queries, keys = rng.permutation(T), rng.permutation(T)
    q_positions, kv_positions, q_segments, kv_segments = rows
    return Rows(
        q_positions[:, queries], kv_positions[:, keys], q_segments[:, queries], kv_segments[:, keys]
    )


ROWS = {
    "one document; documents across blocks": rows_of([43], [5, 20, 18]),
    "documents at block borders; padding": rows_of([16, 16, 3], [16, 11]),
    "one-token documents; nothing": rows_of([1] * 43, []),
    "any order": shuffled(rows_of([43], [5, 20, 11])),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "options",
    [PLAIN, Options(packed=True, scale=0.5, window=13, soft_cap=0.7)],
    ids=["plain", "window and cap"],
)
def test_values_and_gradients_are_those_of_float64(rows, options):
    """Red when: a term of _visible goes, the cap's slope, delta or a scale goes, span[2] counts one
    block too many, total_Q or acc_QD is not shrunk, base_Q lets -inf through, or heads of a group
    do not add up. Rows that see nothing are in it: 0, +inf and 0."""
    arrays, rows = qkv(B, T, H, K, D), ROWS[rows]
    got = everything(*arrays, rows, options=options)
    for name, a, b in zip(NAMES, got, wanted(arrays, rows, options)):
        np.testing.assert_allclose(a, b, err_msg=name, **F32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_16_bit_whole_blocks_and_blocks_of_two_sizes(dtype):
    """Red when: probabilities are rounded before they are summed in f32 (out), the output is f32,
    queries and keys change block sizes."""
    arrays = qkv(1, 64, 3, 1, 16, dtype=dtype)
    rows = rows_of([40, 24], T=64)
    got = everything(*arrays, rows, tiling=Tiling(32, 16, 4, 2))
    for name, a, b in zip(NAMES, got, wanted(arrays, rows, PLAIN)):
        assert a.dtype == (jnp.float32 if name == "lse" else dtype)
        error = np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b)
        assert error < (6e-3 if dtype == jnp.bfloat16 else 1e-3), (name, error)


def test_more_keys_than_queries():
    """Red when: T and S change places in a grid or in a mask of the ragged end."""
    options = Options(packed=False, scale=0.25)
    arrays = qkv(1, 20, 2, 2, 16, S=50)
    at = jnp.arange(50, dtype=jnp.int32)[None]
    rows = Rows(at[:, 25:45], at, jnp.ones((1, 20), jnp.int32), jnp.ones((1, 50), jnp.int32))
    got = everything(*arrays, rows, options=options)
    for name, a, b in zip(NAMES, got, wanted(arrays, rows, options)):
        np.testing.assert_allclose(a, b, err_msg=name, **F32)


def test_other_documents_change_nothing_and_their_blocks_are_not_read():
    """Red when: a span starts at 0 or ends at the last block, in either direction: p is 0 there,
    but 0 NaN is NaN. And twice the same bits."""
    arrays, rows = qkv(B, T, H, K, D), rows_of([16, 16, 11], [16, 16, 11])
    before, again = everything(*arrays, rows), everything(*arrays, rows)
    moved = [x.at[:, :16].set(jnp.nan).at[:, 32:].add(1000.0) for x in arrays]
    after = everything(*moved, rows)
    for name, *results in zip(NAMES, before, again, after):
        a, b, c = (np.asarray(x) for x in results)
        assert np.array_equal(a, b), name
        middle = np.s_[..., 16:32] if name == "lse" else np.s_[:, 16:32]
        assert np.array_equal(a[middle], c[middle]), name


def test_large_scores():
    """Red when: the running maximum goes, or starts at 0 (all scores of a row below -1e4). Scores
    are multiples of 64, so that probabilities are 0, 1 or those of a tie; gradients are as good as
    the f32 lse of 1e5, whose last bit is 0.008."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.integers(-8, 9, (B, T, h, D)) * 16.0, jnp.float32) for h in (H, K))
    q = q.at[0].set(jnp.abs(q[0])).at[0, :, :, 0].set(4096.0)
    k = k.at[0].set(-jnp.abs(k[0])).at[0, :, :, 0].set(-64.0)
    arrays, rows = (q, k, *qkv(B, T, H, K, D)[2:]), ROWS["documents at block borders; padding"]
    want = wanted(arrays, rows, PLAIN)
    assert want.lse[0, :, :35].max() < -1e4
    assert want.lse[1, :, 26].max() > 1e4
    got = everything(*arrays, rows)
    for name, a, b in zip(NAMES[:2], got, want):
        np.testing.assert_allclose(a, b, err_msg=name, rtol=1e-6, atol=1e-5)
    for name, a, b in zip(NAMES[2:], got[2:], want[2:]):
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 5e-3, name


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("window", [None, 9])
def test_spans_hold_what_is_visible_and_little_else(window, by_keys):
    """Red when: last is one block short, first stays 0, seen is wider than all_seen."""
    tiling, options = Tiling(16, 8, 4, 2), Options(True, 1.0, window)

    @jax.jit
    def spans_of(rows):
        return pallas_gpu._spans(rows, options, tiling, by_keys=by_keys)

    for name, rows in ROWS.items():
        spans = np.asarray(spans_of(rows))
        for b in range(B):
            sees = np.zeros((48, 48), bool)
            sees[:T, :T] = visible(*(np.asarray(x[b]) for x in rows), window)
            blocks = sees.reshape(3, 16, 6, 8).swapaxes(1, 2).reshape(3, 6, -1)[:, : -(-T // 8)]
            some, every = blocks.any(-1), blocks.all(-1)
            if by_keys:
                some, every = some.T, every.T
            for block, (first, seen, unseen, last) in enumerate(spans[b]):
                assert first <= seen <= unseen <= last
                inside = np.zeros(some.shape[1], bool)
                inside[first:last] = True
                assert np.all(inside | ~some[block])
                assert every[block, seen:unseen].all()
                if "order" not in name:  # packed: exactly the needed ones
                    assert np.array_equal(inside, some[block])
                    assert unseen - seen == every[block].sum()


def lowered_for_cuda(monkeypatch, dtype, D, **options):
    """The text of the forward and the backward pass as an H100 gets them."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, k = (jax.ShapeDtypeStruct((1, 300, heads, D), dtype) for heads in (4, 2))
    row = jax.ShapeDtypeStruct((1, 300), jnp.int32)

    def loss(q, k, v, positions, segments):
        return attention(
            q, k, v, q_positions_BT=positions, kv_positions_BS=positions, q_segments_BT=segments,
            kv_segments_BS=segments, packed=True, implementation="pallas_gpu", **options,
        ).astype(jnp.float32).sum()  # fmt: skip

    h100 = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h100)):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, row, row)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("dtype", "D", "options"),
    [
        (jnp.bfloat16, 80, {}),
        (jnp.float16, 256, {}),
        (jnp.float32, 128, {"window": 64, "soft_cap": 30.0}),
    ],
    ids=["bf16", "f16", "f32"],
)
def test_three_kernels_lower_for_cuda(monkeypatch, dtype, D, options):
    """Red when: a kernel uses what Triton lacks, such as a block that is no power of 2."""
    text = lowered_for_cuda(monkeypatch, dtype, D, **options)
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3
    assert text.count("tt.atomic") == 0
    for name in ("forward", "dq", "dkv"):
        assert f"lemur_attention_{name}" in text or f"_{name}_kernel" in text


def test_every_supported_shape_has_blocks_that_triton_takes():
    """Red when: a tiling is no power of 2 or below the 16 of a matrix product."""
    for dtype in ("bfloat16", "float16", "float32"):
        for head_dim in (64, 80, 96, 128, 256):
            for direction in ("forward", "backward"):
                queries, keys, warps, stages = pallas_gpu.tiling_for(direction, dtype, head_dim)
                assert all(x >= 16 and x & (x - 1) == 0 for x in (queries, keys))
                assert warps in (4, 8) and 1 <= stages <= 4


@pytest.mark.parametrize(
    ("backend", "dtype", "D", "message"),
    [
        ("cpu", jnp.float32, 8, "needs an NVIDIA GPU, the backend is 'cpu'; use .*'chunked'"),
        ("gpu", jnp.float8_e4m3fn, 8, "q_BTHD is float8_e4m3fn; pass float32 or bfloat16"),
        ("gpu", jnp.bfloat16, 264, "takes head_dim up to 256, got 264; use .*'chunked'"),
    ],
)
def test_errors_name_the_value_and_the_fix(monkeypatch, backend, dtype, D, message):
    """Red when: a check goes from pallas_gpu._check, or the name from api.implementation_named."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = jax.ShapeDtypeStruct((1, 8, 2, D), dtype)
    rows = rows_of([8], T=8)._asdict()
    attend = functools.partial(attention, **rows, packed=True, implementation="pallas_gpu")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(attend, x, x, x)
