"""What two configs say differently, in HF's words."""

import dataclasses
from collections.abc import Iterator

from lemur_jax.config import ModelConfig
from lemur_jax.convert.parity.finding import Finding

_THEIRS = {
    "vocab_size": "vocab_size",
    "embed": "hidden_size",
    "mlp": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "activation": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}
_SHAPES = ("embed", "mlp", "layers", "heads", "kv_heads", "head_dim")
# What decides which tensors there are and what their shapes are.
_STRUCTURE = (*_SHAPES, "attention_bias", "mlp_bias")


def differences(a: ModelConfig, b: ModelConfig) -> Iterator[Finding]:
    """Findings about B's config, A's being right."""
    for ours, theirs in _THEIRS.items():
        x, y = getattr(a, ours), getattr(b, ours)
        if x != y:
            yield dataclasses.replace(_field(theirs, x, y), fault=not _harmless(ours, x, y))
    if a.rope.theta != b.rope.theta:
        yield _field("rope_theta", a.rope.theta, b.rope.theta)
    plain = dataclasses.replace(b.rope, theta=a.rope.theta)
    if plain != a.rope:
        yield _field("rope_scaling", _scaling(a), _scaling(b))
    if a.param_dtype != b.param_dtype:
        what = f"is {b.param_dtype}, of the other model {a.param_dtype}: its rounding is no fault"
        yield Finding("dtype", "dtype of the weights", None, what, fault=False)
    if a.max_positions != b.max_positions:
        # Only a claim, but where RoPE is scaled by it, which `rope_scaling` would show.
        yield dataclasses.replace(
            _field("max_position_embeddings", a.max_positions, b.max_positions), fault=False
        )


def _harmless(name: str, right, found) -> bool:
    """More rows are added tokens; an untied head may equal the table, which is compared."""
    return (name == "vocab_size" and found > right) or (name == "tie_embeddings" and not found)


def same_structure(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether the two have the same layers, so that they can be compared."""
    return all(getattr(a, name) == getattr(b, name) for name in _STRUCTURE)


def _field(name: str, right, found) -> Finding:
    what = f"is {found!r}, it should be {right!r}"
    return Finding(name, name, None, what, f"set {name} to {right!r} in config.json")


def _scaling(config: ModelConfig) -> str:
    """Of a rope, what differs from RopeConfig's defaults, without theta."""
    shown = []
    for field in dataclasses.fields(config.rope):
        value = getattr(config.rope, field.name)
        if field.name != "theta" and value != field.default:
            shown.append(f"{field.name}={value!r}")
    return ", ".join(shown) or "none"
