"""What training and sampling run, compiled for a slice that nobody holds.

The programs are those that `lemur train` jits (lemur_jax.train.programs) and those that the sampler
jits (lemur_jax.sample.loop), on abstract arguments with the mesh's shardings.

Dimension key: B batch, P prompt bucket, S cache bucket, V vocab (padded), C tokens of a chunk.
"""

import dataclasses
import functools
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lemur_jax import sharding
from lemur_jax.config import ConfigError, ModelConfig, TrainConfig
from lemur_jax.errors import LemurError
from lemur_jax.model import decoder, param
from lemur_jax.model.cache import KVCache
from lemur_jax.plan import libtpu
from lemur_jax.plan.slices import Slice, topology
from lemur_jax.sample import loop as sampling
from lemur_jax.sample import methods, weights
from lemur_jax.sample.sampler import CHUNK
from lemur_jax.train import programs as training

PROGRAMS = ("train", "evaluate", "prefill", "decode")
STOP_IDS = 8  # columns of Rows.stop_ids: what sample.rows.constants makes of up to eight


@dataclasses.dataclass(frozen=True)
class Serving:
    """Shapes of the prefill and decode programs.

    Attributes:
      batch: B, rows of a batch, over all devices.
      prompt: P, tokens of the prompt bucket.
      cache: S, slots of the decode program's cache.
    """

    batch: int
    prompt: int
    cache: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program as the TPU compiler made it. Bytes are for one device.

    Attributes:
      name: one of PROGRAMS.
      config: with "auto" and -1 replaced.
      where: the slice.
      mesh: axis -> size.
      hlo: scheduled, optimized HLO, as text.
      argument_bytes, output_bytes, alias_bytes, temp_bytes, code_bytes: of HBM; what the program
        holds is arguments + outputs - alias + temporaries + code.
      peak_bytes: the compiler's own peak.
      host_temp_bytes: of host memory.
      seconds: wall time of lowering and compilation.
      executable: for `--save`; None when it came from a cache.
      dump: where the compiler wrote its buffer assignment, if it was asked to.
    """

    name: str
    config: TrainConfig
    where: Slice
    mesh: dict[str, int]
    hlo: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int
    peak_bytes: int
    host_temp_bytes: int
    seconds: float
    executable: jax.stages.Compiled | None = None
    dump: Path | None = None

    @property
    def held_bytes(self) -> int:
        """HBM that the program reserves: an upper bound of what is in use at its peak."""
        held = self.argument_bytes + self.output_bytes - self.alias_bytes
        return held + self.temp_bytes + self.code_bytes


class CompileRefused(LemurError):
    """The TPU compiler does not compile the program for the slice.

    Attributes:
      words: the compiler's own, whole.
      needed_bytes, usable_bytes: of HBM, where that is the reason; else None.
    """

    def __init__(self, name: str, where: Slice, words: str):
        self.words = words
        self.needed_bytes, self.usable_bytes = _exceeded(words)
        super().__init__(f"{name} does not compile for {where.name}: {self.reason()}")

    @property
    def exceeded_bytes(self) -> int | None:
        """HBM that is missing, or None when memory is not the reason."""
        return None if self.needed_bytes is None else self.needed_bytes - self.usable_bytes

    def reason(self) -> str:
        """One line."""
        if self.exceeded_bytes is None:
            return self.words.split("\n", 1)[0][:400]
        gib = 2**30
        return (
            f"needs {self.needed_bytes / gib:.2f} GiB of HBM, {self.usable_bytes / gib:.2f} are "
            f"usable: {self.exceeded_bytes / gib:.2f} GiB too much"
        )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _exceeded(words: str) -> tuple[int | None, int | None]:
    """Bytes needed and usable, from the forms in which libtpu says that HBM ran out."""

    def size(number: str, unit: str) -> int:
        return int(float(number) * _UNITS[unit])

    number = r"([\d.]+)([KMGT]?)"
    forms = (
        rf"Used {number} of {number} hbm",
        rf"required for [^(]*\({number}\) exceeds available HBM \({number}\)",
    )
    for form in forms:
        if match := re.search(form, words):
            return size(match[1], match[2]), size(match[3], match[4])
    return None, None


def resolve(config: TrainConfig, where: Slice) -> TrainConfig:
    """The config with "auto" and -1 replaced by what they mean on the slice, checked.

    Raises:
      ConfigError: mesh, batch or model do not divide; a named kernel does not exist there.
    """
    mesh = sharding.resolve_mesh(config.mesh, where.devices)
    if mesh.dcn_data != where.slices:
        raise ConfigError(
            [
                f"MeshConfig.dcn_data={mesh.dcn_data}, but {where.name} is {where.slices} "
                f"slice(s): set MeshConfig.dcn_data={where.slices}"
            ]
        )
    sharding.check(
        config.model,
        mesh,
        rows=config.data.batch_size // config.micro_batches,
        sequence_length=config.data.sequence_length,
    )
    device = topology(where).devices[0]
    return training.resolve(dataclasses.replace(config, mesh=mesh), device)


def make_mesh(config: TrainConfig, where: Slice) -> Mesh:
    """The mesh of the run over the slice's devices, none of them attached.

    Raises:
      ConfigError: the slice's axes cannot be laid out as this mesh.
    """
    return sharding.make_mesh(config.mesh, list(topology(where).devices))


def compile_program(
    config: TrainConfig,
    where: Slice,
    name: str = "train",
    serving: Serving | None = None,
    dump: Path | None = None,
) -> Compiled:
    """Compiles one program of a run for a slice.

    Args:
      config: the run; resolved here if it is not.
      where: the slice.
      name: one of PROGRAMS.
      serving: shapes of prefill and decode; `default_serving` when None.
      dump: a new directory for the compiler's buffer assignment, which memory.py reads.

    Raises:
      CompilerMissing: libtpu is not installed, or another version.
      ConfigError: sizes do not divide, an option is unknown, or a kernel lacks a shape.
      CompileRefused: the compiler's verdict, e.g. out of memory.
    """
    libtpu.prepare()
    started = time.monotonic()
    config = resolve(config, where)
    mesh = make_mesh(config, where)
    options = training.options(config)
    if dump is not None:
        options["xla_dump_to"] = str(dump)
    try:
        with libtpu.explained():
            made = program(config, mesh, name, serving)
            executable = training.compiled(made, mesh, options)
    except jax.errors.JaxRuntimeError as error:
        raise CompileRefused(name, where, str(error)) from error
    except ValueError as error:
        if not _from_kernels(error):
            raise
        raise ConfigError([f"{name} on {where.name}: {error}"]) from error
    memory = executable.memory_analysis()
    return Compiled(
        name=name,
        config=config,
        where=where,
        mesh={axis: int(size) for axis, size in mesh.shape.items()},
        hlo=executable.as_text(),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        host_temp_bytes=memory.host_temp_size_in_bytes,
        seconds=time.monotonic() - started,
        executable=executable,
        dump=dump,
    )


def _from_kernels(error: Exception) -> bool:
    """Whether lemur_kernels raised it: a shape that no kernel has, which its message explains."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "lemur_kernels" in trace.tb_frame.f_code.co_filename


def program(
    config: TrainConfig, mesh: Mesh, name: str, serving: Serving | None = None
) -> training.Program:
    """One program and its abstract arguments; `config` is resolved."""
    if name == "train":
        return training.step(config, mesh)
    if name == "evaluate":
        return training.evaluation(config, mesh)
    serving = serving or default_serving(config)
    if name == "prefill":
        return _prefill(config, mesh, serving)
    if name == "decode":
        return _decode(config, mesh, serving)
    raise ConfigError([f"program={name!r} is unknown; legal: {', '.join(PROGRAMS)}"])


# ---------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------


def default_serving(config: TrainConfig) -> Serving:
    """Eight rows for each part of the mesh's batch axes, prompts of half the context, a full
    cache; `config` is resolved."""
    ways = config.mesh.data * config.mesh.fsdp * config.mesh.dcn_data
    length = config.data.sequence_length
    return Serving(batch=8 * ways, prompt=length // 2, cache=length)


def _prefill(config: TrainConfig, mesh: Mesh, serving: Serving) -> training.Program:
    array, batch = functools.partial(_array, mesh), serving.batch
    arguments = (
        sampling_model(config.model, mesh),
        array((batch, serving.prompt), jnp.int32, ("batch", None)),
        array((batch,), jnp.int32, ("batch",)),
        _rows(batch, mesh),
        array((), jnp.bool_, ()),
    )
    return training.Program(jax.jit(sampling.prefill), arguments)


def _decode(config: TrainConfig, mesh: Mesh, serving: Serving) -> training.Program:
    array, batch = functools.partial(_array, mesh), serving.batch
    model = sampling_model(config.model, mesh)

    def decode(model, state, rows, stopped_B, steps, want_logprobs):
        return sampling.decode(lambda: model, state, rows, stopped_B, steps, want_logprobs, CHUNK)

    arguments = (
        model,
        _decode_state(model.config, batch, serving.cache, mesh),
        _rows(batch, mesh),
        array((batch,), jnp.bool_, ("batch",)),
        array((), jnp.int32, ()),
        array((), jnp.bool_, ()),
    )
    return training.Program(jax.jit(decode, donate_argnums=1), arguments)


def sampling_model(config: ModelConfig, mesh: Mesh) -> decoder.Decoder:
    """The sampler's model as ShapeDtypeStructs: compute dtype, layers unstacked, sharded."""
    ready = functools.partial(weights.for_sampling, backend="tpu")
    model = jax.eval_shape(ready, decoder.abstract(config))
    return param.abstract_with_shardings(model, mesh)


def _array(mesh: Mesh, shape, dtype, axes) -> jax.ShapeDtypeStruct:
    where = sharding.sharding(axes, mesh, shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _rows(batch: int, mesh: Mesh) -> sampling.Rows:
    array = functools.partial(_array, mesh)
    chain = methods.stack([methods.standard(temperature=0.0)])
    return sampling.Rows(
        seed=array((batch,), jnp.uint32, ("batch",)),
        sample=array((batch,), jnp.uint32, ("batch",)),
        limit=array((batch,), jnp.int32, ("batch",)),
        stop_ids=array((batch, STOP_IDS), jnp.int32, ("batch", None)),
        chain=jax.tree.map(lambda x: array((batch,), x.dtype, ("batch",)), chain),
    )


def _decode_state(config: ModelConfig, batch: int, slots: int, mesh: Mesh) -> sampling.DecodeState:
    array = functools.partial(_array, mesh)

    def cache():
        shape = (batch, slots, config.kv_heads, config.head_dim)
        axes = ("batch", None, "kv_heads", None)
        return tuple(array(shape, jnp.dtype(config.dtype), axes) for _ in range(config.layers))

    numbers = array((batch,), jnp.int32, ("batch",))
    return sampling.DecodeState(
        cache=KVCache(
            k=cache(),
            v=cache(),
            positions=array((batch, slots), jnp.int32, ("batch", None)),
            segment_ids=array((batch, slots), jnp.int32, ("batch", None)),
            end=array((), jnp.int32, ()),
        ),
        token=numbers,
        position=numbers,
        generated=numbers,
        done=array((batch,), jnp.bool_, ("batch",)),
        seen_BV=array((batch, sharding.padded_vocab(config)), jnp.bool_, ("batch", "act_vocab")),
    )
