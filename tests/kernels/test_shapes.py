"""The table of certified shapes: what is read is what was written; outside of it, what to do."""

import dataclasses
import re

import pytest
from lemur_kernels.attention import shapes
from lemur_kernels.attention.shapes import Certificate, Shape

SHAPE = Shape("v4", "forward", "bfloat16", 128, 64, 8, 4096)


TWO_HEADS = {"block": 512, "heads": 2, "vmem_bytes": None}


def _certificate(blocks=None, kcycles=1268.7, **fields) -> Certificate:
    return Certificate(
        shape=dataclasses.replace(SHAPE, **fields),
        blocks=blocks or {"block": 512, "heads": 8, "vmem_bytes": None},
        vmem_kib=10108,
        spills=12,
        kcycles={"causal": kcycles, "segments": 268.2},
    )


TABLE = [
    _certificate(),
    _certificate(seq=512),
    _certificate(seq=8192, blocks={"block": 512, "heads": 2, "vmem_bytes": 2**24}),
    _certificate(heads=8, kv_heads=1),
    _certificate(heads=32, kv_heads=32, kcycles=700.0),
    _certificate(heads=4, kv_heads=4, kcycles=95.0, blocks=TWO_HEADS),
    _certificate(heads=10, kv_heads=10, kcycles=300.0, blocks=TWO_HEADS),
    _certificate(head_dim=64),
    _certificate(head_dim=256),
    _certificate(dtype="float32"),
    _certificate(direction="backward"),
    _certificate(chip="v6e"),
]


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "certified.csv"
    found.write_text(shapes.table_text(TABLE, {"jax": "1"}))
    return found


def test_the_table_reads_as_written(path):
    """Red if an empty cell (vmem_bytes: the compiler's own limit) reads as 0."""
    assert sorted(shapes.certificates(path), key=str) == sorted(TABLE, key=str)
    assert shapes.table_text(list(reversed(TABLE)), {"jax": "1"}) == path.read_text()
    assert path.read_text().splitlines()[0] == "# compiler-predicted; jax 1"
    assert len(path.read_text().splitlines()) == 2 + len(TABLE)


def test_mixed_columns_are_refused():
    """Red if table_text drops the blocks that the first line lacks."""
    other = _certificate(seq=1024, blocks={"block": 512, "heads": 8, "width": 2})
    with pytest.raises(ValueError, match="has other columns than .*certify all shapes again"):
        shapes.table_text([*TABLE, other], {})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"seq": 4000}, {}),  # padded to the certified length
        ({"seq": 513}, {}),
        ({"seq": 100}, {"seq": 512}),
        ({"seq": 4097}, {"seq": 8192}),
        ({"heads": 8, "kv_heads": 1}, {"heads": 8, "kv_heads": 1}),
        ({"heads": 128, "kv_heads": 16}, {}),  # the same program, more steps
        ({"heads": 48, "kv_heads": 48}, {"heads": 32, "kv_heads": 32}),  # 21.9 kcycles a head
        ({"heads": 40, "kv_heads": 40}, {"heads": 4, "kv_heads": 4}),  # 23.8: 5 steps, 2 cores
        ({"heads": 10, "kv_heads": 10}, {"heads": 10, "kv_heads": 10}),  # its own, though 30
        ({"heads": 8, "kv_heads": 8}, {"heads": 4, "kv_heads": 4}),  # 8 at once: one core of two
    ],
)
def test_a_shape_takes_the_nearest_certificate_that_holds_it(path, fields, expected):
    """Red if certificate_for takes the longest row, or the nearest heads, or ignores a core that
    idles or a shape's own row."""
    asked = dataclasses.replace(SHAPE, **fields)
    found = shapes.certificate_for(asked, path)
    assert found.shape == dataclasses.replace(SHAPE, **expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chip": "v3"}, "chip=v3 .*nearest supported: v4, v6e; certify it"),
        ({"dtype": "float16"}, "dtype=float16 .*nearest supported: bfloat16, float32; cast"),
        ({"head_dim": 80}, "head_dim=80 .*nearest supported: 128; pad q, k and v with zeros"),
        ({"head_dim": 320}, "head_dim=320 .*nearest supported: 256, less than that"),
        (
            {"heads": 32},
            "heads / kv_heads=4 .*nearest supported: 1; repeat each kv head 4 times, 32 in all",
        ),
        (
            {"heads": 32, "kv_heads": 2},
            "heads / kv_heads=16 .*nearest supported: 8; repeat each kv head 2 times, 4 in all",
        ),
        (
            {"heads": 32, "chip": "v6e"},
            r"heads / kv_heads=4 .*none \(8 cannot be reached by repeating kv heads\); certify it",
        ),
        (
            {"heads": 11, "kv_heads": 11},
            "heads=11 .*nearest supported: 12; pad heads to 12 with zeros, kv heads to 12",
        ),
        ({"seq": 9000}, "seq=9000 .*nearest supported: 8192; split the row"),
        ({"direction": "backward", "seq": 8192}, "seq=8192 .*nearest supported: 4096;"),
        ({"chip": "v6e", "head_dim": 64}, "head_dim=64 .*nearest supported: 128; pad q, k"),
        ({"chip": "v6e", "head_dim": 512}, "head_dim=512 .*nearest supported: 128, less than that"),
    ],
)
def test_outside_the_table_is_an_error_that_helps(path, fields, message):
    """Red if a shape outside runs with the nearest one's blocks instead, or a fix is none: a ratio
    that repeating does not reach, fewer heads than there are."""
    with pytest.raises(ValueError, match=message):
        shapes.certificate_for(dataclasses.replace(SHAPE, **fields), path)


@pytest.mark.parametrize("fields", [{"heads": 24, "kv_heads": 3}, {"heads": 5, "kv_heads": 5}])
def test_padding_heads_as_told_is_certified(path, fields):
    """Red if the padded heads leave the ratio or a step's multiples."""
    asked = dataclasses.replace(SHAPE, **fields)
    table = [
        _certificate(blocks={"block": 512, "heads": 16}),
        _certificate(heads=12, kv_heads=12, blocks={"block": 512, "heads": 6}),
    ]
    path.write_text(shapes.table_text(table, {}))
    shapes.certificates.cache_clear()
    with pytest.raises(ValueError, match="pad heads to") as error:
        shapes.certificate_for(asked, path)
    told = re.search(r"pad heads to (\d+) with zeros, kv heads to (\d+)", str(error.value))
    H, K = map(int, told.groups())
    assert asked.heads < H and asked.heads // asked.kv_heads == H // K and H % K == 0
    shapes.certificate_for(dataclasses.replace(asked, heads=H, kv_heads=K), path)


def test_devices():
    """Red if "TPU v5 lite" reads as v5p."""
    assert [shapes.chip_of(kind) for kind in ("TPU v5 lite", "TPU v5")] == ["v5e", "v5p"]
    with pytest.raises(ValueError, match="device_kind='cpu' has no .*trace under jax.set_mesh"):
        shapes.chip_of("cpu")
