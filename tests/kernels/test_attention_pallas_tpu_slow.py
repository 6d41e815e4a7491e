"""The TPU attention kernels, interpreted: tilings drawn at random, sizes of the certified kind, and
the public function's own gradient. Minutes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_float64 import qkv
from attention_tpu import check, packed, tiling
from lemur_kernels.attention import attention, pallas_tpu, tilings
from lemur_kernels.attention.mask import Options, Rows

pytestmark = pytest.mark.slow

F32 = {"rtol": 2e-5, "atol": 5e-6}
# 2^-8 for each of the inputs' products, the probabilities and the result; dq of a token that sees
# itself alone is 0, and here the rounding of out: 2^-9 sqrt(D) of dout . out, times scale k.
BF16 = {"rtol": 1e-2, "atol": 4e-2}


def drawn(seed):
    """Options, tiling, shape, whether in bf16: any legal combination."""
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    block = one_of(16, 32, 64)
    group, kv_heads = one_of(1, 2, 3, 4), one_of(1, 2, 3)
    heads = group * kv_heads
    legal = [
        h for h in range(1, heads + 1)
        if heads % h == 0 and max(h, group) % min(h, group) == 0
        and kv_heads % tilings.kv_heads_per_step(h, group) == 0
    ]  # fmt: skip
    at_once = one_of(*legal)
    chains = kv_heads // tilings.kv_heads_per_step(at_once, group)
    unrolls = [u for u in (1, 2, 3, 4) if at_once % u == 0]
    sizes = {
        "heads": at_once, "unroll": one_of(*unrolls), "square_unroll": one_of(*unrolls),
        "strip": one_of(8, block // 2, block), "trapezoid": one_of(8, block // 2, block),
        "square": one_of(8, block // 2, block), "depth": one_of(1, 2, 3),
        "diagonal_depth": one_of(1, 2, 4), "split": one_of(1, 2),
        "span": block * one_of(1, 2, 3, 100),
    }  # fmt: skip
    if heads // chains % (2 * at_once):
        sizes["split"] = 1
    sizes["trapezoid"] = min(sizes["trapezoid"], sizes["strip"])  # a triangle lies in one tile
    tiles = tiling(block, **sizes)
    is_packed = bool(rng.integers(3))
    options = Options(
        is_packed, one_of(0.2, 0.5), one_of(None, 1, 23, 70, 1000), one_of(None, None, 2.0, 30.0)
    )
    T = int(rng.integers(1, 200))
    S = T if is_packed else int(rng.integers(1, 200))
    shape = {"B": one_of(1, 2, 3), "T": T, "S": S, "H": heads, "K": kv_heads, "D": one_of(8, 24)}
    return options, tiles, shape, bool(rng.integers(4) == 0)


def drawn_rows(rng, options, B, T, S) -> Rows:
    if options.packed:
        rows = []
        for _ in range(B):
            lengths, room = [], T - int(rng.integers(0, T))
            while room:
                lengths.append(int(rng.integers(1, min(room, rng.choice([1, 30, 200])) + 1)))
                room -= lengths[-1]
            rows.append(lengths)
        return packed(*rows, T=T)
    high = int(rng.integers(2, 5))
    draw = [rng.integers(0, n, (B, L)) for n, L in ((99, T), (99, S), (high, T), (high, S))]
    return Rows(*(jnp.asarray(x, jnp.int32) for x in draw))


@pytest.mark.parametrize("seed", range(20))
def test_any_tiling_gives_what_float64_gives(seed):
    """Red when: one of the kernels' sizes stands for another (strip for square, span for row)."""
    options, tiles, shape, is_bf16 = drawn(seed)
    rng = np.random.default_rng(1000 + seed)
    for again in range(3):
        rows = drawn_rows(rng, options, shape["B"], shape["T"], shape["S"])
        dtype = jnp.bfloat16 if is_bf16 else jnp.float32
        inputs = qkv(**shape, seed=seed + 100 * again, dtype=dtype)
        check(options, tiles, inputs, rows, BF16 if is_bf16 else F32)


REAL = tiling(128, heads=4, unroll=2, square_unroll=2, square=128, trapezoid=128)
LARGE = tiling(256, heads=2, strip=128, trapezoid=128, square=128, span=256)


@pytest.mark.parametrize(
    ("tiles", "head_dim", "dtype", "limits"),
    [
        (REAL, 128, jnp.bfloat16, BF16),
        (REAL, 80, jnp.float32, F32),
        (LARGE, 64, jnp.bfloat16, BF16),
        (LARGE, 96, jnp.float32, F32),
    ],
    ids=["128 bf16", "80 f32", "64 bf16, spans", "96 f32, spans"],
)
def test_sizes_of_the_certified_kind(tiles, head_dim, dtype, limits):
    """Red when: a size below 128 or a head_dim of the tests' is written into a kernel."""
    options = Options(True, head_dim**-0.5)
    for seed, lengths in enumerate(([500], [1, 127, 129, 100, 60], [256, 200])):
        inputs = qkv(B=1, T=500, H=4, K=2, D=head_dim, seed=seed, dtype=dtype)
        rows = packed(lengths, T=500)
        got = check(options, tiles, inputs, rows, limits)
        assert got.repeated_steps == 0
    q, k, v, dout = inputs
    limits = BF16 if dtype == jnp.bfloat16 else {"rtol": 0, "atol": 8e-3}
    got = check(options, tiles, (30 * q, 30 * k, v, dout), rows, limits)
    assert got.repeated_steps > 0


def test_the_public_function_under_checkpoint_and_shard_map(monkeypatch):
    """Red when: attention's gradient passes residuals in another order, or a kernel needs to know
    the mesh. lemur_jax.sharding runs kernels with check_vma=False, as here."""
    tiles = tiling(32, heads=2)
    for name in ("forward", "backward"):
        call = functools.partial(getattr(pallas_tpu, name), tiling=tiles, interpret=True)
        monkeypatch.setattr(pallas_tpu, name, call)
    q, k, v, _ = qkv(B=2, T=70, H=4, K=2, D=16)
    rows = packed([30, 35], [70], T=70)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))

    def loss(implementation, q, k, v):
        @jax.checkpoint
        def layer(q, k, v, positions, segments):
            return attention(
                q, k, v, q_positions_BT=positions, kv_positions_BS=positions,
                q_segments_BT=segments, kv_segments_BS=segments,
                packed=True, implementation=implementation,
            )  # fmt: skip

        data = jax.P("data")
        cut = jax.shard_map(layer, mesh=mesh, in_specs=(data,) * 5, out_specs=data, check_vma=False)
        return jnp.sum(cut(q, k, v, rows[0], rows[2]) ** 2)

    def gradient(implementation):
        return jax.jit(jax.grad(functools.partial(loss, implementation), (0, 1, 2)))(q, k, v)

    for a, b in zip(gradient("pallas_tpu"), gradient("reference")):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
