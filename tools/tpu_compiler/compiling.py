"""Compiles a function for a TPU with libtpu on this machine, keeping the final schedules."""

import base64
import dataclasses
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lemur_jax.plan import libtpu
from tpu_compiler import scopes
from tpu_compiler.bundles import Kernel, dumped, read_kernel
from tpu_compiler.topology import chip_named, one_device


class CompileError(Exception):
    """The TPU compiler refused the program; the message is its first line."""


@dataclasses.dataclass
class Compiled:
    """What the compiler made of one function.

    Attributes:
      kernels: final schedule of each Pallas call, by its name in the HLO.
      one_core: names of the kernels whose grid has no "parallel" dimension: where two TensorCores
        are one device, one of them runs all of it.
      hlo: the optimized, scheduled program.
      seconds: wall time of the compiler alone.
      vmem_bytes: largest scoped VMEM allocation of a kernel (blocks, scratch and spills).
      temp_bytes: HBM for temporaries. argument_bytes, output_bytes: HBM of those. peak_bytes: of
        all of them at one time.
    """

    kernels: list[Kernel]
    one_core: list[str]
    hlo: str
    seconds: float
    vmem_bytes: int
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    peak_bytes: int


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return libtpu.missing()


def start(dump: Path) -> None:
    """Prepares this process: environment, dump folder, scopes. Call before anything touches JAX's
    backends; the dump folder is the process's for good, as libtpu reads its flags once."""
    libtpu.prepare()
    dump.mkdir(parents=True, exist_ok=True)
    flags = [
        f"--xla_jf_dump_to={dump}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=(final_).*",
        scopes.LIBTPU_FLAG,
    ]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *flags])
    os.environ["LEMUR_TPU_DUMP"] = str(dump)
    scopes.install()


def compile_for(
    chip: str,
    fn: Callable,
    *args: tuple[Sequence[int], str],
    compiler_options: dict | None = None,
) -> Compiled:
    """Compiles `jax.jit(fn)` for one device of the chip and reads every kernel's schedule.

    Args:
      chip: a name in topology.CHIPS.
      args: (shape, dtype) of each argument, or a pytree of such pairs' jax.ShapeDtypeStruct.

    Raises:
      CompileError: the compiler's own words (VMEM, unsupported operation, out of memory).
    """
    import jax
    import numpy as np
    from jax.sharding import (
        AbstractDevice,
        AbstractMesh,
        Mesh,
        NamedSharding,
        PartitionSpec,
        use_abstract_mesh,
    )

    dump = Path(os.environ["LEMUR_TPU_DUMP"])
    before = set(dumped(dump))
    device = one_device(chip)
    mesh = Mesh(np.array([device]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    pairs = [jax.ShapeDtypeStruct(*x) if isinstance(x, tuple) else x for x in args]
    pairs = jax.tree.map(abstract, pairs)
    # Tells kernels their target (pltpu.get_tpu_info), as a mesh of real devices would.
    target = AbstractDevice(device.device_kind, device.num_cores, "tpu")
    try:
        with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=target)):
            lowered = jax.jit(fn).trace(*pairs).lower(lowering_platforms=("tpu",))
        started = time.monotonic()
        compiled = lowered.compile(compiler_options=compiler_options)
    except Exception as error:  # jaxlib raises several types; all of them are the verdict
        raise CompileError(_first_line(error)) from error
    seconds = time.monotonic() - started
    hlo = compiled.as_text()
    calls = [i for i in re.split(r"\n  (?:ROOT )?%", hlo) if '="tpu_custom_call"' in i]
    used = re.findall(r'"used_scoped_memory_configs":\[([^\]]*)\]', "\n".join(calls))
    sizes = [n for u in used for n in re.findall(r'"memory_space":"1".*?"size":"(\d+)"', u)]
    memory = compiled.memory_analysis()
    delay = chip_named(chip).branch_delay
    kernels = [read_kernel(p, delay) for p in dumped(dump) if p not in before]
    bodies = {
        call.split(" ", 1)[0]: base64.b64decode(re.search(r'"body":"([\w+/=]+)"', call)[1])
        for call in calls
    }
    return Compiled(
        kernels=[kernel for kernel in kernels if kernel.name in bodies],
        one_core=[n for n, body in bodies.items() if b"dimension_semantics<parallel" not in body],
        hlo=hlo,
        seconds=seconds,
        vmem_bytes=max(map(int, sizes), default=0),
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:400]}" if lines else repr(error)
