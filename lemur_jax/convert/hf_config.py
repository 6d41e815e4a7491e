"""HF's config.json <-> ModelConfig, through a whitelist.

Every attribute of LlamaConfig is honoured (it becomes a field of ModelConfig), carried (it says
nothing about the mathematics: names, token ids, generation settings) or neutral (rejected by name
unless it has the value that changes nothing). An attribute in none of the three lists is rejected
by name, so that a changed architecture cannot pass unnoticed. Attributes that are absent have the
default of `transformers.LlamaConfig`, as they would there.
"""

import dataclasses
import math
from typing import Any

from lemur_jax.config import ACTIVATIONS, COMPUTATION_FIELDS, DTYPES, ConfigError, ModelConfig
from lemur_jax.convert import hf_rope
from lemur_jax.convert.errors import ConversionError


@dataclasses.dataclass(frozen=True)
class _Field:
    """An attribute of LlamaConfig that is a field of ModelConfig; `default` is LlamaConfig's."""

    theirs: str
    ours: str
    kind: type
    default: Any


_HONOURED = (
    _Field("vocab_size", "vocab_size", int, 32000),
    _Field("hidden_size", "embed", int, 4096),
    _Field("intermediate_size", "mlp", int, 11008),
    _Field("num_hidden_layers", "layers", int, 32),
    _Field("num_attention_heads", "heads", int, 32),
    _Field("num_key_value_heads", "kv_heads", int, None),  # None: num_attention_heads
    _Field("head_dim", "head_dim", int, None),  # None: hidden_size / num_attention_heads
    _Field("hidden_act", "activation", str, "silu"),
    _Field("max_position_embeddings", "max_positions", int, 2048),
    _Field("initializer_range", "initializer_range", float, 0.02),
    _Field("rms_norm_eps", "norm_eps", float, 1e-6),
    _Field("tie_word_embeddings", "tie_embeddings", bool, False),
    _Field("attention_bias", "attention_bias", bool, False),
    _Field("mlp_bias", "mlp_bias", bool, False),
)

# Attribute -> values that change nothing. Any other value is rejected.
_NEUTRAL: dict[str, tuple] = {
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "auto_map": (None, {}),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": (None, {}),
    "sliding_window": (None,),
    "tie_last_hidden_states": (None,),
}
_WHY = {
    "attention_dropout": "there is no dropout here: set it to 0.0",
    "quantization_config": "quantised weights cannot be read: use the unquantised checkpoint",
    "auto_map": "the model comes with its own code, which may change anything: if it is a plain "
    "Llama, remove auto_map",
}

# Carried: nothing here changes a logit. pretraining_tp only split v4's products into slices.
_CARRIED = frozenset(
    [
        # where the checkpoint comes from and how it is stored
        *("architectures", "_name_or_path", "name_or_path", "transformers_version", "_commit_hash"),
        *("torch_dtype", "dtype", "use_bfloat16", "torchscript", "tf_legacy_loss"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
        *("pretraining_tp", "base_model_tp_plan", "unsloth_fixed", "unsloth_version"),
        # token ids, tokenizer, tasks
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"),
        *("unk_token_id", "mask_token_id", "decoder_start_token_id", "tokenizer_class", "prefix"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
        *("task_specific_params", "max_sequence_length"),
        # what a call returns
        *("use_cache", "is_decoder", "return_dict", "output_hidden_states", "output_attentions"),
        *("output_scores", "return_dict_in_generate"),
        # generation settings, which belong in generation_config.json
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p"),
        *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
        *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    ]
)
_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")  # the second: the first converted Llamas

# Fields of ModelConfig that say how to compute, not what: no part of an HF config.
COMPUTATION = (*COMPUTATION_FIELDS, "param_dtype", "vocab_multiple")


def config_from_hf(source: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json.

    `dtype` and `param_dtype` are the stated dtype, float32 if none is stated.

    Raises:
      ConversionError: every attribute that cannot be honoured: name, value and what to do.
    """
    if source.get("model_type") != "llama":
        raise ConversionError(
            [
                f"model_type={source.get('model_type')!r} is not supported: only 'llama' is "
                "(mistral, qwen2, gemma and others differ in ways that this model does not have)"
            ]
        )
    problems = _unknown_or_not_neutral(source)
    values: dict[str, Any] = {}
    for field in _HONOURED:
        values[field.ours] = _typed(field, source, problems)
    if values["kv_heads"] is None:
        values["kv_heads"] = values["heads"]
    if values["heads"] <= 0:
        problems.append(f"num_attention_heads={values['heads']} must be positive")
    if values["head_dim"] is None and not problems:
        if values["embed"] % values["heads"]:
            problems.append(
                f"hidden_size={values['embed']} must divide by num_attention_heads="
                f"{values['heads']}, or head_dim must be given"
            )
        values["head_dim"] = values["embed"] // values["heads"]
    if values["activation"] not in ACTIVATIONS:
        problems.append(
            f"hidden_act={values['activation']!r} is not supported; supported: "
            f"{', '.join(ACTIVATIONS)}"
        )
    dtype = stated_dtype(source) or "float32"
    if dtype not in DTYPES:
        problems.append(f"dtype={dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    try:
        positions = values["max_positions"] or 0
        values["rope"], values["max_positions"] = hf_rope.rope_from_hf(source, positions)
    except ConversionError as error:
        problems += error.problems
    if problems:
        raise ConversionError(problems)
    try:
        return ModelConfig(**values, dtype=dtype, param_dtype=dtype)
    except ConfigError as error:
        raise ConversionError([f"config.json: {problem}" for problem in error.problems]) from error


def config_to_hf(
    config: ModelConfig, source: dict[str, Any] | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """config.json of a model.

    Args:
      config: the model.
      source: the config.json that the model came from, if any. If it still describes the model it
        is returned in its own spelling; if not, what it carries is kept and the rest is written
        anew in v4's spelling, which every version of transformers reads.
      dtype: of the stored weights; None keeps what `source` says.

    Raises:
      ConversionError: the model is one that transformers cannot hold.
    """
    if config.embed % config.heads:
        raise ConversionError(
            [
                f"ModelConfig.embed={config.embed} does not divide by heads={config.heads}: "
                "transformers refuses such a LlamaConfig, so the model cannot be exported"
            ]
        )
    if source is not None and same_model(config_from_hf(source), config):
        written = dict(source)
    else:
        written = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "use_cache": True}
        written |= {key: value for key, value in (source or {}).items() if key in _CARRIED}
        for field in _HONOURED:
            written[field.theirs] = getattr(config, field.ours)
        written |= {"attention_dropout": 0.0, **hf_rope.rope_to_hf(config.rope)}
        if config.rope.kind == "dynamic":
            # HF has one number where we have two: what the model claims to handle is derived.
            written["max_position_embeddings"] = config.rope.original_max_positions
    if dtype is not None:
        # v4 up to 4.55 knows torch_dtype only, later versions prefer dtype.
        spelt = [key for key in ("dtype", "torch_dtype") if written.get(key) is not None]
        for key in spelt or ("dtype", "torch_dtype"):
            written[key] = dtype
    return written


def same_model(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two configs describe the same mathematics, however it is computed."""
    plain = {name: getattr(a, name) for name in COMPUTATION}
    return a == dataclasses.replace(b, **plain)


def stated_dtype(source: dict[str, Any]) -> str | None:
    """The dtype that a config.json states, in either spelling, without "torch."."""
    for key in ("dtype", "torch_dtype"):
        if source.get(key) is not None:
            return str(source[key]).removeprefix("torch.")
    return None


def _unknown_or_not_neutral(source: dict[str, Any]) -> list[str]:
    problems = []
    honoured = {field.theirs for field in _HONOURED} | set(hf_rope.KEYS) | {"model_type"}
    for key, value in source.items():
        if key in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[key]:
                why = _WHY.get(key, f"only {key}={_NEUTRAL[key][0]!r} is supported")
                problems.append(f"{key}={value!r} is not supported: {why}")
        elif key not in honoured and key not in _CARRIED and value is not None:
            problems.append(
                f"unknown attribute {key}={value!r} in config.json: it may change the model, so "
                "nothing is converted; if transformers' LlamaModel ignores it, remove it"
            )
    architectures = source.get("architectures") or list(_ARCHITECTURES[:1])
    if isinstance(architectures, str):
        problems.append(f"architectures={architectures!r} must be a list: [{architectures!r}]")
    elif any(name not in _ARCHITECTURES for name in architectures):
        problems.append(
            f"architectures={architectures!r} is not supported: only {_ARCHITECTURES[0]} is; "
            "load the model with it and save it again"
        )
    return problems


def _typed(field: _Field, source: dict[str, Any], problems: list[str]) -> Any:
    value = source.get(field.theirs)
    if value is None:
        return field.default
    good = {
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, (int, float)) and not isinstance(value, bool),
        bool: isinstance(value, bool),
        str: isinstance(value, str),
    }[field.kind]
    if not good:
        problems.append(
            f"{field.theirs}={value!r} in config.json must be of type {field.kind.__name__}"
        )
        return field.default
    if field.kind is float and not math.isfinite(value):
        problems.append(f"{field.theirs}={value!r} in config.json must be a finite number")
        return field.default
    return value
