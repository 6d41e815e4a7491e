"""HBM by owner against the compiler's own report, arithmetic by hand and a plain array of bytes."""

import dataclasses
import types

import numpy as np
import pytest

from lemur_jax.config import LossConfig, MeshConfig
from lemur_jax.plan import buffers, cost, hlo, kernels, knobs, memory, origin

LAYERS, EMBED, MLP, ROWS, LENGTH, MICRO_BATCHES = 8, 1024, 4096, 4, 8192, 2
FSDP, TENSOR = 64, 4


@pytest.fixture(scope="module")
def found(program, assignment, model, mesh) -> memory.Memory:
    return memory.memory(program, assignment, model, mesh, code_bytes=5)


def test_total_is_the_compilers(assignment, found, texts):
    """Red if constants, outputs or scratch are left out of the total."""
    reported = int(texts["report"].split("Total bytes: ")[1].split(" ")[0])
    assert assignment.total == found.total == reported
    assert sum(found.owners.values()) == reported


def test_owners_by_hand(found):
    """Red if a layer's index is taken for an owner, accumulators are called moments, or what the
    loop over layers stacks is taken for a gradient."""
    weights = 2 * 4 * LAYERS * EMBED * MLP // (FSDP * TENSOR)
    owners = found.owners
    assert owners[memory.PARAMETERS] == owners[memory.MU] == weights
    assert owners[memory.GRADIENT_SUM] == owners[memory.GRADIENTS] == weights
    assert owners[memory.COMPUTE_WEIGHTS] == weights // 2  # bf16
    assert owners[memory.BATCH] == 2 * MICRO_BATCHES * ROWS * LENGTH * EMBED
    assert owners[memory.SAVED + "layer input"] == 2 * LAYERS * ROWS * LENGTH * EMBED
    one_gathered = 2 * EMBED * MLP // TENSOR
    assert owners[memory.GATHERED] == owners[memory.GRADIENT_LAYER] == one_gathered
    assert found.code_bytes == 5 and found.host_bytes == 0


def test_almost_all_is_attributed(found):
    """The issue's 95 %. Red if the rules for gradients or for saved activations go: these then
    count as working set, and by hand they do not; or if unnamed values are dropped."""
    assert found.attributed >= 0.95
    assert found.owners[memory.GAPS] < 0.1 * found.total
    assert list(found.owners.values()) == sorted(found.owners.values(), reverse=True)


def test_what_cannot_be_named_is_listed(program, assignment, model, mesh):
    """A program that does not hold the values. Red if values without a home get an owner."""
    entry = program.computations[program.entry]
    alone = hlo.Program(program.header, {program.entry: entry}, program.entry)
    found = memory.memory(alone, assignment, model, mesh)
    assert found.owners[memory.UNNAMED] > 0
    assert found.attributed < 0.95
    assert sum(found.owners.values()) == found.total


def test_peak_is_the_fullest_moment(assignment):
    """Against an array with a cell for each 512 bytes. Red if values that overlap are counted
    twice, or if a value is dead in the instruction that last reads it."""
    cell = 512
    cells = -(-assignment.temporary // cell)
    fullest = 0
    for time in sorted({v.first for v in assignment.values} | {v.last for v in assignment.values}):
        used = np.zeros(cells, bool)
        for v in assignment.values:
            if v.first <= time <= v.last:
                used[v.offset // cell : -(-(v.offset + v.size) // cell)] = True
        fullest = max(fullest, used.sum() * cell)
    moment, live = assignment.peak()
    covered = sum(nbytes for _, nbytes in live)
    assert covered <= fullest <= covered + cell * len(live)
    assert all(v.first <= moment <= v.last for v, _ in live)


@pytest.mark.parametrize(
    ("op_name", "owner"),
    [
        ("state.model.layers.wq.value", memory.PARAMETERS),
        ("state.opt_state[1].mu.layers.wq.value", memory.MU),
        ("state.opt_state[1].nu.head.value", memory.NU),
        ("state.opt_state[1].count", memory.STATE),
        ("state.guard.mean_norm", memory.STATE),
        ("batch.inputs", memory.BATCH),
        ("cache.keys", memory.CACHE),
        ("model.table.value", memory.PARAMETERS),
    ],
)
def test_arguments(op_name, owner):
    """Names as JAX gives them to the arguments of the steps. Red if a word of the table
    is lost, or a number in brackets ends a name."""
    assert memory.argument_owner(op_name) == owner


META = 'metadata={{op_name="jit(step)/{}"}}'


def naming(lines: list[str], model, mesh, trains: bool = True):
    """Names of a program of one entry computation, which has a backward pass or not."""
    if trains:
        lines = [f"%back = f32[] constant(0), {META.format('transpose(jvp())/mul')}", *lines]
    entry = "\n".join(f"  {line}" for line in lines)
    text = f"HloModule m, is_scheduled=true\n\nENTRY %main () -> x {{\n{entry}\n}}\n"
    return memory._Naming(hlo.parse(text), model, mesh)


def value(name: str, shape: str, index=()) -> buffers.Value:
    (parsed,) = hlo.shapes_in(shape)
    return buffers.Value(name, index, (), parsed, 0, parsed.nbytes, 0, 1)


def owner(names: memory._Naming, v: buffers.Value) -> str:
    chain = names.chain(v)
    return names.owner(v, chain, names.origin(v, chain))


@pytest.mark.parametrize(
    ("shape", "op_name", "expected"),
    [
        ("bf16[32768,32000]", "jvp()/exp", memory.LOGITS),
        ("bf16[4,8192,1024]", "transpose(jvp())/mul", memory.WORKING + "backward pass"),
        (
            "bf16[4,8192,1024]",
            "checkpoint/rematted_computation/mul",
            memory.WORKING + "recomputed activations of a layer",
        ),
        ("bf16[4,8192,1024]", "jvp()/mul", memory.WORKING + "forward pass"),
        ("bf16[4,8192,1024]", "mul", memory.WORKING + "the rest of the program"),
        ("f32[8,16,1024]", "transpose(jvp())/dot_general", memory.GRADIENTS),
        ("f32[8,16,1024]", "while/body/add", memory.GRADIENT_SUM),
    ],
)
def test_owner_by_shape_and_origin(model, mesh, shape, op_name, expected):
    """Red if the vocabulary is not looked for, or an unreduced 16-bit activation of a weight's
    size becomes a gradient."""
    names = naming([f"ROOT %x = {shape}{{0}} negate(%x), {META.format(op_name)}"], model, mesh)
    assert owner(names, value("x", shape)) == expected


def test_gathers_reductions_and_copies(model, mesh):
    """A copy of a gathered weight, what is reduced next, a sliced prefetch of a cast weight. Red if
    copies are not followed back, or uses are not followed forward."""
    names = naming(
        [
            '%w = f32[8,16,1024]{0} parameter(0), metadata={op_name="state.model.up.value"}',
            "%c = bf16[8,16,1024]{0} convert(%w)",
            "%s = bf16[8,16,1024]{0} slice(%c), slice={[0:8], [0:16], [0:1024]}",
            '%f = bf16[8,16,1024]{0} custom-call(%s), custom_call_target="ConcatBitcast"',
            "%g = bf16[1024,1024]{0} all-gather(%f), replica_groups={}",
            "%h = bf16[1024,1024]{0} copy(%g)",
            f"%d = bf16[1024,1024]{{0}} dot(%h, %h), {META.format('transpose(jvp())/dot_general')}",
            f"%n = bf16[1024,1024]{{0}} dot(%h, %h), {META.format('transpose(jvp())/dot_general')}",
            "%b = bf16[1024,1024]{0} bitcast(%d)",
            "ROOT %r = bf16[1024,1024]{0} all-reduce(%b), replica_groups={}",
        ],
        model,
        mesh,
    )
    square = "bf16[1024,1024]"
    assert owner(names, value("f", "bf16[8,16,1024]")) == memory.COMPUTE_WEIGHTS
    assert owner(names, value("h", square)) == memory.GATHERED
    assert owner(names, value("d", square)) == memory.GRADIENT_LAYER
    assert owner(names, value("r", square)) == memory.GRADIENT_LAYER
    assert owner(names, value("n", square)) == memory.WORKING + "backward pass"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("bf16[8,4,8192,2,128]", "queries"),
        ("f32[8,4,2,8192]", "attention log-sum-exp"),
        ("bf16[8,4,8192,3072]", "bf16[8,4,8192,3072]"),
    ],
)
def test_saved_activations_by_shape(model, mesh, shape, expected):
    """Heads and features split over tensor. Red if only the whole model's sizes are known, or a
    shape that nothing in the model has gets a name."""
    names = naming([f"ROOT %x = {shape}{{0}} negate(%x)"], model, mesh)
    assert owner(names, value("x", shape)) == memory.SAVED + expected


def test_keys_and_attention_output(model, mesh):
    """Same size as queries, stored from the attention kernel. Red if what is stored is not looked
    for upstream."""
    few = dataclasses.replace(model, kv_heads=4)
    stack, one = "bf16[8,4,8192,2,128]{0}", "bf16[1,4,8192,2,128]{0}"
    names = naming(
        [
            f"%p = {stack} parameter(0)",
            "%i = s32[] constant(0)",
            f'%k = bf16[8,32768,128]{{0}} custom-call(%i), custom_call_target="tpu_custom_call", '
            f"{META.format('lemur_attention_forward/pallas_call')}",
            f"%o = {one} reshape(%k)",
            f"ROOT %u = {stack} dynamic-update-slice(%p, %o, %i, %i, %i, %i, %i)",
        ],
        few,
        mesh,
    )
    names.program.computations["main"].instructions["k"] = dataclasses.replace(
        names.origins.home("k")[1], name="lemur_attention_forward.2"
    )
    assert owner(names, value("u", "bf16[8,4,8192,2,128]")) == memory.SAVED + "attention output"
    keys = "bf16[8,4,8192,1,128]"
    assert owner(names, value("u", keys)) == memory.SAVED + "keys and values"


def test_programs_without_a_backward_pass(model, mesh):
    """Decoding: eight rows are not eight layers, and nothing is saved. Red if a program that does
    not train has saved activations or gradients, or a second cache is an activation."""
    cache = "bf16[8,4096,2,128]"
    lines = [
        f'%k = {cache}{{0}} parameter(0), metadata={{op_name="state.cache.k[0]"}}',
        f"%n = {cache}{{0}} negate(%k), {META.format('while/body/dynamic_update_slice')}",
        f"ROOT %x = bf16[8,16,1024]{{0}} negate(%n), {META.format('dot_general')}",
    ]
    names = naming(lines, model, mesh, trains=False)
    assert owner(names, value("n", cache)) == memory.CACHE + memory.COPIED
    assert owner(names, value("x", "bf16[8,16,1024]")) == memory.WORKING + "activations"
    assert names.output_owner(hlo.Shape("bf16", (8, 4096, 2, 128))) == memory.CACHE
    assert names.output_owner(hlo.Shape("f32", (8, 32000))) == memory.LOGITS
    assert names.output_owner(hlo.Shape("f32", (8, 4096))) == memory.OUTPUTS


def test_outputs_are_owners(model, mesh):
    """A cache that prefill returns is not scratch. Red if it is counted as both."""
    entry = "ENTRY %main () -> x {\n  ROOT %a = f32[1]{0} parameter(0)\n}\n"
    text = f"HloModule m, is_scheduled=true\n\n{entry}"
    cache = hlo.Shape("bf16", (8, 4096, 2, 128))
    assignment = buffers.Assignment(
        parameters={0: 512},
        outputs=cache.nbytes + 512,
        output_shapes=((cache, cache.nbytes),),
        constants=100,
        small=0,
        temporary=0,
        values=(),
        host=0,
    )
    found = memory.memory(hlo.parse(text), assignment, model, mesh)
    assert found.owners[memory.CACHE] == cache.nbytes
    assert found.owners[memory.SCRATCH] == 612
    assert sum(found.owners.values()) == found.total == assignment.total


def test_loop_that_only_moves_a_value():
    """Fetched into fast memory and put back in each iteration. Red if following it ends in the
    loop."""
    text = """HloModule m, is_scheduled=true

%body (p: x) -> x {
  %p = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %fast = f32[8]{0:S(1)} copy(%x)
  %back = f32[8]{0} copy(%fast)
  ROOT %t = (s32[], f32[8]{0}) tuple(%n, %back)
}

%condition (q: x) -> pred[] {
  ROOT %q = (s32[], f32[8]{0}) parameter(0)
}

ENTRY %main (a: x) -> x {
  %a = f32[8]{0} parameter(0), metadata={op_name="batch"}
  %z = s32[] constant(0)
  %init = (s32[], f32[8]{0}) tuple(%z, %a)
  ROOT %loop = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
}
"""
    origins = origin.Origins(hlo.parse(text))
    assert origins.chain("loop", (1,))[-1].op_name == "batch"
    assert origins.chain("back")[-1].op_name == "batch"
    body = origins.program.computations["body"]
    assert origins.passed_on(body, 1) and origins.passed_on(body, 0)


def test_calls_beside_the_rest_are_followed():
    """v7x: a SparseCore copies the batch. Red if the chain ends at the call."""
    text = """HloModule m, is_scheduled=true

%copies (p: x) -> x {
  %p = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} copy(%p)
}, execution_thread="sparsecore"

ENTRY %main (a: x) -> x {
  %a = f32[8]{0} parameter(0), metadata={op_name="batch"}
  %s = ((f32[8]{0}), f32[8]{0}, u32[]) call-start(%a), to_apply=%copies
  ROOT %d = f32[8]{0} call-done(%s)
}
"""
    origins = origin.Origins(hlo.parse(text))
    assert [i.name for i in origins.chain("d")] == ["d", "s", "c", "p", "a"]
    assert origins.chain("c")[-1].op_name == "batch"


def test_loops_are_followed_both_ways(program):
    """A carry's place is what the body puts there; one that is passed on is what it began as. Red
    if either is taken for the other."""
    origins = origin.Origins(program)
    entry = program.computations[program.entry]
    (outer,) = (i for i in entry if i.opcode == "while")
    ends = {
        str(shape): origins.chain(outer.name, (place,))[-1]
        for place, shape in enumerate(outer.shapes)
    }
    assert ends["f32[8,16,1024]"].opcode == "fusion"  # the sum of gradients
    assert ends["bf16[2,4,8192,1024]"].op_name == "batch"


def test_dump_of_one_program(tmp_path, texts, assignment):
    """Red if a second program's dump is read in silence, or file names change unnoticed."""
    with pytest.raises(hlo.HloError, match="0 buffer assignments"):
        buffers.read_dump(tmp_path)
    stem = "module_0000.jit_step.cl_1.after_optimizations"
    for name in ("buffer-assignment", "buffer-assignment-values", "live-range"):
        (tmp_path / f"{stem}-{name}.txt").write_text(texts[name])
    assert buffers.read_dump(tmp_path) == assignment
    (tmp_path / "module_0001.b.after_optimizations-buffer-assignment.txt").write_text("")
    with pytest.raises(hlo.HloError, match="2 buffer assignments"):
        buffers.read_dump(tmp_path)
    assert buffers.dump_options(tmp_path) == {"xla_dump_to": str(tmp_path)}


def test_texts_of_two_programs(texts):
    """Red if a value without a live range is taken to live for ever, or to be free."""
    with pytest.raises(hlo.HloError, match="live range"):
        buffers.read_assignment(texts["buffer-assignment"], "")
    with pytest.raises(hlo.HloError, match="no buffer assignment"):
        buffers.read_assignment("", "")


def test_host_memory_is_not_hbm():
    """Red if color 5, or v4's CMEM (color 3), is added to the total, or bytes that two values share
    count twice."""
    text = "\n".join(
        [
            "BufferAssignment:",
            "allocation 0: size 100, parameter 3, shape |f32[25]| at ShapeIndex {}:",
            "allocation 1: size 30, constant:",
            "allocation 5: size 8192, maybe-live-out:",
            " value: <6 d @0> (size=8192,offset=0): f32[2048]{0}",
            " value: <7 e @0> (size=8192,offset=0): f32[2,8,128]{0}",
            "allocation 2: size 7, color 5, preallocated-temp:",
            " value: <1 a @5> (size=7,offset=0): f32[1]{0:S(5)}",
            "allocation 3: size 11, color 3, preallocated-temp:",
            "allocation 4: size 64, preallocated-temp:",
            " value: <2 b{1} (phi) @0> (size=40,offset=8): f32[10]{0}",
            " value: <3 c @0> (size=16,offset=40): f32[4]{0}",
        ]
    )
    found = buffers.read_assignment(text, "    b{1}:3-9\n    c{}:9-9\n")
    assert (found.total, found.temporary, found.host, found.constants) == (8386, 64, 7, 30)
    assert found.output_shapes == ((hlo.Shape("f32", (2, 8, 128)), 8192),)
    assert found.parameters == {3: 100}
    only = found.values[0]
    assert (only.name, only.index, only.offset, only.first, only.last) == ("b", (1,), 8, 3, 9)
    moment, live = found.peak()
    assert (moment, [nbytes for _, nbytes in live]) == (9, [40, 8])  # c shares 8 bytes with b


@pytest.fixture(scope="module")
def settings(model):
    """As much of a TrainConfig as the knobs read: building one needs a data set."""
    return types.SimpleNamespace(
        model=model,
        micro_batches=MICRO_BATCHES,
        explicit_gradients=False,
        mesh=MeshConfig(data=1, fsdp=FSDP, sequence=1, tensor=TENSOR),
        data=types.SimpleNamespace(batch_size=512, sequence_length=LENGTH),
        loss=LossConfig(chunk_tokens=512, implementation="pallas_tpu"),
    )


def test_knobs(settings, found, program, chip, mesh):
    """Red if saved activations do not grow with the rows, a saved sum of gradients is not given
    back at one micro-batch, or seconds have the wrong sign."""
    predicted = cost.cost(program, chip, kernels.kernel_costs(chip, LENGTH), mesh)
    by_change = {k.change: k for k in knobs.knobs(settings, found, predicted)}
    fewer, more = by_change["2 -> 1"], by_change["2 -> 4"]
    activations = sum(
        nbytes
        for name, nbytes in found.owners.items()
        if name.startswith((memory.SAVED, memory.WORKING))
    )
    assert fewer.hbm_bytes == activations - found.owners[memory.GRADIENT_SUM]
    assert more.hbm_bytes == -activations / 2
    assert fewer.seconds[0] < 0 < more.seconds[0]
    assert abs(fewer.seconds[1]) > abs(fewer.seconds[0])
    saved = by_change["q: recomputed -> saved"]
    assert saved.hbm_bytes > 0 > saved.seconds[0]
    away = by_change["layer_input: saved -> offloaded"]
    assert away.host_bytes == -away.hbm_bytes > 0
    assert by_change["512 -> 256"].hbm_bytes == 0  # the fixture has no loss
    assert "GiB" in str(fewer) and "TrainConfig.micro_batches 2 -> 1" in str(fewer)


def test_activation_bytes_by_hand(settings):
    """Two heads and one kv head of 128, halves of the model's: red if tensor's share is not taken,
    or lse is forgotten."""
    tokens = 4 * LENGTH * LAYERS
    sizes = knobs.activation_bytes(settings, 4)
    assert sizes["q"] == tokens * 2 * 2 * 128
    assert sizes["attention"] == tokens * (2 * 2 * 128 + 4 * 2)
    assert sizes["kv"] == tokens * 2 * 2 * max(settings.model.kv_heads // TENSOR, 1) * 128
    assert sizes["layer_input"] == tokens * 2 * settings.model.embed
