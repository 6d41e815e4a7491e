"""The TPU attention kernels, interpreted on the CPU, against float64.

Axis key: B batch, T query length, S key length, H heads, K kv heads, G = H / K, D head dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_float64 import qkv
from attention_tpu import check, expected, packed, run, tiling
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from lemur_kernels.attention import attention, pallas_tpu
from lemur_kernels.attention.mask import Options, Rows

# Of each number, and of the largest of its array.
F32 = {"rtol": 2e-5, "atol": 5e-6}
# 2^-8 for each of: the inputs' products, the probabilities, the result. Sums average over them.
BF16 = {"rtol": 1e-2, "atol": 1e-2}
# A score of 1e4 is exact to 1e4 2^-23 = 1.2e-3, and so, relatively, is its exponential; the
# backward pass meets the rounding of the score, of lse and of lse in base 2.
SCORES_1E4 = {"rtol": 0, "atol": 8e-3}

D = 16
SCALE = D**-0.5
# Two rows of 100 tokens, the last block of 32 ragged; two groups of two heads in a step.
PLAIN = Options(True, SCALE), tiling(heads=4, unroll=2, square_unroll=2, strip=16)
SHAPE = {"B": 2, "T": 100, "H": 4, "K": 2, "D": D}
LENGTHS = {
    "one document": ([100], [64]),
    "packed": ([40, 30, 30], [7, 57, 36]),
    "one-token documents": ([1, 1, 1, 29, 1, 31, 1, 1], [1] * 100),
    "blocks of padding": ([20], []),
    "documents of a block": ([32, 32, 32, 4], [64, 32]),
}


@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_rows(lengths):
    """Red when: delta is left out of ds, dq misses the scale, first_keys forget padding, the
    trapezoid ends a strip early, or a query block without keys is not written."""
    rows = packed(*LENGTHS[lengths], T=100)
    inputs = qkv(**SHAPE, seed=len(lengths))
    got = check(*PLAIN, inputs, rows, F32)
    assert got.repeated_steps == 0  # an ordinary input never runs again
    again = run(*PLAIN, inputs, rows)
    for a, b in zip(got, again):
        assert np.array_equal(a, b)  # twice the same bits


def test_padding_between_documents():
    """Red when: first_keys let a query see across padding, or call padding a document."""
    segments = np.zeros((2, 100), np.int32)
    positions = np.zeros_like(segments)
    for row, start, end in ((0, 0, 10), (0, 15, 40), (0, 80, 99), (1, 33, 65), (1, 65, 66)):
        segments[row, start:end] = start + 1
        positions[row, start:end] = np.arange(end - start)
    rows = Rows(*map(jnp.asarray, (positions, positions, segments, segments)))
    check(*PLAIN, qkv(**SHAPE, seed=7), rows, F32)


# Steps of fewer heads than a group; two runs that share the kv head; dk, dv in three spans.
MQA = tiling(heads=2, split=2, span=32, strip=16, trapezoid=8, square=8)
# A kv head for each head; one head in a step.
MHA = tiling(heads=1, square_unroll=1, depth=2, diagonal_depth=1, span=64)
# One kv head of four; three parts of its heads visit a row one after the other.
PARTS = tiling(heads=2, unroll=2, square_unroll=1, diagonal_depth=3)


@pytest.mark.parametrize(
    ("options", "tiles", "heads"),
    [
        (Options(True, SCALE, window=37), MQA, (8, 1)),
        (Options(True, 0.4, window=11, soft_cap=2.0), MHA, (3, 3)),
        (Options(True, SCALE, soft_cap=5.0), PARTS, (6, 1)),
    ],
    ids=["window, MQA, split, spans", "window, soft cap, MHA, spans", "soft cap, parts"],
)
def test_packed_options_and_heads(options, tiles, heads):
    """Red when: the slope of the cap is left out, a part of the heads opens a row anew, a span is
    not opened where nobody sees it, two runs of one kv head are not added, or dq starts a span
    from 0."""
    shape = {"B": 2, "T": 90, "H": heads[0], "K": heads[1], "D": D}
    for seed, lengths in enumerate(([[90], [20]], [[31, 33, 20], [1, 1, 60, 28]], [[], [90]])):
        got = check(options, tiles, qkv(**shape, seed=seed), packed(*lengths, T=90), F32)
        assert got.repeated_steps == 0


def unpacked_rows(seed, T, S, B=2) -> Rows:
    """Three segments and padding, in any order and at any position."""
    rng = np.random.default_rng(seed)
    draw = [rng.integers(0, n, (B, L)) for n, L in ((60, T), (60, S), (4, T), (4, S))]
    return Rows(*(jnp.asarray(x, jnp.int32) for x in draw))


def cache_rows(T, S, lengths) -> Rows:
    """T new tokens against a cache of `lengths` of S slots, one document each."""
    lengths = np.asarray(lengths)[:, None]
    slots = np.broadcast_to(np.arange(S), (len(lengths), S))
    rows = (lengths - T + np.arange(T), slots, np.ones((len(lengths), T)), slots < lengths)
    return Rows(*(jnp.asarray(x, jnp.int32) for x in rows))


UNPACKED = {
    "window, spans": (Options(False, SCALE, window=40), tiling(heads=2, span=64, strip=16)),
    "soft cap": (Options(False, 0.5, soft_cap=3.0), tiling(heads=4, unroll=2, depth=2)),
}


@pytest.mark.parametrize("case", UNPACKED)
def test_rows_that_are_not_packed(case):
    """Red when: columns of segments or positions are those of another row, T is taken for S, the
    running maximum starts at 0, or the sum is not shrunk with it."""
    options, tiles = UNPACKED[case]
    inputs = qkv(B=2, T=41, S=100, H=4, K=2, D=D, seed=len(case))
    dark = Rows(*(x.at[1].set(0) if i > 1 else x for i, x in enumerate(unpacked_rows(3, 41, 100))))
    for rows in (unpacked_rows(1, 41, 100), cache_rows(41, 100, [60, 97]), dark):
        got = check(options, tiles, inputs, rows, F32)
    assert not got.out[1].any() and not any(x[1].any() for x in got[2:5])


def test_padding_matches_no_segment_that_a_user_may_have():
    """Red when: marks give padding a segment that a key may have, as -1."""
    names = jnp.asarray([0, -1, 2**31 - 1, -(2**31) + 1], jnp.int32)
    rows = unpacked_rows(4, 41, 100)
    rows = rows._replace(
        q_segments_BT=names[rows.q_segments_BT], kv_segments_BS=names[rows.kv_segments_BS]
    )
    check(*UNPACKED["soft cap"], qkv(B=2, T=41, S=100, H=4, K=2, D=D, seed=4), rows, F32)


@pytest.mark.parametrize("is_packed", [True, False])
def test_bf16(is_packed):
    """Red when: results leave in f32, or probabilities are summed after rounding (lse would be off
    by 2^-8)."""
    options = Options(is_packed, SCALE, window=None if is_packed else 50)
    rows = packed([40, 60], [95], T=100)
    # Two runs share a kv head: their parts of dk and dv meet in f32.
    kv_heads, tiles = (1, tiling(heads=2, split=2)) if is_packed else (2, tiling(heads=2))
    inputs = qkv(**SHAPE | {"K": kv_heads}, seed=3, dtype=jnp.bfloat16)
    got = check(options, tiles, inputs, rows, BF16)
    assert [x.dtype for x in got[:5]] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    np.testing.assert_allclose(got.lse, expected(options, inputs, rows).lse, rtol=2e-5, atol=2e-5)


def test_under_x64():
    """Red when: `without_x64` goes from forward or backward."""
    rows, inputs = packed([40, 60], [95], T=100), qkv(**SHAPE)
    want = run(*PLAIN, inputs, rows)
    with jax.enable_x64(True):
        got = run(*PLAIN, inputs, rows)
    for a, b in zip(got, want):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_shard_map_that_checks_axes_is_told_not_to(implementation):
    """Red when: refuse_varying goes from api.prepared: JAX's own error tells no fix."""
    q, k, v, _ = qkv(**SHAPE)
    rows = packed([100], [100], T=100)._asdict()
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))

    def local(q, k, v, rows):
        return attention(q, k, v, **rows, packed=True, implementation=implementation)

    rows = {name: rows[name] for name in Rows._fields}
    with pytest.raises(ValueError, match="inside shard_map over data: .*; pass check_vma=False"):
        specs = {"in_specs": jax.P("data"), "out_specs": jax.P("data")}
        jax.shard_map(local, mesh=mesh, **specs)(q, k, v, rows)


def test_backward_takes_the_lse_that_it_is_given():
    """Red when: the backward kernel normalises by itself. Half of the keys at a time, as in a
    ring, with out and lse of all keys."""
    options, tiles = UNPACKED["soft cap"]
    rows = unpacked_rows(8, 41, 200)
    q, k, v, dout = qkv(B=2, T=41, S=200, H=4, K=2, D=D, seed=8)
    want = expected(options, (q, k, v, dout), rows)
    half = jax.jit(
        lambda k, v, rows: pallas_tpu.backward(
            q, k, v, rows, options, jnp.float32(want.out), jnp.float32(want.lse), dout,
            tiling=tiles, interpret=True,
        )
    )  # fmt: skip
    keys = [slice(0, 100), slice(100, 200)]
    halves = [
        half(k[:, s], v[:, s], Rows(rows[0], rows[1][:, s], rows[2], rows[3][:, s])) for s in keys
    ]
    np.testing.assert_allclose(halves[0][0] + halves[1][0], want.dq, **F32)
    for i, whole in ((1, want.dk), (2, want.dv)):
        np.testing.assert_allclose(np.concatenate([h[i] for h in halves], 1), whole, **F32)


def unsafe_blocks(lse_BHT, block=32):
    """Query blocks whose sum of exponentials left 2^-80 .. 2^80 for some token and head."""
    B, _, T = lse_BHT.shape
    far = (np.isfinite(lse_BHT) & (np.abs(lse_BHT) * math.log2(math.e) > 80)).any(1)
    far = np.pad(far, ((0, 0), (0, -T % block))).reshape(B, -1, block).any(-1)
    return np.flatnonzero(far)


def _scores(size):
    """All scores about `size`: equal queries along equal keys, with some noise."""

    def change(q, k, v, dout):
        x = math.sqrt(abs(size) / SCALE / D)
        return x + 0.001 * q, math.copysign(1, size) * (x + 0.001 * k), v, dout

    return change


def _one_query_30_times_larger(q, k, v, dout):
    return q.at[0, 50].multiply(30), 3 * k, v, dout


UNSAFE = {
    "scores of 1e4": (_scores(1e4), SCORES_1E4),
    "scores of -1e4": (_scores(-1e4), SCORES_1E4),
    "scores of 1e4, either sign": (lambda q, k, v, d: (140 * q, 140 * k, v, d), SCORES_1E4),
    "one query 30 times larger": (_one_query_30_times_larger, F32 | {"atol": 5e-5}),
    "one query and one head": (lambda q, k, v, d: (q.at[1, 70, 3].mul(200), k, v, d), SCORES_1E4),
    "keys all equal": (lambda q, k, v, d: (q, jnp.ones_like(k), v, d), F32),
    "keys all equal and large": (
        lambda q, k, v, d: (1 + 0.1 * q, jnp.full_like(k, 50.0), v, d), F32 | {"atol": 1e-3}
    ),
    "values of 1e4": (lambda q, k, v, d: (q, k, 1e4 * v, d), F32),
    "values of 1e4, unsafe": (lambda q, k, v, d: (40 * q, k, 1e4 * v, d), SCORES_1E4),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAFE)
def test_any_input_is_safe_and_only_unsafe_blocks_run_again(case):
    """Red when: _unsafe_blocks looks at one head, at large sums only, forgets sums of 0 or uses
    another block; the repeat starts from a maximum of 0, or loses what it does not visit."""
    change, limits = UNSAFE[case]
    rows = packed([40, 33, 20], [96], T=100)
    inputs = change(*qkv(**SHAPE, seed=11))
    got = check(*PLAIN, inputs, rows, limits)
    want = unsafe_blocks(expected(PLAIN[0], inputs, rows).lse)
    assert got.repeated.tolist() == want.tolist()
    assert (len(want) > 0) == (case not in ("keys all equal", "values of 1e4"))
    if case.startswith("one"):
        assert len(want) < 3
    # Only pairs with something visible run again.
    assert got.repeated_steps <= sum(b % 4 + 1 for b in want)


def test_extremes_without_packing():
    """Red when: the running maximum starts above the scores, or masked scores are not below it."""
    options = UNPACKED["window, spans"]
    rows = unpacked_rows(5, 41, 100)
    inputs = qkv(B=2, T=41, S=100, H=4, K=2, D=D, seed=9)
    for case in ("scores of 1e4", "scores of -1e4", "values of 1e4, unsafe"):
        change, limits = UNSAFE[case]
        check(*options, change(*inputs), rows, limits)


def moved(inputs, tokens, by):
    return [x.at[0, tokens].add(by * (1 + i)) for i, x in enumerate(inputs)]


def check_isolation(by):
    rows = packed([40, 33, 20], [96], T=100)
    inputs = qkv(**SHAPE, seed=2)
    before = run(*PLAIN, inputs, rows)
    after = run(*PLAIN, moved(inputs, slice(40, 73), by), rows)
    others = np.r_[0:40, 73:100]
    for name, a, b in zip(before._fields[:5], before, after):
        if name == "lse":
            a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
        assert np.array_equal(a[1], b[1]), name
        assert np.array_equal(a[0, others], b[0, others]), name
        assert not np.array_equal(a[0, 40:73], b[0, 40:73]), name


def test_documents_are_isolated_exactly():
    """Red when: a hidden score is made small instead of MASKED_SCORE, or a square's mask is off."""
    check_isolation(0.5)


def test_documents_are_isolated_exactly_where_one_is_unsafe():
    """Red when: a query that was safe takes the repeat's result with its block's unsafe ones."""
    check_isolation(30.0)


def test_dense_gradient_of_later_tokens_is_exactly_zero():
    """Red when: a tile on the diagonal lets the next key through."""
    rows = packed([100], [96], T=100)
    q, k, v, dout = qkv(**SHAPE, seed=4)
    for t in (15, 16, 31, 32, 70):
        got = run(*PLAIN, (q, k, v, dout.at[:, t + 1 :].set(0).at[:, :t].set(0)), rows)
        for x in (got.dk, got.dv):
            assert not x[:, t + 1 :].any() and x[:, : t + 1].any((0, 2, 3)).all()
        assert not np.delete(got.dq, t, 1).any()


def call(head_dim=128, heads=(64, 8), T=256, dtype=jnp.bfloat16, implementation="pallas_tpu"):
    H, K = heads
    shape = jax.ShapeDtypeStruct
    q, k = shape((1, T, H, head_dim), dtype), shape((1, T, K, head_dim), dtype)
    row = shape((1, T), jnp.int32)

    def attend(q, k, v, positions, segments):
        return attention(
            q, k, v, q_positions_BT=positions, kv_positions_BS=positions,
            q_segments_BT=segments, kv_segments_BS=segments,
            packed=True, implementation=implementation,
        )  # fmt: skip

    return jax.eval_shape(attend, q, k, k, row, row)


def test_on_a_cpu_the_public_function_names_backend_and_fix():
    """Red when: certified_tiling falls back to interpret mode or to another implementation."""
    with pytest.raises(
        ValueError, match="'cpu' has no certified kernels.*implementation='chunked'"
    ):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 72}, r"head_dim=72 .*nearest supported: \d+; pad q, k and v"),
        (
            {"heads": (6, 2)},
            r"heads / kv_heads=3 .*supported: 1; repeat each kv head 3 times",
        ),
        ({"T": 2**20}, r"seq=1048576 .*nearest supported: \d+; split the row"),
        ({"dtype": jnp.float16}, r"dtype=float16 .*nearest supported: .*bfloat16.*cast q, k and v"),
    ],
    ids=["head_dim", "heads", "seq", "dtype"],
)
def test_a_shape_outside_the_table_names_the_nearest_inside(change, message):
    """Red when: certified_tiling swallows the error of shapes.certificate_for or passes q's length
    for the heads; the chip is the mesh's, not this machine's."""
    chip = AbstractDevice("TPU v4", 2, "tpu")
    with (
        use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)),
        pytest.raises(ValueError, match=message),
    ):
        call(**change)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_certified_tiling_is_the_one_of_chip_and_direction(direction):
    """Red when: certified_tiling reads the other direction or another chip's lines."""
    q, k = (jax.ShapeDtypeStruct((1, 300, n, 128), jnp.bfloat16) for n in (64, 8))
    for kind, chip in (("TPU v4", "v4"), ("TPU v6 lite", "v6e")):
        device = AbstractDevice(kind, 1, "tpu")
        with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
            got = pallas_tpu.certified_tiling(q, k, direction)
        shape = pallas_tpu.shapes.Shape(chip, direction, "bfloat16", 128, 64, 8, 300)
        assert dataclasses.asdict(got) == pallas_tpu.shapes.certificate_for(shape).blocks
