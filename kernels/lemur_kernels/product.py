"""A matrix product that accumulates in f32 on every backend."""

import functools

import jax
import jax.numpy as jnp


def einsum_f32(expression: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """jnp.einsum of two arrays, f32 out, whatever their dtype.

    XLA's CPU backend compiles every bf16 x bf16 -> f32 product but cannot run all of them
    ("Unsupported element type for DotThunk::Execute", jaxlib 0.10.2), so there the operands are
    widened first. The choice falls when the program is lowered, so compiling for a TPU on a
    CPU host sees the TPU's product.
    """
    product = functools.partial(jnp.einsum, expression, preferred_element_type=jnp.float32)
    if x.dtype == y.dtype == jnp.float32:
        return product(x, y)

    def widened(x, y):
        return product(x.astype(jnp.float32), y.astype(jnp.float32))

    return jax.lax.platform_dependent(x, y, cpu=widened, default=product)
