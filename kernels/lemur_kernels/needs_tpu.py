"""An error that names the fix when a TPU kernel is compiled for something else.

Which platform a function is compiled for is known only when it is lowered: a trace on a CPU host
may be meant for a TPU (ahead-of-time compilation). So the check is an operation of its own.
"""

import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_needs_tpu = Primitive("lemur_needs_tpu")
_needs_tpu.def_abstract_eval(lambda x, **_: x)


@_needs_tpu.def_impl
def _now(x, **names):
    return jax.jit(functools.partial(_needs_tpu.bind, **names))(x)


def needs_tpu(x: jax.Array, function: str, instead: str) -> jax.Array:
    """x itself; a ValueError when the program around it is lowered for another platform.

    Args:
      function: whose 'pallas_tpu' it is. instead: its implementation for other platforms.
    """
    return _needs_tpu.bind(x, function=function, instead=instead)


def _fail(context, x, *, function, instead):
    raise ValueError(
        f"{function} implementation='pallas_tpu' needs a TPU, this program is compiled for "
        f"{context.module_context.platforms}; use implementation={instead!r}, or "
        "interpret=pltpu.InterpretParams() for a test"
    )


mlir.register_lowering(_needs_tpu, _fail)
mlir.register_lowering(_needs_tpu, lambda _, x, **names: [x], platform="tpu")
batching.defvectorized(_needs_tpu)
