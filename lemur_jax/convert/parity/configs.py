"""What two configs say differently, in HF's words, and what can be done about it.

A fix is an edit of B's own file only where B's tensors allow it: a size that the tensors have is
no claim of the config, and a checkpoint of ours is not edited at all.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lemur_jax.config import ModelConfig
from lemur_jax.convert import hf_rope
from lemur_jax.convert.model import Source
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
_META = {
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
}
# What decides which tensors there are and what their shapes are.
_STRUCTURE = (*_SHAPES, "attention_bias", "mlp_bias")


@dataclasses.dataclass(frozen=True)
class Spelling:
    """Where and how a model says its config.

    Attributes:
      file: that a user may edit; "" if there is none.
      theta, scaling: keys of rope_theta and of rope_scaling in it.
    """

    file: str = "config.json"
    theta: str = "rope_theta"
    scaling: str = "rope_scaling"


def spelling(source: Source) -> Spelling:
    """Of a model of any format."""
    if source.format == "meta":
        return Spelling("params.json", scaling="use_scaled_rope")
    if source.format == "lemur":
        return Spelling("")
    path = Path(source.path)
    directory = path if path.is_dir() else path.parent
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    if not rope:
        return Spelling()
    theta = "rope_parameters.rope_theta" if "rope_theta" in rope else "rope_theta"
    return Spelling(theta=theta, scaling="rope_parameters")


def differences(a: ModelConfig, b: ModelConfig, says: Spelling | None = None) -> Iterator[Finding]:
    """Findings about B's config, A's being right; `says` is how B spells its own."""
    says = says or Spelling()
    for ours, theirs in _THEIRS.items():
        x, y = getattr(a, ours), getattr(b, ours)
        if x == y:
            continue
        if ours == "vocab_size":
            yield _vocabulary(x, y)
        elif ours == "tie_embeddings":
            yield _tied(x, y, says)
        elif _in_the_tensors(ours, a, b):
            fix = "none by an edit of its config: its tensors have these sizes, it is another model"
            if ours == "layers" and y < x and same_structure(a, dataclasses.replace(b, layers=x)):
                fix = f"{x - y} of {x} layers are missing: convert it again from a source with all"
            yield _field(theirs, x, y, fix)
        else:
            yield _field(theirs, x, y, _edit(says, theirs, x))
    if a.rope.theta != b.rope.theta:
        fix = _edit(says, says.theta, a.rope.theta)
        yield _field("rope_theta", a.rope.theta, b.rope.theta, fix)
    plain = dataclasses.replace(b.rope, theta=a.rope.theta)
    if plain != a.rope:
        what = f"is {_scaling(b)}, it should be {_scaling(a)}"
        yield Finding("rope_scaling", "rope_scaling", None, what, _edit_scaling(says, a))
    if a.param_dtype != b.param_dtype:
        what = f"is {b.param_dtype}, of the other model {a.param_dtype}: its rounding is no fault"
        yield Finding("dtype", "dtype of the weights", None, what, fault=False)
    if a.max_positions != b.max_positions:
        # Only a claim, but where RoPE is scaled by it, which `rope_scaling` would show.
        name = "max_position_embeddings"
        fix = _edit(says, name, a.max_positions)
        if says.file == "params.json":
            fix = f"give --max_positions={a.max_positions}: {says.file} does not say it"
        found = _field(name, a.max_positions, b.max_positions, fix)
        yield dataclasses.replace(found, fault=False)


def _vocabulary(right: int, found: int) -> Finding:
    """More rows are added tokens or padding; the shared ones are compared."""
    name = "vocab_size"
    if found > right:
        what = f"is {found}, of the other model {right}: added tokens, or padding"
        fix = f"nothing; to cut the rows off, lemur convert MODEL NEW --vocab_size={right}"
        return Finding(name, name, None, what, fix, fault=False)
    fix = f"its last {right - found} rows are missing: convert it again from a source with all"
    return _field(name, right, found, fix)


def _tied(right: bool, found: bool, says: Spelling) -> Finding:
    """An untied head may equal the table, which is compared."""
    name = "tie_word_embeddings"
    if right:
        fix = "nothing, as long as lm_head equals embed_tokens"
        return dataclasses.replace(_field(name, right, found, fix), fault=False)
    fix = "write it again with the lm_head of the other model"
    if says.file == "config.json":
        fix += f"; if its files hold lm_head.weight, {_edit(says, name, right)}"
    return _field(name, right, found, fix)


def _in_the_tensors(name: str, a: ModelConfig, b: ModelConfig) -> bool:
    """Whether a field that differs makes the shapes or names of tensors differ."""
    if name in ("embed", "mlp", "layers", "attention_bias", "mlp_bias"):
        return True
    queries = a.heads * a.head_dim != b.heads * b.head_dim
    keys = a.kv_heads * a.head_dim != b.kv_heads * b.head_dim
    return {"heads": queries, "kv_heads": keys, "head_dim": queries or keys}.get(name, False)


def same_structure(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether the two have the same layers, so that they can be compared."""
    return all(getattr(a, name) == getattr(b, name) for name in _STRUCTURE)


def _field(name: str, right: Any, found: Any, fix: str) -> Finding:
    what = f"is {json.dumps(found)}, it should be {json.dumps(right)}"
    return Finding(name, name, None, what, fix)


def _edit(says: Spelling, name: str, value: Any) -> str:
    """The edit that makes B say `value`."""
    if says.file == "params.json" and name not in _META:
        return f"{says.file} cannot say it: convert it --to=hf and set {name} in config.json there"
    name = _META[name] if says.file == "params.json" else name
    if says.file:
        return f"set {name} to {json.dumps(value)} in {says.file}"
    return f"convert it again from a source that says {name}={json.dumps(value)}"


def _edit_scaling(says: Spelling, right: ModelConfig) -> str:
    scaling = hf_rope.rope_to_hf(right.rope)["rope_scaling"]
    if says.file == "params.json":
        return f"correct use_scaled_rope and rope_scaling_factor in {says.file}"
    if says.scaling == "rope_parameters":
        scaling = {"rope_theta": right.rope.theta, **(scaling or {"rope_type": "default"})}
    return _edit(says, says.scaling, scaling)


def _scaling(config: ModelConfig) -> str:
    """Of a rope, what differs from RopeConfig's defaults, without theta."""
    shown = []
    for field in dataclasses.fields(config.rope):
        value = getattr(config.rope, field.name)
        if field.name != "theta" and value != field.default:
            shown.append(f"{field.name}={value!r}")
    return ", ".join(shown) or "none"
