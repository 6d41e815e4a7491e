"""Programs compiled for slices that nobody holds. libtpu compiles; nothing runs."""

import dataclasses

import pytest

from lemur_jax.config import (
    ConfigError,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    TrainConfig,
)
from lemur_jax.plan import cache, fit, libtpu, programs
from lemur_jax.plan.analysis import analyse
from lemur_jax.plan.serving import Serving
from lemur_jax.plan.slices import slice_named

pytestmark = pytest.mark.skipif(libtpu.missing() is not None, reason=str(libtpu.missing()))

MODEL = ModelConfig(
    vocab_size=512,
    embed=1024,
    mlp=2048,
    layers=2,
    heads=64,
    kv_heads=8,
    head_dim=128,
    max_positions=4096,
    rope=RopeConfig(theta=10000.0),
    norm_eps=1e-5,
    remat="full",
)
CONFIG = TrainConfig(
    run_dir="unused",
    steps=100,
    model=MODEL,
    data=DataConfig(path="unused", batch_size=8, sequence_length=4096),
    optimizer=OptimizerConfig(peak_learning_rate=1e-3),
    mesh=MeshConfig(fsdp=4),
    loss=LossConfig(chunk_tokens=4096),
    micro_batches=2,
)


def changed(**changes) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


def test_auto_means_the_target_not_this_machine():
    """Red if resolve asked jax.default_backend(), which is the CPU here."""
    data = dataclasses.replace(CONFIG.data, batch_size=512)
    config = programs.resolve(changed(mesh=MeshConfig(), data=data), slice_named("v4-512"))
    assert config.model.attention == config.loss.implementation == "pallas_tpu"
    assert config.mesh == MeshConfig(data=1, fsdp=256, sequence=1, tensor=1, dcn_data=1)


@pytest.mark.parametrize(
    ("topology", "changes", "message"),
    [
        (
            "v4-16",
            {},
            "fsdp_outer=1 x fsdp=4 .* there are 8 devices: they must multiply to 8",
        ),
        (
            "v4-32",
            {"mesh": MeshConfig()},
            "must divide by MeshConfig .*fsdp_outer.fsdp.dcn_data=16",
        ),
        ("2xv4-8", {"mesh": MeshConfig()}, "2 slice.s.: set MeshConfig.dcn_data=2"),
        (
            "v4-8",
            {"model": dataclasses.replace(MODEL, attention="cudnn")},
            "ModelConfig.attention='cudnn' needs a GPU, the backend is 'tpu'",
        ),
        ("v4-8", {"compiler_options": ("xla_tpu_fo=1",)}, "xla_tpu_fo=1 is not an option"),
    ],
)
def test_bad_input_has_a_name(topology, changes, message):
    """Red if sharding.check, the slices or the options were left to the compiler."""
    with pytest.raises(ConfigError, match=message):
        programs.compile_program(changed(**changes), slice_named(topology))


def test_a_shape_without_a_kernel_is_bad_input():
    """Red if the kernel's ValueError came through as a bug, or a bug as bad input."""
    narrow = dataclasses.replace(MODEL, head_dim=72, attention="pallas_tpu")
    with pytest.raises(ConfigError, match=r"train on v4-8: .*not certified for head_dim=72"):
        programs.compile_program(changed(model=narrow), slice_named("v4-8"))


def test_words_about_memory_are_understood():
    """Red if a unit or one of the two forms were misread."""
    where = slice_named("v4-8")
    total = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (30.91G) exceeds available HBM (30.75G)."
    )
    used = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 31.29G of 30.75G hbm. Exceeded hbm capacity by 553.60M."
    )
    for words, exceeded in ((total, 0.16), (used, 0.54)):
        refused = programs.CompileRefused("train", where, words)
        assert refused.exceeded_bytes / 2**30 == pytest.approx(exceeded, abs=1e-6)
        assert "GiB of HBM, 30.75 are usable" in str(refused)
    other = programs.CompileRefused("train", where, "INTERNAL: no\nmore")
    assert other.exceeded_bytes is None and other.reason() == "INTERNAL: no"


def test_the_train_step_compiles_is_read_and_kept(tmp_path, monkeypatch):
    """Red if arguments were not sharded or not donated, if less than 95 % of the HBM had an owner,
    or if a second question compiled again."""
    where = slice_named("v4-8")
    made = cache.compile_cached(CONFIG, where, directory=tmp_path)
    parameters = (
        2 * 512 * 1024
        + 1024
        + 2 * (2 * 1024 + 2 * 1024 * 64 * 128 + 2 * 1024 * 8 * 128 + 3 * 1024 * 2048)
    )
    state = 3 * 4 * parameters / 4  # float32 weights and two moments, over four devices
    batch = 5 * 4 * 8 * 4096 / 4
    assert made.argument_bytes == pytest.approx(state + batch, rel=0.01)
    assert made.alias_bytes == pytest.approx(state, rel=0.01)
    assert "lemur_attention_forward" in made.hlo and "lemur_cross_entropy" in made.hlo

    found = analyse(made)
    assert found.memory.attributed >= 0.95
    assert found.memory.total + made.code_bytes == found.needed_bytes < where.chip.hbm_bytes
    assert found.needed_bytes == pytest.approx(made.held_bytes, rel=0.25)
    assert found.tokens == 8 * 4096
    assert found.flops.hardware >= found.flops.model > 0
    best, worst = found.interval
    assert 0 < best <= worst
    settings = {k.setting for k in found.knobs}
    assert {"TrainConfig.micro_batches", "ModelConfig.remat_saved, remat_offloaded"} <= settings

    def compile_again(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(programs, "compile_program", compile_again)
    again = cache.compile_cached(changed(run_dir="other"), where, directory=tmp_path)
    assert again.hlo == made.hlo and again.executable is None
    assert analyse(again).memory == found.memory
    for other in ({"micro_batches": 1}, {"compiler_options": ("xla_tpu_rwb_fusion=false",)}):
        with pytest.raises(AssertionError, match="compiled again"):
            cache.compile_cached(changed(**other), where, directory=tmp_path)


def test_a_refusal_is_kept_too(tmp_path, monkeypatch):
    """Red if the cache kept only what fits."""
    words = "RESOURCE_EXHAUSTED: Ran out of memory. Used 2.00G of 1.00G hbm."
    calls = []

    def refuse(config, where, name, serving, dump):
        calls.append(name)
        raise programs.CompileRefused(name, where, words)

    monkeypatch.setattr(programs, "compile_program", refuse)
    for _ in range(2):
        with pytest.raises(programs.CompileRefused, match="needs 2.00 GiB"):
            cache.compile_cached(CONFIG, slice_named("v4-8"), directory=tmp_path)
    assert calls == ["train"]


def _fits_when(condition, said):
    """A compiler that refuses what does not meet the condition."""

    def compile_program(config, where, name, serving):
        config = programs.resolve(config, where)
        if not condition(config, where):
            raise programs.CompileRefused(name, where, "Used 2.00G of 1.00G hbm.")
        said.append(config)
        return config

    return compile_program


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        (lambda c, w: c.loss.chunk_tokens < 4096, "LossConfig.chunk_tokens=1024"),
        (lambda c, w: c.model.remat_saved, "remat_saved=('kv', 'attention', 'mlp_residual')"),
        (lambda c, w: c.micro_batches >= 4, "TrainConfig.micro_batches=4"),
        (lambda c, w: c.mesh.tensor == 2, "MeshConfig.fsdp=2, MeshConfig.tensor=2"),
        (lambda c, w: c.model.remat_offloaded, "('layer_input', 'attention')"),
        (
            lambda c, w: c.micro_batches == 16 and c.model.remat == "full",
            "ModelConfig.remat='full', TrainConfig.micro_batches=16",
        ),
        (lambda c, w: w.devices == 8, "--topology=v4-16, MeshConfig.fsdp=8"),
        (lambda c, w: False, None),
    ],
)
def test_the_smallest_change_that_fits(condition, text):
    """Red if a dearer change were tried before a cheaper one, or a change that does not divide
    ended the search."""
    config = changed(
        model=dataclasses.replace(MODEL, remat="none"),
        data=dataclasses.replace(CONFIG.data, batch_size=64),
    )
    config = programs.resolve(config, slice_named("v4-8"))
    said = []
    tried = []
    found = fit.smallest_fix(
        config,
        slice_named("v4-8"),
        "train",
        None,
        _fits_when(condition, said),
        lambda change, verdict: tried.append((change, verdict)),
    )
    if text is None:
        assert found is None and len(tried) == fit.MOST_COMPILES, tried
    else:
        assert found[0].text.endswith(text) and tried[-1][1] == "fits"
        assert said == [found[1]]


def test_a_step_with_explicit_gradients_is_not_offered_a_tensor_axis():
    """Red if a wider tensor axis, which such a step refuses, ended the changes with an error."""
    config = programs.resolve(changed(explicit_gradients=True), slice_named("v4-8"))
    texts = [change.text for change in fit.changes(config, slice_named("v4-8"), "train", None)]
    assert any("--topology=v4-16" in text for text in texts)
    assert not any("tensor" in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "prefill", "decode"])
def test_the_other_programs_compile(name, tmp_path):
    """Red if the sampler's kernels were chosen for this machine, or the cache were not donated."""
    config = changed(mesh=MeshConfig(fsdp=1, tensor=4))
    config = programs.resolve(config, slice_named("v4-8"))
    serving = Serving(batch=8, prompt=256, cache=512)
    made = cache.compile_cached(config, slice_named("v4-8"), name, serving, tmp_path)
    found = analyse(made, serving)
    assert found.memory.attributed >= 0.95
    assert found.tokens == {"evaluate": 8 * 4096, "prefill": 8 * 256, "decode": 8}[name]
    if name == "decode":
        kv = 2 * 2 * 8 * 512 * 8 * 128 * 2 / 4  # k and v, layers, rows, slots, heads of 128, bf16
        assert found.memory.owners["KV cache"] == pytest.approx(kv, rel=0.02)
        assert made.alias_bytes >= kv


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e-4", "v5p-8", "v6e-4", "v7x-8", "2xv4-8"])
def test_every_generation_and_two_slices(topology, tmp_path):
    """Red if a generation's topology, or the data-centre axis, were wrong."""
    where = slice_named(topology)
    mesh = MeshConfig(dcn_data=where.slices)
    config = changed(
        mesh=mesh,
        model=dataclasses.replace(MODEL, attention="chunked"),  # the kernels take minutes
        loss=LossConfig(implementation="chunked"),
        data=dataclasses.replace(CONFIG.data, batch_size=16, sequence_length=512),
    )
    found = analyse(cache.compile_cached(config, where, directory=tmp_path))
    assert found.memory.attributed >= 0.95
    assert found.compiled.mesh["data"] == where.slices
    assert found.interval[0] > 0
