"""The compiled programs of a run, in one place: `lemur train` runs them, `lemur plan` compiles them
for slices that nobody holds. Both get the same functions, shardings, donation and options.
"""

import dataclasses
import difflib
import importlib.util
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax import sharding
from lemur_jax.config import ConfigError, TrainConfig
from lemur_jax.data.pipeline import Batch
from lemur_jax.model import param
from lemur_jax.model.attention import describe, outside_table, row_tokens
from lemur_jax.model.attention import resolve_implementation as resolve_attention
from lemur_jax.train.loss import LossSums, loss_sums
from lemur_jax.train.loss import resolve_implementation as resolve_loss
from lemur_jax.train.optimizer import optimizer, schedule
from lemur_jax.train.state import abstract_state
from lemur_jax.train.step import make_step


def resolve(config: TrainConfig, device: jax.Device) -> TrainConfig:
    """The config with "auto" replaced by what it means on a device, attached or not.

    Args:
      config: with a resolved mesh.

    Raises:
      ConfigError: a named kernel does not exist there.
    """
    attention = resolve_attention(config.model, device.platform, **_kernel_shape(config, device))
    loss = resolve_loss(config.loss, device)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention=attention),
        loss=dataclasses.replace(config.loss, implementation=loss),
    )


def describe_attention(config: TrainConfig, device: jax.Device) -> str:
    """What `resolve` makes of the attention of a config, and why where that is not the fastest."""
    reason = outside_table(config.model, device.platform, **_kernel_shape(config, device))
    resolved = resolve(config, device)
    return describe(resolved.model, config.mesh.sequence, reason)


def _kernel_shape(config: TrainConfig, device: jax.Device) -> dict[str, Any]:
    length, ways = config.data.sequence_length, config.mesh.sequence
    return {
        "device_kind": device.device_kind,
        "tensor": config.mesh.tensor,
        "tokens": row_tokens(config.model, length, ways),
    }


def options(config: TrainConfig) -> dict[str, str]:
    """`TrainConfig.compiler_options` as the compiler takes them."""
    return dict(option.split("=", 1) for option in config.compiler_options)


class Program(NamedTuple):
    """A jitted function and the ShapeDtypeStructs, with shardings, that it is compiled for."""

    function: Callable
    arguments: tuple


def step(config: TrainConfig, mesh: Mesh) -> Program:
    """One optimizer step, (state, [M,R,T] batch) -> (state, metrics); the state is donated.

    Args:
      config: resolved.
      mesh: its devices need not be attached.
    """
    transform = optimizer(config.optimizer)
    rate = schedule(config.optimizer, config.steps)
    state = abstract_state(config.model, transform, mesh, config.lora)
    # Stated, not left to the compiler: a compiled step takes its own result, and nothing else.
    out = (param.shardings(state, mesh), NamedSharding(mesh, PartitionSpec()))
    step = make_step(transform, rate, config.optimizer, config.loss, config.explicit_gradients)
    rows = config.data.batch_size // config.micro_batches
    batch = abstract_batch(config.micro_batches, rows, config.data.sequence_length, mesh)
    return Program(jax.jit(step, donate_argnums=0, out_shardings=out), (state, batch))


def evaluation(config: TrainConfig, mesh: Mesh) -> Program:
    """Loss sums of a held-out batch, (model, [M,R,T] batch) -> LossSums; arguments as above.

    In as many parts as a training step: rows that fit one at a time need not fit all at once.
    """

    def evaluation(model, batch):
        def add(sums, part):
            return jax.tree.map(jnp.add, sums, loss_sums(model, part, config.loss)), None

        zero = jnp.zeros((), jnp.float32)
        return jax.lax.scan(add, LossSums(zero, zero, zero), batch)[0]

    model = abstract_state(config.model, optimizer(config.optimizer), mesh, config.lora).adapted
    rows = config.data.batch_size // config.micro_batches
    batch = abstract_batch(config.micro_batches, rows, config.data.sequence_length, mesh)
    return Program(jax.jit(evaluation), (model, batch))


def abstract_batch(micro_batches: int, rows: int, length: int, mesh: Mesh) -> Batch:
    """ShapeDtypeStructs [M,R,T] as `sharding.place` lays a batch out."""
    where = sharding.sharding((None, "batch", "length"), mesh)

    def field(dtype):
        return jax.ShapeDtypeStruct((micro_batches, rows, length), dtype, sharding=where)

    return Batch(
        inputs=field(jnp.int32),
        targets=field(jnp.int32),
        weights=field(jnp.float32),
        positions=field(jnp.int32),
        segment_ids=field(jnp.int32),
    )


def lower(program: Program, mesh: Mesh) -> jax.stages.Lowered:
    """Traces and lowers a program for the mesh's devices."""
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.arguments)
        # An attached device's platform is the default; a TPU's may be absent.
        tpu = mesh.devices.flat[0].platform == "tpu"
        return traced.lower(lowering_platforms=("tpu",) if tpu else None)


def compiled(
    program: Program, mesh: Mesh, chosen: dict[str, str] | None = None
) -> jax.stages.Compiled:
    """Compiles a program.

    Args:
      chosen: `options` of the config, perhaps more.

    Raises:
      ConfigError: the compiler does not know an option, or its value.
    """
    lowered = lower(program, mesh)
    try:
        return lowered.compile(compiler_options=chosen or None)
    except Exception as error:
        problem = _option_problem(str(error), chosen or {})
        if problem is None:
            raise
        raise ConfigError([problem]) from error


def _option_problem(said: str, chosen: dict[str, str]) -> str | None:
    """What is wrong with an option, if that is what the compiler complains about."""
    first = said.split("\n", 1)[0]
    if "INVALID_ARGUMENT" not in first:
        return None
    for name, value in chosen.items():
        if not re.search(rf"\b{re.escape(name)}\b", first):
            continue
        where = f"TrainConfig.compiler_options: {name}={value}"
        if "No such compile option" not in first:
            return f"{where}: {first.removeprefix('INVALID_ARGUMENT: ')}"
        near = difflib.get_close_matches(name, _option_names(), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else "remove it"
        return f"{where} is not an option of this compiler: {hint}"
    return None


def _option_names() -> set[str]:
    """What looks like an option in the compilers that are installed: none of them lists its own."""
    names: set[bytes] = set()
    for package, library in (("libtpu", "libtpu.so"), ("jaxlib", "libjax_common.so")):
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / library if spec and spec.origin else None
        if path is None or not path.is_file():
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            names.update(re.findall(rb"xla_[a-z0-9_]{3,80}", text))
    return {name.decode() for name in names}
