"""What training and sampling run, compiled for a slice that nobody holds.

The programs are those that `lemur train` jits (lemur_jax.train.programs) and those of the sampler
(lemur_jax.plan.serving), on abstract arguments with the mesh's shardings.
"""

import dataclasses
import re
import time
from pathlib import Path

import jax
from jax.sharding import Mesh

from lemur_jax import sharding
from lemur_jax.config import ConfigError, TrainConfig
from lemur_jax.errors import LemurError
from lemur_jax.plan import libtpu
from lemur_jax.plan import serving as sampling
from lemur_jax.plan.serving import Serving
from lemur_jax.plan.slices import Slice, topology
from lemur_jax.train import programs as training

PROGRAMS = ("train", "evaluate", "prefill", "decode")


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
        self.name, self.where, self.words = name, where, words
        self.needed_bytes, self.usable_bytes = _exceeded(words)
        super().__init__(f"{name} does not compile for {where.name}: {self.reason()}")

    def __reduce__(self):
        return CompileRefused, (self.name, self.where, self.words)

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
      serving: shapes of prefill and decode; `serving.default_serving` when None.
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
    shapes = serving or sampling.default_serving(config)
    if name == "prefill":
        return sampling.prefill(config, mesh, shapes)
    if name == "decode":
        return sampling.decode(config, mesh, shapes)
    raise ConfigError([f"program={name!r} is unknown; legal: {', '.join(PROGRAMS)}"])
