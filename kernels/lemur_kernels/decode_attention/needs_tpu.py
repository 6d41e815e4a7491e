"""An error that names the fix when a TPU kernel is compiled for something else.

Which platform a function is compiled for is known only when it is lowered: a trace on a CPU host
may be meant for a TPU (ahead-of-time compilation). So the check is an operation of its own.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

_needs_tpu = Primitive("decode_attention_needs_tpu")
_needs_tpu.def_abstract_eval(lambda x: x)
_needs_tpu.def_impl(jax.jit(_needs_tpu.bind))


def needs_tpu(x: jax.Array) -> jax.Array:
    """x itself; a ValueError when the program around it is lowered for another platform."""
    return _needs_tpu.bind(x)


def _fail(context, x):
    raise ValueError(
        "decode_attention implementation='pallas_tpu' needs a TPU, this program is compiled for "
        f"{context.module_context.platforms}; use implementation='gathered', or "
        "interpret=pltpu.InterpretParams() for a test"
    )


mlir.register_lowering(_needs_tpu, _fail)
mlir.register_lowering(_needs_tpu, lambda _, x: [x], platform="tpu")
