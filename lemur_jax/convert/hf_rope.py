"""The rotary part of HF's config.json, in the spelling of transformers v4 and of v5.

v4: {"rope_theta": t, "rope_scaling": null | {"type" or "rope_type": kind, "factor": ...}}
v5: {"rope_parameters": {"rope_theta": t, "rope_type": kind, "factor": ...}}

Meaning and defaults are those of `transformers/modeling_rope_utils.py`.
"""

import math
from typing import Any

from lemur_jax.config import ROPE_KINDS, ConfigError, RopeConfig
from lemur_jax.convert.errors import ConversionError

DEFAULT_THETA = 10_000.0
KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")

# kind -> {key of HF: field of RopeConfig}; HF ignores every other key with a warning.
_LLAMA3 = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}
_YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}
_PARAMETERS = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": _LLAMA3,
    "yarn": _YARN,
}
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def rope_from_hf(source: dict[str, Any], max_positions: int) -> tuple[RopeConfig, int]:
    """RopeConfig and the longest sequence, from a whole config.json.

    Args:
      source: config.json.
      max_positions: HF's max_position_embeddings. `dynamic` takes it for the trained length, and
        the model then handles `factor` times as many positions.

    Raises:
      ConversionError: what cannot be honoured, by name.
    """
    problems: list[str] = []
    parameters = _one_dict(source, problems)
    theta = _theta(source, parameters, problems)
    kind = _kind(parameters, problems)
    for where in (source, parameters):
        partial = where.get("partial_rotary_factor")
        if partial is not None and partial != 1:
            problems.append(
                f"partial_rotary_factor={partial!r} is not supported: every dimension of a head "
                "is rotated (partial_rotary_factor=1)"
            )
    if problems:
        raise ConversionError(problems)

    known = _PARAMETERS[kind]
    common = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    fields: dict[str, Any] = {}
    for key, value in parameters.items():
        if key in common or value is None:
            continue
        if key not in known:
            listed = ", ".join(known) or "none besides rope_theta"
            problems.append(
                f"RoPE parameter {key}={value!r} has no meaning for rope_type={kind!r} "
                f"(parameters: {listed}): remove it from config.json, or correct rope_type"
            )
        elif key == "truncate":
            if not isinstance(value, bool):
                problems.append(f"RoPE parameter truncate={value!r} must be true or false")
            fields["truncate"] = value
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            problems.append(f"RoPE parameter {key}={value!r} must be a number")
        elif not math.isfinite(value):
            problems.append(f"RoPE parameter {key}={value!r} must be a finite number")
        else:
            fields[known[key]] = value
    for key in _REQUIRED.get(kind, ()):
        if parameters.get(key) is None:
            problems.append(
                f"rope_type={kind!r} needs the parameter {key!r}: add it to config.json"
            )
    if problems:
        raise ConversionError(problems)

    if kind in ("llama3", "yarn"):
        fields.setdefault("original_max_positions", max_positions)
    if kind == "yarn":
        fields.setdefault("factor", max_positions / fields["original_max_positions"])
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            fields[key] = fields.get(key) or default
    if kind == "dynamic":
        fields["original_max_positions"] = max_positions
        max_positions = int(max_positions * fields["factor"])
    try:
        return RopeConfig(theta=theta, kind=kind, **fields), max_positions
    except ConfigError as error:
        raise ConversionError(error.problems) from error


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """rope_theta and rope_scaling, v4 spelling: every version of transformers and vLLM reads it."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    optional = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True}
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    for key, field in _PARAMETERS[rope.kind].items():
        value = getattr(rope, field)
        if field not in optional or value != optional[field]:
            scaling[key] = value
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _one_dict(source: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    given = {key: source[key] for key in ("rope_parameters", "rope_scaling") if source.get(key)}
    for key, value in given.items():
        if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
            problems.append(f"{key}={value!r} must be one flat object: {{rope_type, factor, ...}}")
            return {}
    if len(given) == 2:
        plain = [
            {k: v for k, v in value.items() if k not in ("rope_theta", "type", "rope_type")}
            | {"rope_type": value.get("rope_type", value.get("type", "default"))}
            for value in given.values()
        ]
        if plain[0] != plain[1]:
            problems.append(
                f"rope_parameters={given['rope_parameters']!r} and "
                f"rope_scaling={given['rope_scaling']!r} disagree: keep one of them"
            )
    return dict(next(iter(given.values()), {}))


def _theta(source: dict[str, Any], parameters: dict[str, Any], problems: list[str]) -> float:
    inner, outer = parameters.get("rope_theta"), source.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        problems.append(
            f"rope_theta={outer!r} and rope_parameters.rope_theta={inner!r} disagree: keep one"
        )
    theta = next((value for value in (inner, outer) if value is not None), DEFAULT_THETA)
    number = isinstance(theta, (int, float)) and not isinstance(theta, bool)
    if not number or not math.isfinite(theta):
        problems.append(f"rope_theta={theta!r} must be a finite number (Llama 2: 10000.0)")
        return DEFAULT_THETA
    return float(theta)


def _kind(parameters: dict[str, Any], problems: list[str]) -> str:
    new, old = parameters.get("rope_type"), parameters.get("type")
    if new is not None and old is not None and new != old:
        problems.append(f"rope_type={new!r} and type={old!r} disagree: keep rope_type only")
    kind = next((value for value in (new, old) if value is not None), "default")
    if kind not in ROPE_KINDS:
        problems.append(f"rope_type={kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
        return "default"
    return kind
