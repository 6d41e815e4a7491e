"""The parser, and what collectives join, against hand-written text and numpy."""

import random

import numpy as np
import pytest

from lemur_jax.plan import groups, hlo

MODULE = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[]{:T(128)}, f32[4]{0:T(128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[4]{0} add(%x, %x), metadata={op_name="jit(f)/while/body/add"}
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, %y)
  %after = s32[] add(%next, %one)
}

%condition (q: (s32[], f32[4])) -> pred[] {
  %q = (s32[], f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%j, %limit), direction=WAY
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %start = s32[] constant(START)
  %s = s32[] copy(%start)
  %init = (s32[], f32[4]{0}) tuple(%s, %a)
  %loop = (s32[], f32[4]{0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


def module(start: int, way: str, limit: int) -> hlo.Program:
    text = MODULE.replace("START", str(start)).replace("WAY", way).replace("LIMIT", str(limit))
    return hlo.parse(text)


@pytest.mark.parametrize(
    ("start", "way", "limit", "trips"),
    [(0, "LT", 7, 7), (2, "LT", 7, 5), (1, "LE", 7, 7), (9, "GE", 0, 10), (9, "GT", 0, 9)],
)
def test_trip_count_from_the_condition(start, way, limit, trips):
    """Red if LE counts like LT, or the initial value is taken to be 0."""
    program = module(start, way, limit)
    runs = {r.instruction.name: r for r in hlo.executions(program)}
    assert runs["y"].times == trips
    assert runs["y"].path == (f"loop x {trips}",)
    assert runs["s"].times == 1


def test_loop_that_ends_on_data_has_no_count():
    """Red if an unknown trip count becomes 1 in silence (trip_count returns 1)."""
    program = module(0, "NE", 7)
    entry = program.computations[program.entry]
    assert hlo.trip_count(program, entry, entry.get("loop")) is None
    assert {r.path for r in hlo.executions(program)} == {(), ("loop x ?",)}


def test_instructions_of_the_module():
    """Red if S(n) is not read, a tuple's first array is lost, or ROOT is taken for the last."""
    program = module(0, "LT", 3)
    body = program.computations["body"]
    assert body.get("p").shapes == (hlo.Shape("s32", ()), hlo.Shape("f32", (4,), 1))
    assert body.get("p").hbm_bytes == 4 and body.get("p").nbytes == 20
    assert body.get("y").op_name == "jit(f)/while/body/add"
    assert body.root == "t" and program.entry == "main"
    assert [u.name for u in body.users["x"]] == ["y"]
    assert body.get("t").operands == ("next", "y")


def test_compiled_step(program):
    """Red if `known_trip_count` or nested loops are not followed: two micro-batches of 8 layers."""
    paths = {tuple(p.split(" x ")[1] for p in r.path) for r in hlo.executions(program)}
    assert paths == {(), ("2",), ("2", "8")}
    entry = program.computations[program.entry]
    names = [i.op_name for _, i in sorted(entry.parameters.items())]
    assert names == ["state.model.up", "state.model.down", "state.mu.up", "state.mu.down", "batch"]
    assert [str(i.shapes[0]) for _, i in sorted(entry.parameters.items())][-1] == (
        "bf16[2,4,8192,1024]"
    )


def test_every_instruction_is_read(program, texts):
    """Red if the parser drops a line: as many instructions as lines with ` = `."""
    lines = [line for line in texts["program"].splitlines() if line.startswith("  ")]
    written = sum(" = " in line and "(" in line for line in lines)
    assert sum(len(c.instructions) for c in program.computations.values()) == written > 500


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("pred", 8), ("bf16", 16), ("f8e4m3fn", 8), ("u4", 4), ("c64", 64), ("token", 0)],
)
def test_element_bits(dtype, bits):
    """Red if f8e4m3fn is read as 843 bits or s4 takes a whole byte."""
    assert hlo.element_bits(dtype) == bits
    assert hlo.Shape("u4", (3,)).nbytes == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("module @jit_f {}", "HloModule"),
        (MODULE.replace(", is_scheduled=true", ""), "not scheduled"),
        (MODULE[:-3], "ENTRY"),
        (MODULE.replace("f32[4]{0} add(%x", "q9[4]{0} add(%x"), "q9"),
    ],
)
def test_refused(text, words):
    """Red if any of the four checks of parse goes: a lowered, cut off or foreign text."""
    with pytest.raises(hlo.HloError, match=words):
        for computation in hlo.parse(text).computations.values():
            [i.nbytes for i in computation]


def collective(rest: str, opcode: str = "all-gather") -> hlo.Instruction:
    return hlo.Instruction("c", (hlo.Shape("bf16", (8,)),), opcode, (), "", rest)


def test_iota_groups_are_numpys():
    """Red if the transposition is inverted (argsort of the axes) or the tile is [size, groups]."""
    rng = random.Random(0)
    for _ in range(30):
        dims = [rng.choice((1, 2, 3, 4)) for _ in range(rng.randint(1, 4))]
        axes = rng.sample(range(len(dims)), len(dims))
        size = rng.choice([d for d in range(1, np.prod(dims) + 1) if np.prod(dims) % d == 0])
        tile = (int(np.prod(dims)) // size, size)
        expected = np.arange(np.prod(dims)).reshape(dims).transpose(axes).reshape(tile)
        text = "[{}]<=[{}]T({})".format(*(",".join(map(str, x)) for x in (tile, dims, axes)))
        found = groups.replica_groups(collective(f", replica_groups={text}, dims"), 1)
        assert found == tuple(map(tuple, expected.tolist()))


MESH_2x4x8 = np.arange(64).reshape(2, 4, 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("{}", [list(range(64))]),
        ("[4,2]<=[8]", np.arange(8).reshape(4, 2)),
        ("mesh['a'=2,'b'=4,'c'=8] {'b'}", MESH_2x4x8.transpose(0, 2, 1).reshape(16, 4)),
        ("mesh['a'=2,'b'=4,'c'=8] {'a','c'}", MESH_2x4x8.transpose(1, 0, 2).reshape(4, 16)),
        (
            "mesh['a'=2,'b'=4,'c'=8] {'c':(2)2}",
            np.arange(64).reshape(2, 4, 2, 2, 2).transpose(0, 1, 2, 4, 3).reshape(32, 2),
        ),
        (
            "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
            np.arange(8).reshape(2, 4).T.reshape(4, 2),
        ),
        ("mesh['a'=4], device_ids=(3,1,2,0) {'a'}", [[3, 1, 2, 0]]),
    ],
)
def test_printed_forms(text, expected):
    """Red if the axes of a mesh form are taken for the outer ones, or a part of an axis, 'c':(2)2,
    for its outermost two."""
    found = groups.replica_groups(collective(f", replica_groups={text}, dimensions={{0}}"), 64)
    assert found == tuple(tuple(map(int, group)) for group in expected)


def test_unknown_groups_are_refused():
    """Red if a form that is not known gives no groups, or one group of all devices."""
    with pytest.raises(hlo.HloError, match="replica_groups"):
        groups.replica_groups(collective(", replica_groups=<new>, dims"), 8)


@pytest.mark.parametrize(
    ("axes", "name"),
    [((2,), "fsdp"), ((1, 2), "data,fsdp"), ((3,), "tensor"), ((1, 2, 3), "data,fsdp,tensor")],
)
def test_group_axes(axes, name):
    """Red if places are counted innermost first, or an axis of size 1 is named."""
    sizes = {"none": 1, "data": 2, "fsdp": 8, "tensor": 4}
    ids = np.moveaxis(np.arange(64).reshape(tuple(sizes.values())), axes, range(-len(axes), 0))
    size = int(np.prod([list(sizes.values())[a] for a in axes]))
    rows = tuple(map(tuple, ids.reshape(-1, size).tolist()))
    assert groups.group_axes(rows, sizes) == name


def test_part_of_an_axis_and_permutes():
    """Red if half of an axis is called the axis, or a permute's two rings one group."""
    mesh = {"data": 2, "fsdp": 8}
    assert groups.group_axes(((0, 1, 2, 3), (4, 5, 6, 7)), mesh) == "fsdp (4 of 8)"
    assert groups.group_axes(((0,), (1,)), mesh) == "none"
    pairs = ", source_target_pairs={{0,1},{1,2},{2,0},{4,5},{5,4}}, x"
    found = groups.replica_groups(collective(pairs, "collective-permute-start"), 8)
    assert sorted(found) == [(0, 1, 2), (4, 5)]
    with pytest.raises(hlo.HloError, match="outside"):
        groups.group_axes(((0, 16),), mesh)
