"""Gin files to configs: precedence, and every kind of mistake named with its place."""

from pathlib import Path

import pytest

from lemur_jax import config, settings

CLASSES = [
    config.RopeConfig,
    config.ModelConfig,
    config.MeshConfig,
    config.DataConfig,
    config.OptimizerConfig,
    config.LossConfig,
    config.CheckpointConfig,
    config.EvaluationConfig,
    config.TrainConfig,
]
RUN = """
include 'models/tiny.gin'
RUN = %gin.REQUIRED
TrainConfig.run_dir = %RUN
TrainConfig.steps = 10
DataConfig.path = 'data'
DataConfig.batch_size = 8
DataConfig.sequence_length = 64
OptimizerConfig.peak_learning_rate = 1e-3
"""


@pytest.fixture
def run_file(tmp_path) -> str:
    (tmp_path / "run.gin").write_text(RUN)
    return str(tmp_path / "run.gin")


def load(files, *bindings):
    return settings.load(config.TrainConfig, files, bindings, CLASSES)


def problems(files, *bindings) -> list[str]:
    with pytest.raises(config.ConfigError) as error:
        load(files, *bindings)
    return error.value.problems


def test_later_files_and_bindings_win(run_file, tmp_path):
    """Red if settings.load parses bindings before files."""
    (tmp_path / "later.gin").write_text("TrainConfig.steps = 20\nModelConfig.layers = 3\n")
    files = [run_file, str(tmp_path / "later.gin")]
    run, _ = load(files, 'RUN="r"', "ModelConfig.layers=4")
    assert (run.steps, run.model.layers, run.run_dir) == (20, 4, "r")
    assert run.model.embed == 64  # from the included file


def test_operative_config_rebuilds_the_same_config(run_file, tmp_path):
    """Red if _structure's references are dropped from the operative text."""
    run, text = load([run_file], 'RUN="r"', 'OptimizerConfig.schedule="constant"')
    (tmp_path / "operative.gin").write_text(text)
    again, _ = load([str(tmp_path / "operative.gin")])
    assert again == run


def test_nothing_leaks_between_loads(run_file):
    """Red if gin.clear_config is not called after a load."""
    load([run_file], 'RUN="r"', "TrainConfig.steps=99")
    run, _ = load([run_file], 'RUN="r"')
    assert run.steps == 10


def test_all_problems_at_once_with_places(run_file, tmp_path):
    """Red if _Reading stops at the first problem, or drops the line number."""
    (tmp_path / "bad.gin").write_text(
        "# a comment\nModelConfg.embed = 3\nModelConfig.embd = 3\nOptimizerConfig.b1 = 'x'\n"
    )
    found = problems([run_file, str(tmp_path / "bad.gin")], "STEPS=3")
    text = "\n".join(found)
    assert "bad.gin:2: unknown config 'ModelConfg'; did you mean 'ModelConfig'?" in text
    assert "bad.gin:3: ModelConfig has no field 'embd'; did you mean 'embed'?" in text
    assert "bad.gin:4: OptimizerConfig.b1 = 'x' must be float, not str" in text
    assert "--gin.STEPS: macro STEPS is set but nothing uses it" in text
    assert "run.gin:3: macro RUN must be set: --gin.RUN=VALUE" in text
    assert len(found) == 5


def test_values_of_several_configs_are_reported_together(run_file):
    """Red if _check_leaves returns after the first config."""
    found = problems(
        [run_file], 'RUN="r"', "ModelConfig.kv_heads=3", 'OptimizerConfig.name="adamm"'
    )
    text = "\n".join(found)
    assert "heads=4 must divide by kv_heads=3; legal kv_heads: 1, 2, 4" in text
    assert "OptimizerConfig.name='adamm' is unknown; legal: adamw, adafactor" in text


def test_missing_fields_and_files(tmp_path):
    """Red if check_required is not called."""
    found = "\n".join(problems([str(tmp_path / "none.gin")]))
    assert "none.gin: no such file" in found
    assert "ModelConfig.vocab_size is required" in found
    assert "TrainConfig.steps is required: set it in a gin file or with --gin.TrainConfig" in found


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("RUN=runs/x", "strings quoted: --gin.RUN='\"runs/x\"'"),
        ("TrainConfig.steps=2.5", "TrainConfig.steps = 2.5 must be int, not float"),
        ("a/TrainConfig.steps=3", "has no effect: nothing refers to @a/TrainConfig()"),
        ("TrainConfig.steps=True", "must be int, not bool"),
    ],
)
def test_bad_bindings(run_file, binding, message):
    """Red if _fits accepts a bool for an int, or scopes are ignored."""
    extra = [] if binding.startswith("RUN") else ['RUN="r"']
    assert message in "\n".join(problems([run_file], binding, *extra))


def test_cross_field_rules(run_file):
    """Red if TrainConfig.__post_init__ no longer compares sequence_length and max_positions."""
    found = "\n".join(
        problems(
            [run_file], 'RUN="r"', "DataConfig.sequence_length=512", "TrainConfig.micro_batches=3"
        )
    )
    assert "sequence_length=512 is longer than ModelConfig.max_positions=256" in found
    assert "batch_size=8 must divide by TrainConfig.micro_batches=3" in found


PARAMETERS = {  # published counts; the configs state them too
    "tinyllama_1.1b": 1_100_048_384,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "codellama_7b": 6_738_546_688,
    "codellama_34b": 33_743_970_304,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "lemur_70b": 68_977_041_408,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(name):
    """Red if any shape of Block or any number of a preset changes."""
    import dataclasses

    from lemur_jax.model import decoder, param

    classes = [config.RopeConfig, config.ModelConfig]
    model, _ = settings.load(config.ModelConfig, [f"models/{name}.gin"], [], classes)
    model = dataclasses.replace(model, vocab_multiple=1)
    assert param.size(decoder.abstract(model)).parameters == PARAMETERS[name]


def test_every_model_preset_loads():
    """Red if a preset misses a field or misspells one."""
    presets = sorted(Path(settings._CONFIGS / "models").glob("*.gin"))
    assert len(presets) >= 12
    for path in presets:
        classes = [config.RopeConfig, config.ModelConfig]
        settings.load(config.ModelConfig, [str(path)], [], classes)


def test_fields_that_the_caller_will_not_look_at(run_file):
    """Red if `unused` fields or their macros were demanded, or a wrong field came through."""
    unused = {"TrainConfig.run_dir": "-"}
    loaded, _ = settings.load(config.TrainConfig, [str(run_file)], [], CLASSES, unused)
    assert loaded.run_dir == "-"
    with pytest.raises(config.ConfigError, match=r"did you mean 'steps'"):
        settings.load(config.TrainConfig, [str(run_file)], ["TrainConfig.step=1"], CLASSES, unused)
