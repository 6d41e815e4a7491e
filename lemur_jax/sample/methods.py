"""How a token is chosen from logits: transforms as values, and the chain of them that HF applies.

Each transform is a frozen dataclass, `transform(logits_BV, seen_BV) -> logits_BV`: pure, and -inf
marks a token that cannot be drawn. Its numbers may be Python numbers (then it is validated and
hashable) or arrays of one number per row. They are leaves of a pytree, so that under jit they are
traced: changing a temperature compiles nothing, and the rows of a batch may all differ.

A neutral value (temperature 1, top_k 0, top_p 1, min_p 0, penalty 1) leaves its row's logits
bitwise alone, and a transform that is neutral in every row is skipped at run time by `lax.cond`.
So one compiled program serves every mixture of methods, and a row is not touched by what its
batch-mates asked for.

Dimension key: B batch, V vocab (padded; padded columns are -inf from the model).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.config import ConfigError
from lemur_jax.sample import vocabulary

Number = int | float | jax.Array

# Dividing logits of a few hundred by less than this leaves float32's useful range.
MIN_TEMPERATURE = 1e-4


def _transform(cls):
    """Frozen dataclass whose fields are pytree leaves; Python numbers are validated."""

    def validate(self):
        problems = check(**dataclasses.asdict(self))
        if problems:
            raise ConfigError(problems)

    cls.__post_init__ = validate
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=fields, meta_fields=[])


def _column(value: Number, dtype=jnp.float32) -> jax.Array:
    """A number, or one per row, shaped to broadcast against [B,V]."""
    return jnp.asarray(value, dtype).reshape(-1, 1)


@_transform
class RepetitionPenalty:
    """Makes tokens that have occurred less likely (CTRL, arXiv:1909.05858 section 4.1).

    HF's definition: the logit of every token of the prompt and of what was generated is divided by
    the penalty if positive and multiplied by it if negative. 1 does nothing.
    """

    repetition_penalty: Number

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        penalty = _column(self.repetition_penalty)

        def apply(logits):
            scaled = jnp.where(logits < 0, logits * penalty, logits / penalty)
            return jnp.where(seen_BV, scaled, logits)

        return jax.lax.cond(jnp.any(penalty != 1), apply, lambda logits: logits, logits_BV)


@_transform
class Temperature:
    """Divides logits by the temperature; 0 is its limit: only the first largest logit is left."""

    temperature: Number

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        temperature = _column(self.temperature)

        def apply(logits):
            greedy = temperature == 0
            return jnp.where(
                greedy, vocabulary.only_largest(logits), logits / jnp.where(greedy, 1, temperature)
            )

        return jax.lax.cond(jnp.any(temperature != 1), apply, lambda logits: logits, logits_BV)


@_transform
class Greedy:
    """Leaves only the first largest logit: the same as Temperature(0)."""

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        return vocabulary.only_largest(logits_BV)


@_transform
class TopK:
    """Keeps the k largest logits and all that equal the k-th (as HF does). 0 keeps all."""

    top_k: Number

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        k = _column(self.top_k, jnp.int32)

        def apply(logits):
            codes = vocabulary.ordered(logits)

            def enough(threshold):
                return jnp.sum(codes >= threshold, -1, keepdims=True) >= k

            kth, _ = vocabulary.bisect(enough, codes)
            return jnp.where((codes >= kth) | (k <= 0), logits, -jnp.inf)

        return jax.lax.cond(jnp.any(k > 0), apply, lambda logits: logits, logits_BV)


@_transform
class TopP:
    """Keeps the fewest most likely tokens whose probability reaches p (arXiv:1904.09751).

    A token stays iff the tokens more likely than it have less than p together; tokens of equal
    logit stay or go together. At least one stays. 1 keeps all.
    """

    top_p: Number

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        p = _column(self.top_p)

        def apply(logits):
            codes, mass_BV = vocabulary.ordered(logits), jax.nn.softmax(logits, axis=-1)

            def too_low(threshold):
                return jnp.sum(mass_BV, -1, keepdims=True, where=codes > threshold) >= p

            _, lowest = vocabulary.bisect(too_low, codes)
            return jnp.where((codes >= lowest) | (p >= 1), logits, -jnp.inf)

        return jax.lax.cond(jnp.any(p < 1), apply, lambda logits: logits, logits_BV)


@_transform
class MinP:
    """Keeps tokens at least `min_p` times as likely as the likeliest (arXiv:2407.01082). 0: all."""

    min_p: Number

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        del seen_BV
        top = jnp.max(logits_BV, axis=-1, keepdims=True)
        return jnp.where(logits_BV >= top + jnp.log(_column(self.min_p)), logits_BV, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """Transforms in the order in which they act, then one draw."""

    transforms: tuple[Any, ...]

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        """Logits of the distribution that is drawn from."""
        for transform in self.transforms:
            logits_BV = transform(logits_BV, seen_BV)
        return logits_BV

    def draw(self, logits_BV: jax.Array, seen_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
        """One token [B] int32 for each row, drawn with the row's own key.

        When all rows are greedy, only what acts before the temperature is computed.
        """
        heads = [isinstance(transform, Temperature) for transform in self.transforms]
        if not any(heads):
            return vocabulary.categorical(self(logits_BV, seen_BV), keys_B)
        first = heads.index(True)
        before, rest = Chain(self.transforms[:first]), Chain(self.transforms[first:])
        temperature = _column(self.transforms[first].temperature)
        return jax.lax.cond(
            jnp.all(temperature == 0),
            lambda logits: vocabulary.first_largest(logits)[:, 0],
            lambda logits: vocabulary.categorical(rest(logits, seen_BV), keys_B),
            before(logits_BV, seen_BV),
        )


def standard(
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Chain:
    """All transforms in HF's order (transformers' `_get_logits_processor`), neutral by default."""
    return Chain(
        (
            RepetitionPenalty(repetition_penalty),
            Temperature(temperature),
            TopK(top_k),
            TopP(top_p),
            MinP(min_p),
        )
    )


def stack(chains: Sequence[Chain]) -> Chain:
    """One chain for a batch: each number becomes an array [B]. All must have the same transforms.

    Arrays are numpy's, so that building a batch compiles nothing.
    """

    def column(*values):
        dtype = np.int32 if isinstance(values[0], int) else np.float32
        return np.asarray(values, dtype)

    return jax.tree.map(column, *chains)


def check(**values: Any) -> list[str]:
    """Problems of settings given by name, each with field, value and fix. Arrays pass unseen."""
    problems = []
    for name, value in values.items():
        legal, fix = _LEGAL[name]
        kinds = int if name == "top_k" else (int, float)
        if isinstance(value, (bool, int, float, str, type(None))) and not (
            isinstance(value, kinds)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and legal(value)
        ):
            problems.append(f"{name}={value!r} {fix}")
    return problems


_LEGAL = {
    "temperature": (
        lambda t: t == 0 or t >= MIN_TEMPERATURE,
        f"must be 0 (greedy) or a number >= {MIN_TEMPERATURE}: 0.7 is usual for chat, 1 is the "
        "model's own distribution",
    ),
    "top_k": (
        lambda k: 0 <= k < 2**31,
        "must be an integer >= 0: 50 is usual, 0 turns top-k off",
    ),
    "top_p": (
        lambda p: 0 < p <= 1,
        "must be a number in (0, 1]: 0.95 is usual, 1 turns top-p off",
    ),
    "min_p": (
        lambda p: 0 <= p <= 1,
        "must be a number in [0, 1]: 0.05 is usual, 0 turns min-p off",
    ),
    "repetition_penalty": (
        lambda r: r > 0,
        "must be a number > 0: 1.1 is usual, 1 turns the penalty off",
    ),
}
