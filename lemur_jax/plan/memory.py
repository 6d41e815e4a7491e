"""HBM of a compiled program by owner, at the moment when it needs most.

Sizes, lifetimes and the peak are the compiler's (buffers.py); only the names of the owners are
ours, from each buffer's origin and shape. What cannot be named is listed as such.
"""

import dataclasses
import re
from collections.abc import Mapping

from lemur_jax.config import ModelConfig
from lemur_jax.plan.buffers import Assignment, Value
from lemur_jax.plan.hlo import HOST, Instruction, Program, Shape
from lemur_jax.plan.origin import Origins
from lemur_jax.sharding import padded_vocab

PARAMETERS = "parameters"
MU, NU = "moments (mu)", "moments (nu)"
BATCH = "batch"
STATE = "other state"
CACHE = "KV cache"
COPIED = ", copied"
GRADIENTS = "gradients of a micro-batch"
GRADIENT_SUM = "gradients, summed over micro-batches"
GRADIENT_LAYER = "gradients at full size (a layer's, the head's)"
COMPUTE_WEIGHTS = "weights in the compute dtype"
GATHERED = "gathered weights"
BUFFERS = "collective buffers"
LOGITS = "logits and probabilities"
SAVED = "saved activations: "
FETCHED = "activations fetched from the host"
WORKING = "working set: "
OUTPUTS = "outputs"
GAPS = "gaps between buffers"
SCRATCH = "constants, scratch, small outputs"
UNNAMED = "not attributed"

_COLLECTIVES = (
    "recv",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_REDUCED = ("all-reduce", "reduce-scatter")
_REDUCTIONS = ("all-reduce", "reduce-scatter", "all-reduce-start", "reduce-scatter-start")
_UPDATES = ("fusion", "dynamic-update-slice", "dynamic-update-slice-start")
_COMPUTE = ("bf16", "f16")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array that is live at the peak: its owner, name in the program, bytes, origin."""

    owner: str
    name: str
    shape: str
    nbytes: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one device, in bytes.

    Attributes:
      total: the compiler's, without the program's code.
      owners: bytes by owner at the peak, largest first; they sum to `total`.
      buffers: what is live at the peak, largest first.
      host_bytes: of the host's memory (offloaded activations).
      code_bytes: of the program itself, if given: HBM too, but not in the compiler's total.
    """

    total: int
    owners: Mapping[str, int]
    buffers: tuple[Buffer, ...]
    host_bytes: int
    code_bytes: int = 0

    @property
    def attributed(self) -> float:
        """Share of the total that has an owner, 0 to 1."""
        return 1 - self.owners.get(UNNAMED, 0) / self.total if self.total else 1.0


def memory(
    program: Program,
    assignment: Assignment,
    model: ModelConfig,
    mesh: Mapping[str, int],
    code_bytes: int = 0,
) -> Memory:
    """Names the owner of every buffer that is live at the program's peak.

    Args:
      program, assignment: of the same compilation.
      model: whose weights and activations these are.
      mesh: sizes by axis name.
      code_bytes: `memory_analysis().generated_code_size_in_bytes`.
    """
    naming = _Naming(program, model, mesh)
    entry = program.computations[program.entry]
    found = [
        Buffer(argument_owner(i.op_name), i.name, str(i.shapes[0]), nbytes, i.op_name)
        for number, nbytes in assignment.parameters.items()
        for i in (entry.parameters[number],)
    ]
    for value, nbytes in assignment.peak()[1]:
        chain = naming.chain(value)
        origin = naming.origin(value, chain)
        owner = naming.owner(value, chain, origin)
        found.append(Buffer(owner, value.name, str(value.shape or "tuple"), nbytes, origin))
    found += [
        Buffer(naming.output_owner(shape), "output", str(shape), nbytes, "")
        for shape, nbytes in assignment.output_shapes
    ]
    named = sum(buffer.nbytes for buffer in found)
    small_outputs = assignment.outputs - sum(n for _, n in assignment.output_shapes)
    scratch = small_outputs + assignment.constants + assignment.small
    owners: dict[str, int] = {}
    for buffer in found:
        owners[buffer.owner] = owners.get(buffer.owner, 0) + buffer.nbytes
    owners[SCRATCH] = owners.get(SCRATCH, 0) + scratch
    owners[GAPS] = assignment.total - scratch - named
    largest = sorted(owners.items(), key=lambda item: -item[1])
    return Memory(
        total=assignment.total,
        owners={owner: nbytes for owner, nbytes in largest if nbytes},
        buffers=tuple(sorted(found, key=lambda buffer: -buffer.nbytes)),
        host_bytes=assignment.host,
        code_bytes=code_bytes,
    )


def argument_owner(op_name: str) -> str:
    """Owner of an argument by the name that JAX gives it: state.opt_state[1].mu.head.value."""
    path = f".{op_name}."
    for word, owner in ((".mu.", MU), (".nu.", NU), ("model.", PARAMETERS), ("cache", CACHE)):
        if word in path:
            return owner
    return BATCH if path.startswith(".batch") else STATE


class _Naming:
    """The rules that give a buffer its owner."""

    def __init__(self, program: Program, model: ModelConfig, mesh: Mapping[str, int]):
        self.program, self.model = program, model
        self.origins = Origins(program)
        self.trains = any(
            "transpose(" in i.op_name for c in program.computations.values() for i in c
        )
        self.arguments = {i.name for i in program.computations[program.entry].parameters.values()}
        self.caches = {
            tuple(sorted(i.shapes[0].dims))
            for i in program.computations[program.entry].parameters.values()
            if argument_owner(i.op_name) == CACHE and len(i.shapes[0].dims) == 4
        }
        self.tensor = mesh.get("tensor", 1)
        self.weights = weight_shapes(model, mesh)
        self.vocab = {padded_vocab(model), padded_vocab(model) // self.tensor}

    def chain(self, value: Value) -> list[Instruction]:
        """What the value is a copy of, nearest first; see Origins.chain."""
        if self.origins.home(value.name):
            return self.origins.chain(value.name, value.index)
        # inside an asynchronous computation that the text does not print: its end has a name
        known = [name for name in value.places if self.origins.home(name)]
        return self.origins.chain(known[-1]) if known else []

    def origin(self, value: Value, chain: list[Instruction]) -> str:
        """The JAX operation that it comes from; the loop's around it if the compiler made it."""
        names = [i.op_name for i in chain if "/" in i.op_name or "." in i.op_name]
        loops = [self.origins.loop_op_name(i.name) for i in chain]
        return next((name for name in (*names, *loops) if name), "")

    def owner(self, value: Value, chain: list[Instruction], origin: str) -> str:
        if value.shape is None or not value.shape.dims:
            return SCRATCH
        weight = self.is_weight(value.shape)
        opcodes = {re.sub("-(start|done)$", "", i.opcode) for i in chain}
        if opcodes & {"all-gather"} or any(_carries_gather(i) for i in chain):
            return GATHERED if weight else BUFFERS
        if chain and chain[-1].name in self.arguments:
            owner = argument_owner(chain[-1].op_name)
            as_computed = owner == PARAMETERS and value.shape.dtype in _COMPUTE
            return COMPUTE_WEIGHTS if as_computed else owner + COPIED
        if weight and self.trains and (kind := self._gradient(value, chain)):
            return kind
        if opcodes & set(_COLLECTIVES):
            return BUFFERS
        if not self.trains and tuple(sorted(value.shape.dims)) in self.caches:
            return CACHE + COPIED
        stacked = value.shape.dims[0] == self.model.layers and len(value.shape.dims) > 2
        if self.trains and stacked:
            return SAVED + self.activation(value.shape, chain)
        if any(_fetches(i) for i in chain):
            return FETCHED
        if self.vocab & set(value.shape.dims):
            return LOGITS
        return _working(origin, self.trains)

    def output_owner(self, shape: Shape) -> str:
        """Owner of an output that aliases no argument."""
        if self.vocab & set(shape.dims):
            return LOGITS
        is_cache = len(shape.dims) == 4 and self.model.head_dim in shape.dims
        return CACHE if is_cache else OUTPUTS

    def is_weight(self, shape: Shape) -> bool:
        """Whether a weight, of one layer or stacked, can have this shape on a device."""
        dims = [d for d in shape.dims if d != 1]
        rest = dims[1:] if dims and dims[0] == self.model.layers else dims
        return bool({tuple(sorted(dims)), tuple(sorted(rest))} & self.weights)

    def _gradient(self, value: Value, chain: list[Instruction]) -> str:
        """Which gradient a weight-shaped value is; "" for none."""
        reduced = any(self.origins.reaches(i.name, _REDUCTIONS) for i in chain)
        reduced |= any(i.opcode.startswith(_REDUCED) for i in chain)
        backward = any("transpose(" in i.op_name for i in chain)
        stacked = value.shape.dims[0] == self.model.layers
        if not (reduced or backward or value.shape.dtype == "f32"):
            return ""
        if not stacked and not reduced and value.shape.dtype in _COMPUTE:
            return ""  # as many tokens as features: an activation of a weight's shape
        name = next((i.op_name for i in chain if "/" in i.op_name), "")
        if name.endswith("/add") and "transpose(" not in name:
            return GRADIENT_SUM
        return GRADIENTS if stacked or value.shape.dtype == "f32" else GRADIENT_LAYER

    def activation(self, shape: Shape, chain: list[Instruction]) -> str:
        """Which activation of a layer has this shape; by what stored it where shapes are alike."""
        c, t = self.model, self.tensor
        dims = set(shape.dims[1:])
        update = next((i for i in chain if i.opcode in _UPDATES), None)
        source, made = self.origins.stored(update) if update is not None else ("", None)
        if source == "carried" and c.embed in dims:
            return "layer input"
        if c.head_dim in dims and {c.heads, c.heads // t} & dims:
            kernel = source == "kernel" and "attention" in made.name
            return "attention output" if kernel else "queries"
        if c.head_dim in dims:
            return "keys and values"
        if shape.dtype == "f32" and {c.heads, c.heads // t} & dims:
            return "attention log-sum-exp"
        if {c.mlp, c.mlp // t} & dims:
            return "MLP hidden"
        if c.embed in dims:
            return "MLP input"
        return str(shape)


def _carries_gather(i: Instruction) -> bool:
    """Whether it begins or continues an asynchronous gather that XLA fused with products."""
    started = i.name.startswith(("async-collective-start", "async-collective-done"))
    return started or (i.called or "").startswith("async_collective_fusion")


def _fetches(i: Instruction) -> bool:
    """Whether it begins a copy from the host's memory."""
    return i.opcode.endswith("-start") and any(s.space == HOST for s in i.shapes)


def _working(origin: str, trains: bool) -> str:
    if not origin:
        return UNNAMED
    if not trains:
        return WORKING + "activations"
    if "rematted_computation" in origin:
        return WORKING + "recomputed activations of a layer"
    if "transpose(" in origin:
        return WORKING + "backward pass"
    return WORKING + ("forward pass" if "jvp(" in origin else "the rest of the program")


def weight_shapes(model: ModelConfig, mesh: Mapping[str, int]) -> set[tuple[int, ...]]:
    """Sorted dimensions, ones left out, that a weight of one layer, the table or the head can have
    on a device: its dimensions divided by axes of the mesh, heads merged with head_dim."""
    c, shapes = model, set()
    fsdp, tensor = mesh.get("fsdp", 1), mesh.get("tensor", 1)
    embeds = {c.embed // n for n in (1, fsdp, tensor, fsdp * tensor) if c.embed % n == 0}
    for e in embeds:
        for n in {1, tensor}:
            h, k, d = c.heads // n, max(c.kv_heads // n, 1), c.head_dim
            others = ((h, d), (k, d), (h * d,), (k * d,), (c.mlp // n,), (padded_vocab(c) // n,))
            shapes |= {tuple(sorted(m for m in (e, *other) if m != 1)) for other in others}
    return shapes
