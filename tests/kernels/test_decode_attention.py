"""Decode attention in every implementation against float64, and what it must never read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import CASES, Case, answer, problem
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from lemur_kernels.decode_attention import decode_attention, join, page_shape, quantize, split
from lemur_kernels.decode_attention.plan import CORES, make_items, make_plan

XLA = ("reference", "gathered")


def cases(*fast: str) -> list:
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in CASES]


def close(out, expected, case: Case) -> None:
    assert out.dtype == case.dtype
    # bf16: 8 bits of q, k, v are the problem's; p and the result are rounded again.
    tolerance = 0.01 if case.dtype == "bfloat16" else 3e-3 if case.sharpness > 1 else 3e-6
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=tolerance, rtol=0)
    assert np.abs(expected).max() > 0.1  # the case has something to see


@pytest.mark.parametrize(
    "name",
    cases("window, several queries", "bf16", "int8", "soft cap, queries before the start", "long"),
)
@pytest.mark.parametrize("implementation", XLA)
def test_xla_matches_float64(implementation, name):
    """Red when visible() uses `<` for `<=`, the window keeps one key more, a scale is dropped."""
    p = problem(CASES[name])
    close(p.run(implementation), answer(p), p.case)


@pytest.mark.parametrize("name", cases())
def test_kernel_matches_float64(name):
    """Red when the running maximum does not shrink the sums, a mask or a page scale is dropped."""
    p = problem(CASES[name])
    close(p.run("pallas_tpu", interpret=True), answer(p), p.case)


def test_int8_taken_apart_by_shifts(monkeypatch):
    """The form for v4, whose keys come in another order. Red when masks or scales ignore that."""
    monkeypatch.setattr("lemur_kernels.decode_attention.pallas_tpu._unpacks_slowly", lambda: True)
    p = problem(Case((70, 35, 140), H=4, int8=True))
    close(p.run("pallas_tpu", interpret=True), answer(p), p.case)


@pytest.mark.parametrize("name", cases("blocks of 128", "window, several queries", "int8 bf16"))
def test_kernel_copies_without_races_on_two_cores(name):
    """Red when a wait is dropped, DEPTH - 1 becomes DEPTH, or a page out of sight is fetched:
    table entries out of sight are out of range here, and the interpreter raises on them."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    p = problem(CASES[name], seed=1)
    out = p.run("pallas_tpu", interpret=_interpreter())
    assert not interpret_pallas_call.races.races_found
    close(out, answer(p), p.case)


def _interpreter():
    return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=CORES)


@pytest.mark.parametrize("implementation", (*XLA, "pallas_tpu"))
def test_stale_memory_and_other_rows_do_not_matter(implementation):
    """NaN in every token beyond a row's length and in every page of nobody; another row's pages
    changed: this row's output is the same to the last bit. Red when masked values are not zeroed
    before the product, or one row too many is read."""
    kernel = {"interpret": True} if implementation == "pallas_tpu" else {}
    p = problem(Case((70, 41, 0), (2, 2, 0), N=2))
    before = p.run(implementation, **kernel)
    stale = np.ones((len(p.k), p.case.Z), bool)
    for b in range(3):
        for s in range(p.lengths[b]):
            stale[p.table[b, s // p.case.Z], s % p.case.Z] = False
    for pages in (p.k, p.v):
        pages.swapaxes(1, 2)[stale] = np.nan
        pages[p.table[1, :3]] += 5.0  # all of row 1
    after = p.run(implementation, **kernel)
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[2], 0)
    assert np.abs(after[1] - before[1]).max() > 1


@pytest.mark.parametrize("implementation", (*XLA, "pallas_tpu"))
def test_free_slots_and_missing_queries_give_zero(implementation):
    """Red when an empty row divides 0 by 0, or queries i >= n are computed."""
    kernel = {"interpret": True} if implementation == "pallas_tpu" else {}
    p = problem(Case((0, 50, 2, 33), (0, 1, 3, 0), N=3))
    out = p.run(implementation, **kernel)
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(out[1, 1:], 0)
    np.testing.assert_array_equal(out[2, 0], 0)  # at position -1
    np.testing.assert_array_equal(out[3], 0)
    assert all(np.abs(out[1, 0]).min(-1) > 0) and np.abs(out[2, 1:]).max() > 0.1
    np.testing.assert_array_equal(p.run(implementation, **kernel), out)  # twice the same
    nobody = jnp.zeros(4, jnp.int32)
    empty = p.run(implementation, lengths_B=nobody, new_tokens_B=nobody, **kernel)
    np.testing.assert_array_equal(empty, 0)


@pytest.mark.parametrize("implementation", (*XLA, "pallas_tpu"))
def test_out_of_range_is_nan_never_clamped(implementation):
    """A page id, a length, a count out of range: NaN in that row alone. Red without legal_rows."""
    kernel = {"interpret": True} if implementation == "pallas_tpu" else {}
    p = problem(Case((40, 40, 40, 40, 40)))
    table, lengths, new = p.table.copy(), p.lengths.copy(), p.new.copy()
    table[0, 2], table[1, 0], lengths[2], new[3] = len(p.k), -1, 65, 2
    out = p.run(
        implementation, page_table_BM=jnp.asarray(table), lengths_B=jnp.asarray(lengths),
        new_tokens_B=jnp.asarray(new), **kernel,
    )  # fmt: skip
    assert np.isnan(out[:4]).all()
    np.testing.assert_allclose(out[4], answer(p)[4], atol=3e-6)


@pytest.mark.parametrize("implementation", (*XLA, "pallas_tpu"))
def test_a_huge_length_harms_its_own_row_alone(implementation):
    """Lengths and counts at the ends of int32: NaN there, the other rows as ever. Red if
    gathered's `longest` is jnp.max(lengths_B), not cut off at M * Z (no block is read then)."""
    kernel = {"interpret": True} if implementation == "pallas_tpu" else {}
    p = problem(Case((20, 30, 30, 30, 30, 25), H=4, D=64))
    lengths, new = p.lengths.copy(), p.new.copy()
    lengths[1], lengths[2], new[3], new[4] = 2**31 - 1, -(2**31), 2**31 - 1, -(2**31)
    out = p.run(
        implementation, lengths_B=jnp.asarray(lengths), new_tokens_B=jnp.asarray(new), **kernel
    )
    assert np.isnan(out[1:5]).all()
    np.testing.assert_allclose(out[[0, 5]], answer(p)[[0, 5]], atol=3e-6)


@pytest.mark.parametrize("implementation", (*XLA, "pallas_tpu"))
@pytest.mark.parametrize("int8", (False, True))
def test_pages_behind_the_window_are_not_in_use(implementation, int8):
    """NaN in them, in their scales, and ids out of range (clipping would find a NaN): the answer is
    as ever. The page where the window begins is in use: an id out of range there is NaN. Red if
    gathered or pallas_tpu passes pages_in_use None for the window (int8: 0 * NaN is NaN)."""
    kernel = {"interpret": True} if implementation == "pallas_tpu" else {}
    p = problem(Case((90, 90, 90, 90), (2, 2, 2, 0), N=2, window=20, int8=int8))
    last = len(p.k) - 1
    p.table[p.table == last] = p.table[3, 0]  # page `last` is nobody's
    behind = (90 - 2 - 20 + 1) // p.case.Z
    p.table[0, :behind], p.table[1, :behind] = last, last + 1
    p.table[3] = last + 1  # this row has no query: nothing is in use
    expected = answer(p)
    if int8:
        pages = p.pages
        pages = {name: pages[name].at[last].set(jnp.nan) for name in pages if "scales" in name}
    else:
        p.k[last] = p.v[last] = np.nan
        pages = {}
    table = p.table.copy()
    table[2, behind] = last + 1
    out = p.run(implementation, page_table_BM=jnp.asarray(table), **pages, **kernel)
    np.testing.assert_allclose(out[:2], expected[:2], atol=3e-6)
    assert np.isnan(out[2]).all()
    np.testing.assert_array_equal(out[3], 0)


@pytest.mark.parametrize("implementation", (*XLA, "pallas_tpu"))
@pytest.mark.parametrize("window", (2**31 - 1, 48, 47))
def test_a_window_of_all_tokens_is_no_window(implementation, window):
    """More queries than tokens and a window near 2^31: row 1 has queries before its start, row 3
    a page id -1 in use. 48 is all that a row can hold, 47 is not. Red if api keeps the window."""
    kernel = {"interpret": True} if implementation == "pallas_tpu" else {}
    p = problem(Case((20, 1, 30, 2, 48), (4, 4, 4, 4, 4), N=4, H=2, K=1, window=window))
    expected = answer(p)
    p.table[3, 0] = -1
    out = p.run(implementation, page_table_BM=jnp.asarray(p.table[:, :3]), **kernel)
    np.testing.assert_allclose(out[[0, 1, 2, 4]], expected[[0, 1, 2, 4]], atol=3e-6)
    np.testing.assert_array_equal(out[1, :3], 0)
    assert np.isnan(out[3]).all()


def test_interpreter_raises_on_a_page_out_of_range():
    """Red when the ids are clipped in interpret mode too."""
    p = problem(Case((40, 40)))
    table = p.table.copy()
    table[1, 1] = len(p.k)
    with pytest.raises(Exception, match="[Oo]ut-of-bounds"):
        p.run("pallas_tpu", page_table_BM=jnp.asarray(table), interpret=_interpreter())
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("implementation", (*XLA, "pallas_tpu"))
def test_runs_inside_shard_map(implementation):
    """kv heads over a mesh, and the same queries against a cache per device: the answers of one
    device. Red without either varying_alike."""
    kernel = {"interpret": True} if implementation == "pallas_tpu" else {}
    p = problem(Case((50, 3), H=8, K=4))

    def step(q, pages, table, lengths):
        return decode_attention(
            q, pages, page_table_BM=table, lengths_B=lengths, implementation=implementation,
            **kernel,
        )  # fmt: skip

    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    q, pages = jnp.asarray(p.q, jnp.float32), p.pages["kv_pages_PKZC"]
    heads = (P(None, None, "x"), P(None, "x"), P(), P())
    caches = (P(), P("x"), P(), P())
    for specs, out, cache, expected in (
        (heads, heads[0], pages, answer(p)),
        (caches, P("x"), jnp.concatenate([pages, pages]), np.concatenate([answer(p)] * 2)),
    ):
        sharded = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=out)
        result = jax.jit(sharded)(q, cache, jnp.asarray(p.table), jnp.asarray(p.lengths))
        np.testing.assert_allclose(result, expected, atol=3e-6)


@pytest.mark.parametrize("name", ("int8 bf16", "one kv head, three queries"))
def test_kernel_where_x64_is_on(name):
    """Interpreted and lowered for a TPU. Red if `without_x64` goes from pallas_tpu."""
    p = problem(CASES[name])
    with jax.enable_x64(True):
        close(p.run("pallas_tpu", interpret=True), answer(p), p.case)
        arrays = {"q_BNHD": jnp.asarray(p.q, p.case.dtype), **p.pages}
        arrays |= {"page_table_BM": jnp.asarray(p.table), "lengths_B": jnp.asarray(p.lengths)}
        step = jax.jit(lambda given: decode_attention(**given, implementation="pallas_tpu"))
        assert "tpu_custom_call" in export.export(step, platforms=["tpu"])(arrays).mlir_module()


def test_pages_hold_keys_and_values_side_by_side():
    """The documented lanes; nothing lost. Red when values start at the wrong lane."""
    for head_dim, lanes, first in ((64, 128, 64), (80, 256, 128), (128, 256, 128), (256, 512, 256)):
        assert page_shape(8, 64, head_dim) == (8, 64, lanes)
        k, v = np.random.default_rng(0).normal(size=(2, 3, head_dim)).astype(np.float32)
        kv = join(jnp.asarray(k), jnp.asarray(v))
        assert kv.shape == (3, lanes)
        np.testing.assert_array_equal(kv[:, first : first + head_dim], v)
        np.testing.assert_array_equal(split(kv, head_dim), (k, v))
        assert np.count_nonzero(kv) == 6 * head_dim


def test_quantize_keeps_half_a_step():
    """Red when the scale is the page's and not the head's."""
    kv = np.random.default_rng(0).normal(size=(4, 2, 16, 128)).astype(np.float32)
    kv[:, 1] *= 100
    kv[3, 0, :, :64] = 0
    pages, *scales = quantize(jnp.asarray(kv), 64)
    for part, of, scale in zip(split(kv, 64), split(np.asarray(pages), 64), scales):
        scale = np.asarray(scale)[..., None, None]
        assert (np.abs(of * scale - part) <= scale * 0.5001).all()
    assert np.asarray(scales[0])[3, 0] == 0


@pytest.mark.parametrize("K, window", ((1, None), (2, 40)))
def test_items_cover_every_pair_once_and_balance_the_cores(K, window):
    """Red when high is one page too far, an item is doubled, or rows are dealt in order."""
    Z, M, N = 16, 8, 5
    lengths, new = np.array([128, 3, 0, 100, 7, 16, 65, 90]), np.array([5, 3, 0, 2, 1, 5, 5, 0])
    plan = make_plan(8, N, 8 * K, K, M, Z, 256, 2, window)
    items = make_items(plan, K, M, Z, *(jnp.asarray(x, jnp.int32) for x in (lengths, new)), window)
    items = jax.tree.map(np.asarray, items)
    pairs = list(zip(items.row, items.group, items.tile))
    assert len(set(pairs)) == len(pairs) == 8 * K // plan.heads * plan.tiles
    for row, low, high in zip(items.row, items.low, items.high):
        keys = [
            s
            for i in range(new[row])
            for s in range(lengths[row] - new[row] + i + 1)
            if window is None or s > lengths[row] - new[row] + i - window
        ]
        assert (low, high) == ((min(keys) // Z, max(keys) // Z + 1) if keys else (0, 0))
    work = (items.high - items.low).reshape(CORES, -1).sum(1)
    assert work.max() <= work.min() + M / 2
    for core, first in enumerate(range(0, len(pairs), len(pairs) // CORES)):
        live = [i for i in range(first, first + len(pairs) // CORES) if items.high[i]]
        followers = [items.following[i] for i in live]
        assert followers == [*live[1:], len(pairs)], core
    too_long = make_items(plan, K, M, Z, jnp.full(8, M * Z + 1), jnp.ones(8, jnp.int32), window)
    assert max(too_long.high) == M  # never past the end of the table


@pytest.mark.parametrize("implementation", ["reference", "gathered", "pallas_tpu"])
def test_no_derivative(implementation):
    """Red when: no_derivative goes from the public function, or leaves an argument out."""
    p = problem(Case((40, 3)))
    interpret = {"interpret": True} if implementation == "pallas_tpu" else {}

    arrays = {
        "q_BNHD": jnp.asarray(p.q),
        "kv_pages_PKZC": p.pages["kv_pages_PKZC"],
        "page_table_BM": jnp.asarray(p.table),
        "lengths_B": jnp.asarray(p.lengths),
    }

    def total(given):
        return decode_attention(
            **(arrays | given), implementation=implementation, **interpret
        ).sum()

    for given in ({name: arrays[name]} for name in ("q_BNHD", "kv_pages_PKZC")):
        with pytest.raises(NotImplementedError, match="decode_attention is not differentiable"):
            jax.eval_shape(jax.grad(total), given)
    jax.eval_shape(jax.grad(lambda x: x * total({})), 1.0)  # no tangent comes here


def test_a_page_with_a_nan_reads_as_nan():
    """What quantize documents."""
    pages = jnp.zeros((2, 1, 16, 128)).at[1, 0, 3, 5].set(jnp.nan)
    int8, k_scales, v_scales = quantize(pages, 64)
    keys, values = split(int8.astype(jnp.float32), 64)
    assert np.isnan(keys[1] * k_scales[1, 0]).all() and not np.any(values[1] * v_scales[1, 0])
    assert not np.any(keys[0] * k_scales[0, 0])


def test_errors_name_the_field_and_the_fix():
    """Each check of the public function; red when one is removed."""
    p = problem(Case((40, 3)))
    quantized = problem(Case((40, 3), int8=True)).pages
    with pytest.raises(ValueError, match="implementation='auto'.*pallas_tpu"):
        p.run("auto")
    with pytest.raises(ValueError, match=r"pages \[2, 16, 64\].*\[2, 16, 128\].*join"):
        p.run("reference", kv_pages_PKZC=jnp.zeros((3, 2, 16, 64)))
    with pytest.raises(ValueError, match="page_tokens=24.*nearest: 16"):
        p.run("reference", kv_pages_PKZC=jnp.zeros((3, 2, 24, 128)))
    with pytest.raises(ValueError, match="heads=8 must be a multiple of kv_heads=3"):
        p.run("reference", kv_pages_PKZC=jnp.zeros((3, 3, 16, 128)))
    with pytest.raises(ValueError, match="bfloat16, q is float32"):
        p.run("reference", kv_pages_PKZC=jnp.zeros((3, 2, 16, 128), jnp.bfloat16))
    with pytest.raises(ValueError, match="k_scales_PK is missing with int8"):
        p.run("reference", kv_pages_PKZC=quantized["kv_pages_PKZC"])
    with pytest.raises(ValueError, match=r"v_scales_PK is float32\[3\]"):
        p.run("reference", **quantized | {"v_scales_PK": jnp.zeros(3)})
    with pytest.raises(ValueError, match="lengths_B is float32"):
        p.run("reference", lengths_B=jnp.zeros(2))
    for name, value, message in (
        ("window", 0, "window=0 must be an integer from 1 on or None"),
        ("window", 2.0, "window=2.0 must be an integer"),
        ("window", True, "window=True must be an integer"),
        ("soft_cap", 0, "soft_cap=0 must be a finite number above 0 or None"),
        ("soft_cap", np.inf, "soft_cap=inf must be a finite number"),
        ("scale", np.nan, "scale=nan must be a finite number"),
        ("scale", "1", "scale='1' must be a finite number"),
        ("page_table_BM", jnp.zeros(2, jnp.int32), r"page_table_BM has shape \[2\]; pass \[B,M\]"),
        ("page_table_BM", jnp.int32(0), r"page_table_BM has shape \[\]; pass \[B,M\]"),
        ("page_table_BM", jnp.zeros((2, 0), jnp.int32), "is empty: M=0"),
        ("page_table_BM", None, "page_table_BM is None"),
        ("lengths_B", None, r"lengths_B is None; pass int32 \[2\]"),
        ("kv_pages_PKZC", jnp.zeros((0, 2, 16, 128)), "kv_pages_PKZC .* is empty: P=0"),
        ("q_BNHD", jnp.zeros((2, 1, 8, 64), jnp.float16), "q_BNHD is float16; pass float32 or"),
        ("q_BNHD", jnp.zeros((2, 0, 8, 64)), "q_BNHD .* is empty: N=0"),
    ):
        with pytest.raises(ValueError, match=message):
            p.run("gathered", **{name: value})
    with pytest.raises(ValueError, match=r"k_D is float32\[3, 64\], v_D is float32\[3, 32\]"):
        join(jnp.zeros((3, 64)), jnp.zeros((3, 32)))
    with pytest.raises(ValueError, match="k_D is float32.* v_D is bfloat16"):
        join(jnp.zeros((3, 64)), jnp.zeros((3, 64), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"head_dim, the last axis, is 1..256"):
        join(jnp.zeros((3, 257)), jnp.zeros((3, 257)))
    with pytest.raises(ValueError, match="interpret is for 'pallas_tpu'"):
        p.run("gathered", interpret=True)
    with pytest.raises(ValueError, match="head_dim=320 must be in 1..256"):
        page_shape(8, 64, 320)
    for sizes, message in (
        ((2.0, 64, 64), "kv_heads=2.0 must be an integer from 1 on"),
        ((True, 64, 64), "kv_heads=True must be an integer"),
        ((0, 64, 64), "kv_heads=0 must be an integer from 1 on"),
        ((8, 64.0, 64), r"page_tokens=64.0 must be an integer .* one of \[16, 32"),
        ((8, 512, 64), "page_tokens=512 must be one of .*nearest: 256"),
        ((8, 64, 64.0), "head_dim=64.0 must be in 1..256 and an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            page_shape(*sizes)
    pages_64 = jnp.zeros((3, 2, 16, 128))
    for function, name in ((split, "kv_C"), (quantize, "kv_PKZC")):
        with pytest.raises(ValueError, match=rf"^{name} is .*head_dim=80 .* 256 lanes.*pass"):
            function(pages_64, 80)
        with pytest.raises(ValueError, match="head_dim=320 must be in 1..256"):
            function(pages_64, 320)
    with pytest.raises(ValueError, match="kv_PKZC is int8; pass float32 or bfloat16"):
        quantize(pages_64.astype(jnp.int8), 64)
    with pytest.raises(ValueError, match=r"kv_PKZC has shape \[3, 128\]; pass \[P,K,Z,C\]"):
        quantize(pages_64[:, 0, 0], 64)
    with pytest.raises(ValueError, match="2 x 200000 entries.*at most 1 rows"):
        p.run("pallas_tpu", page_table_BM=jnp.zeros((2, 200_000), jnp.int32), interpret=True)
    with pytest.raises(ValueError, match="needs a TPU.*implementation='gathered'"):
        p.run("pallas_tpu")
