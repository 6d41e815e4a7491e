"""Programs compiled ahead of time: saved, compared, loaded and run, on CPU devices."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lemur_jax import sharding
from lemur_jax.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    TrainConfig,
)
from lemur_jax.data.pipeline import Batch
from lemur_jax.train import ahead, programs
from lemur_jax.train.optimizer import optimizer
from lemur_jax.train.state import random_state

MODEL = ModelConfig(
    vocab_size=128,
    embed=16,
    mlp=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_positions=32,
    rope=RopeConfig(theta=10000.0),
    norm_eps=1e-5,
    dtype="float32",
)
CONFIG = TrainConfig(
    run_dir="unused",
    steps=10,
    model=MODEL,
    data=DataConfig(path="unused", batch_size=8, sequence_length=32),
    optimizer=OptimizerConfig(peak_learning_rate=1e-2),
    mesh=MeshConfig(fsdp=4, tensor=2),
)


def made(**changes):
    """(config, mesh, program, facts) of a step."""
    config = dataclasses.replace(CONFIG, **changes)
    mesh = sharding.make_mesh(config.mesh)
    config = programs.resolve(config, jax.devices()[0])
    program = programs.step(config, mesh)
    return config, mesh, program, ahead.facts("train", config, mesh, program)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ahead") / "train"
    config, mesh, program, facts = made()
    ahead.save(directory, programs.compiled(program, mesh, programs.options(config)), facts)
    return directory


def batch(mesh):
    numbers = np.random.default_rng(0).integers(0, 128, (1, 8, 32)).astype(np.int32)
    ones = np.ones_like(numbers)
    fields = (numbers, numbers, ones.astype(np.float32), ones.cumsum(-1, dtype=np.int32) - 1, ones)
    return Batch(*(sharding.place(x, 0, 8, mesh) for x in fields))


def test_a_loaded_step_is_the_compiled_step(saved):
    """Red if load gave back an executable of other arguments, or save dropped the donation."""
    config, mesh, program, facts = made()
    own = programs.compiled(program, mesh)
    loaded = ahead.load(saved, facts)
    losses = []
    for step in (own, loaded):
        state = random_state(config.model, optimizer(config.optimizer), mesh, seed=1)
        for _ in range(3):
            before = state
            state, metrics = step(state, batch(mesh))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.model))
        losses.append(float(metrics.loss))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"mesh": MeshConfig(fsdp=2, tensor=4)}, "mesh.fsdp: saved 4, here 2"),
        ({"steps": 20}, "config.steps: saved 10, here 20"),
        (
            {"model": dataclasses.replace(MODEL, layers=3)},
            "config.model.layers: saved 2, here 3",
        ),
        (
            {"model": dataclasses.replace(MODEL, layers=3)},
            "arguments.0/model/layers/wq: saved \"float32[2, 16, 4, 8] over P(None, ('fsdp_o",
        ),
        (
            {"optimizer": OptimizerConfig(peak_learning_rate=2e-2)},
            "config.optimizer.peak_learning_rate: saved 0.01, here 0.02",
        ),
        (
            {"compiler_options": ("xla_cpu_enable_fast_math=False",)},
            "options.xla_cpu_enable_fast_math: saved absent, here 'False'",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_every_difference_is_named(saved, changes, line):
    """Red if facts left out mesh, schedule, model, shapes, optimizer or options."""
    facts = made(**changes)[-1]
    saved_facts = json.loads((saved / ahead.META).read_text())
    assert any(line in found for found in ahead.differences(saved_facts, facts))
    with pytest.raises(ahead.CompiledError, match="compiled for something else"):
        ahead.load(saved, facts)


def test_paths_and_seeds_are_no_difference(saved):
    """Red if facts took in run_dir or the data's path: they differ between plan and pod."""
    data = DataConfig(path="elsewhere", batch_size=8, sequence_length=32, seed=3)
    ahead.load(saved, made(run_dir="other", data=data, seed=5, steps_per_log=1)[-1])


def test_another_version_and_other_code(saved, monkeypatch):
    """Red if versions or the sources' digest were not compared."""
    monkeypatch.setattr(ahead, "versions", lambda: {"jax": "0.0.1"})
    monkeypatch.setattr(ahead, "code_fingerprint", lambda: "another")
    with pytest.raises(ahead.CompiledError, match=r"versions.jax: saved '0[^']*', here '0.0.1'"):
        ahead.load(saved, made()[-1])
    with pytest.raises(ahead.CompiledError, match=r"code: saved '[0-9a-f]{16}', here 'another'"):
        ahead.load(saved, made()[-1])


def test_damage_and_absence(saved, tmp_path):
    """Red if load trusted the bytes, or an empty directory raised FileNotFoundError."""
    with pytest.raises(ahead.CompiledError, match="holds no meta.json"):
        ahead.load(tmp_path, made()[-1])
    for name in (ahead.META, ahead.TREES, ahead.EXECUTABLE):
        content = (saved / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1] + b"\0" if name == ahead.TREES else content)
    with pytest.raises(ahead.CompiledError, match=r"trees.bin is damaged"):
        ahead.load(tmp_path, made()[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("xla_cpu_enable_fast_mth=True",), "did you mean xla_cpu_enable_fast_math?"),
        (("xla_cpu_enable_fast_math=banana",), "xla_cpu_enable_fast_math=banana: .*valid"),
    ],
    ids=str,
)
def test_options_that_the_compiler_rejects(options, message):
    """Red if the compiler's INVALID_ARGUMENT came through as it is."""
    config, mesh, program, _ = made(compiler_options=options)
    with pytest.raises(ConfigError, match=message):
        programs.compiled(program, mesh, programs.options(config))


def test_options_are_name_value_pairs():
    """Red if TrainConfig did not look at compiler_options."""
    for bad in (("xla_foo",), ("=1",), ("a=1", "a=2")):
        with pytest.raises(ConfigError, match="compiler_options"):
            dataclasses.replace(CONFIG, compiler_options=bad)
