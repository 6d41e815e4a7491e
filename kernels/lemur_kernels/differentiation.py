"""A loud end to differentiation where a derivative would be wrong or does not exist."""

import jax


def no_derivative(message: str, *arrays):
    """The same arrays (or pytrees); differentiating anything made of them raises.

    What is computed costs nothing: the identity is gone when the program is lowered.

    Raises:
      NotImplementedError: with the message, when one of them has a tangent.
    """

    @jax.custom_jvp
    def same(arrays):
        return arrays

    @same.defjvp
    def _(primals, tangents):
        raise NotImplementedError(message)

    return same(arrays)
