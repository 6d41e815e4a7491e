"""config.json is honoured or rejected by name, and comes back as it was."""

import dataclasses

import pytest
import tiny_hf

from lemur_jax.config import ConfigError, ModelConfig, RopeConfig
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.hf_config import config_from_hf, config_to_hf, same_model

BASE = tiny_hf.CONFIG
MODEL = config_from_hf(BASE)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 20,
    "beta_slow": 2,
    "attention_factor": 1.2,
    "mscale": 0.7,
    "mscale_all_dim": 1.4,
    "truncate": False,
}


def rejected(change, base=BASE):
    with pytest.raises(ConversionError) as caught:
        config_from_hf(base | change)
    return str(caught.value)


def test_every_number_arrives():
    """Red when two attributes are exchanged in the table of fields."""
    expected = ModelConfig(
        vocab_size=101,
        embed=16,
        mlp=24,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=4,
        max_positions=64,
        rope=RopeConfig(theta=1e4),
        norm_eps=1e-5,
        initializer_range=0.02,
        dtype="float32",
        param_dtype="float32",
    )
    assert config_from_hf(BASE) == expected


def test_absent_attributes_have_llama_configs_defaults():
    """Red when a default of the table differs from transformers', e.g. rms_norm_eps 1e-5."""
    transformers = pytest.importorskip("transformers", reason="source of the defaults (test)")
    theirs = transformers.LlamaConfig()
    bare = config_from_hf({"model_type": "llama"})
    assert bare == dataclasses.replace(
        config_from_hf(theirs.to_dict() | {"dtype": None}), dtype="float32"
    )
    assert (bare.vocab_size, bare.embed, bare.mlp, bare.layers) == (
        theirs.vocab_size,
        theirs.hidden_size,
        theirs.intermediate_size,
        theirs.num_hidden_layers,
    )
    assert (bare.kv_heads, bare.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (bare.norm_eps, bare.max_positions) == (
        theirs.rms_norm_eps,
        theirs.max_position_embeddings,
    )
    assert bare.rope.theta == theirs.rope_parameters["rope_theta"]


def test_every_attribute_of_llama_config_is_in_a_list():
    """Red when an attribute of LlamaConfig is missing from the whitelist."""
    transformers = pytest.importorskip("transformers", reason="source of the attributes (test)")
    config_from_hf(transformers.LlamaConfig().to_dict())
    config_from_hf(transformers.LlamaConfig(num_key_value_heads=8, eos_token_id=[1, 2]).to_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"residual_multiplier": 0.22}, ["residual_multiplier=0.22", "unknown", "remove"]),
        ({"use_qk_norm": False}, ["use_qk_norm=False", "unknown"]),
        ({"attention_dropout": 0.1}, ["attention_dropout=0.1", "set it to 0.0"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "'bits': 4", "unquantised"]),
        ({"sliding_window": 4096}, ["sliding_window=4096"]),
        ({"auto_map": {"AutoModel": "x.Y"}}, ["auto_map", "x.Y", "own code"]),
        ({"is_encoder_decoder": True}, ["is_encoder_decoder=True"]),
        ({"model_type": "mistral"}, ["model_type='mistral'", "'llama'"]),
        ({"model_type": None}, ["model_type=None"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"hidden_act": "gelu_new"}, ["hidden_act='gelu_new'", "supported: silu, gelu"]),
        ({"hidden_size": "4096"}, ["hidden_size='4096'", "int"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers=True", "int"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings=1", "bool"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0 must be positive"]),
        ({"architectures": "LlamaForCausalLM"}, ["must be a list: ['LlamaForCausalLM']"]),
        ({"hidden_size": 18}, ["hidden_size=18", "num_attention_heads=4"]),
        ({"num_key_value_heads": 3}, ["heads=4", "kv_heads=3"]),
        ({"torch_dtype": "int8"}, ["dtype='int8'", "bfloat16"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, ["rope_type='longrope'", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["'linear'", "'factor'"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor='2'"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor=0.5"]),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}, ["beta_fast=3"]),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, ["disagree"]),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 5}}, ["low_freq_factor=5"]),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, ["flat object"]),
        ({"rope_theta": "big"}, ["rope_theta='big'"]),
        ({"rope_parameters": {"rope_theta": 5e5}}, ["rope_theta=10000.0", "500000.0", "disagree"]),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2},
                "rope_scaling": {"type": "linear", "factor": 4},
            },
            ["'factor': 2", "'factor': 4", "disagree"],
        ),
    ],
)
def test_what_cannot_be_honoured_is_rejected_by_name(change, words):
    """Red when the attribute moves to the list of what is carried, or its check is deleted."""
    message = rejected(change)
    for word in words:
        assert word in message


def test_all_problems_at_once():
    """Red when the first problem is raised alone."""
    message = rejected({"attention_dropout": 0.5, "nope": 1, "rope_scaling": {"type": "su"}})
    for word in ("attention_dropout=0.5", "nope=1", "'su'"):
        assert word in message


@pytest.mark.parametrize(
    ("scaling", "rope", "positions"),
    [
        (None, RopeConfig(theta=5e5), 64),
        ({"type": "linear", "factor": 4}, RopeConfig(theta=5e5, kind="linear", factor=4), 64),
        (
            {"type": "dynamic", "factor": 2.5},
            RopeConfig(theta=5e5, kind="dynamic", factor=2.5, original_max_positions=64),
            160,
        ),
        (
            LLAMA3,
            RopeConfig(
                theta=5e5,
                kind="llama3",
                factor=8,
                original_max_positions=16,
                low_freq_factor=1,
                high_freq_factor=4,
            ),
            64,
        ),
        (
            YARN,
            RopeConfig(
                theta=5e5,
                kind="yarn",
                factor=4,
                original_max_positions=16,
                beta_fast=20,
                beta_slow=2,
                attention_factor=1.2,
                mscale=0.7,
                mscale_all_dim=1.4,
                truncate=False,
            ),
            64,
        ),
        # What transformers does with an absent length or factor.
        (
            {"rope_type": "yarn", "factor": 2.0},
            RopeConfig(theta=5e5, kind="yarn", factor=2, original_max_positions=64),
            64,
        ),
        (
            {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
            RopeConfig(theta=5e5, kind="yarn", factor=4, original_max_positions=16),
            64,
        ),
    ],
)
def test_both_spellings_of_rope_mean_the_same(scaling, rope, positions):
    """Red when one spelling ignores a parameter, e.g. reads rope_theta from the top level only."""
    v4 = BASE | {"rope_theta": 5e5, "rope_scaling": scaling}
    v5 = {k: v for k, v in BASE.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    parameters = dict(scaling or {"rope_type": "default"})
    parameters["rope_type"] = parameters.pop("type", None) or parameters["rope_type"]
    v5 |= {"rope_parameters": parameters | {"rope_theta": 5e5}, "dtype": "float32"}
    for source in (v4, v5):
        config = config_from_hf(source)
        assert config.rope == rope
        assert config.max_positions == positions
        # Written anew (no source to copy from) it still says the same.
        again = config_from_hf(config_to_hf(config, dtype="float32"))
        assert again == config
        # With its source it comes back word for word.
        assert config_to_hf(config, source) == source


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_key_value_heads": None, "head_dim": 8},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu", "rms_norm_eps": 0.1},
        {"torch_dtype": "bfloat16"},
    ],
)
def test_written_anew_is_the_same_model(change):
    """Red when config_to_hf forgets a field."""
    config = config_from_hf(BASE | change)
    written = config_to_hf(config, dtype=config.param_dtype)
    assert config_from_hf(written) == config
    assert written["dtype"] == written["torch_dtype"] == config.param_dtype


def test_transformers_reads_what_is_written_anew():
    """Red when rope_scaling is written under a name that transformers does not read."""
    transformers = pytest.importorskip("transformers", reason="reads the config (extra: test)")
    config = config_from_hf(BASE | {"rope_theta": 5e5, "rope_scaling": YARN, "head_dim": 8})
    theirs = transformers.LlamaConfig(**config_to_hf(config, dtype="bfloat16"))
    assert theirs.rope_parameters == YARN | {"rope_theta": 5e5}
    assert theirs.head_dim == 8 and str(theirs.dtype) == "torch.bfloat16"
    assert theirs.num_key_value_heads == 2


def test_a_changed_model_keeps_what_is_carried():
    """Red when a stale config.json is written for a model whose vocabulary has grown."""
    grown = dataclasses.replace(MODEL, vocab_size=105)
    written = config_to_hf(grown, BASE)
    assert written["vocab_size"] == 105
    assert written["eos_token_id"] == [2, 7] and written["transformers_version"] == "4.31.0"
    assert same_model(config_from_hf(written), grown)


def test_only_the_dtype_changes_when_only_the_dtype_changes():
    """Red when a cast rewrites the rest of config.json or states the old dtype."""
    assert config_to_hf(MODEL, BASE, "bfloat16") == BASE | {"torch_dtype": "bfloat16"}


def test_what_transformers_cannot_hold_is_not_written():
    """Red when embed % heads is not checked: transformers would refuse the directory."""
    config = dataclasses.replace(MODEL, heads=6, kv_heads=2)
    with pytest.raises(ConversionError, match=r"embed=16 .* heads=6"):
        config_to_hf(config)


def test_the_error_is_a_value_error_with_problems():
    """Red when ConversionError loses its list."""
    error = ConversionError(["a", "b"])
    assert isinstance(error, ValueError) and error.problems == ["a", "b"] and str(error) == "a\nb"
    assert issubclass(ConfigError, ValueError)
