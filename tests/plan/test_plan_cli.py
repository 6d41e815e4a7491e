"""`lemur plan` as a command: what it prints, writes and refuses."""

import json

import pytest

from lemur_jax import cli
from lemur_jax.plan import libtpu, programs
from lemur_jax.train import ahead

needs_libtpu = pytest.mark.skipif(libtpu.missing() is not None, reason=str(libtpu.missing()))

RECIPE = """
include 'models/tiny.gin'
DATA = %gin.REQUIRED
RUN = %gin.REQUIRED
ModelConfig.attention = 'chunked'
ModelConfig.remat = 'named'
ModelConfig.remat_saved = ('kv', 'attention', 'mlp_residual')
DataConfig.path = %DATA
DataConfig.batch_size = 16
DataConfig.sequence_length = 128
LossConfig.implementation = 'chunked'
OptimizerConfig.peak_learning_rate = 1e-3
TrainConfig.steps = 86400
TrainConfig.run_dir = %RUN
"""


@pytest.fixture
def recipe(tmp_path) -> list[str]:
    """The command's first words: a recipe whose paths nobody has set."""
    (tmp_path / "recipe.gin").write_text(RECIPE)
    return ["plan", f"--gin_file={tmp_path / 'recipe.gin'}", f"--cache={tmp_path / 'cache'}"]


@needs_libtpu
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v4-500"], "nearest first: v4-512, v4-384"),
        ([], "--topology"),
        (["--topology=v4-8", "--program=trane"], "--program='trane' is unknown; legal: train, ev"),
        (["--topology=v4-8", "--program=decode", "--rows=6"], "--rows=6 must divide by MeshConfig"),
        (["--topology=v4-8", "--rows=0"], "--rows=0 must be a positive integer"),
        (["--topology=v4-128"], "rows of a micro-batch"),
        (["--topology=v4-8", "--gin.ModelConfig.embd=3"], "did you mean 'embed'?"),
        (["--topology=v4-8", "--gin.MeshConfig.tensor=3"], "MeshConfig"),
    ],
    ids=str,
)
def test_bad_input(capsys, recipe, flags, message):
    """Red if any of these reached the compiler, or came as a traceback."""
    assert cli.main([*recipe, *flags]) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_without_the_compiler_it_says_how_to_install_it(capsys, recipe, monkeypatch):
    """Red if the command looked at anything before it looked for libtpu."""
    monkeypatch.setattr(libtpu, "_version", {"libtpu": None, "jax": libtpu.JAX}.get)
    assert cli.main([*recipe, "--topology=v4-8"]) == cli.EXIT_BAD_INPUT
    assert "Python 3.11: pip install -e '.[tpu]'" in capsys.readouterr().err


@needs_libtpu
def test_a_page_figures_and_executables(capsys, recipe, tmp_path):
    """Red if an owner, a collective or a corner were missing from page or JSON, or what --save
    wrote were not what train --compiled compares."""
    flags = [f"--json={tmp_path / 'plan.json'}", f"--save={tmp_path / 'saved'}"]
    assert cli.main([*recipe, "--topology=v4-8", "--program=train,evaluate", *flags]) == 0
    page = capsys.readouterr().out
    for words in (
        "v4-8: 4 chips (2x2x1 mesh), 4 JAX devices of 30.75 GiB HBM",
        "train: fits (the compiler's verdict)",
        "evaluate: fits (the compiler's verdict)",
        "parameters",
        "arguments + temp of memory_analysis()",
        "moments (mu)",
        "all-gather",
        "of the model's",
        "s a step, torus axes 1: hidden, exposed",
        "days for 86,400 steps",
        "TrainConfig.micro_batches",
        "compiler-predicted",
        "asynchronous collectives overlap perfectly",
    ):
        assert words in page, words
    train, evaluate = json.loads((tmp_path / "plan.json").read_text())
    assert (train["program"], evaluate["program"]) == ("train", "evaluate")
    assert train["fits"] and train["mesh"]["fsdp"] == 4 and train["tokens"] == 16 * 128
    hbm = train["hbm_bytes"]
    assert hbm["attributed"] >= 0.95 and hbm["needed"] + hbm["spare"] == hbm["usable"]
    assert sum(hbm["owners"].values()) + hbm["code"] == hbm["needed"]
    assert train["days"]["best"] == pytest.approx(train["seconds"]["best"])  # 86,400 steps
    assert train["seconds"]["best"] == train["seconds"]["corners"]["3 hidden"]
    assert {"opcode", "axes", "asynchronous", "payload_bytes"} <= train["collectives"][0].keys()
    assert evaluate["flops"]["model"] == pytest.approx(train["flops"]["model"] / 3)

    meta = json.loads((tmp_path / "saved" / "train" / ahead.META).read_text())
    assert meta["devices"]["kind"] == "TPU v4" and meta["mesh"]["fsdp"] == 4
    assert meta["versions"]["libtpu"] == libtpu.VERSION
    assert (tmp_path / "saved" / "evaluate" / ahead.EXECUTABLE).stat().st_size > 1000
    # this machine is no v4-8: the pod's comparison, in words
    own = json.loads(json.dumps(meta)) | {"devices": {"kind": "cpu", "count": 4, "order": "x"}}
    with pytest.raises(ahead.CompiledError, match="devices.kind: saved 'TPU v4', here 'cpu'"):
        ahead.load(tmp_path / "saved" / "train", own)

    assert cli.main([*recipe, "--topology=v4-8", *flags]) == cli.EXIT_BAD_INPUT
    assert "is not empty: give a new directory" in capsys.readouterr().err
    assert cli.main([*recipe, "--topology=v4-8"]) == 0
    assert "(kept from before)" in capsys.readouterr().out


@needs_libtpu
def test_what_does_not_fit_is_told_by_how_much_and_what_would(
    capsys, recipe, tmp_path, monkeypatch
):
    """Red if a refusal ended as an error, or the change that fits were not compiled."""

    def compile_program(config, where, name, serving, dump):
        assert config.micro_batches < 4
        raise programs.CompileRefused(name, where, "Used 40.00G of 30.75G hbm.")

    monkeypatch.setattr(programs, "compile_program", compile_program)
    flags = ["--topology=v4-8", "--gin.TrainConfig.micro_batches=2", "--gin.MeshConfig.fsdp=4"]
    json_file = f"--json={tmp_path / 'plan.json'}"
    more = ["--gin.DataConfig.batch_size=8", json_file]  # one row a device: no more micro-batches
    assert cli.main([*recipe, *flags, *more]) == cli.EXIT_DOES_NOT_FIT
    page = capsys.readouterr().out
    assert (
        "train: does not fit: needs 40.00 GiB of HBM, 30.75 are usable: 9.25 GiB too much" in page
    )
    assert "with ModelConfig.remat='full': needs 40.00 GiB" in page
    assert "No change that was tried fits" in page
    result = json.loads((tmp_path / "plan.json").read_text())[0]
    assert result["fits"] is False and result["fix"] is None
    assert result["needed_bytes"] - result["usable_bytes"] == int(9.25 * 2**30)


@needs_libtpu
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--program="], "--program is empty: name some of train, evaluate, prefill, decode"),
        (["--program=train,decode", "--save=x"], "--save keeps train and evaluate only"),
        (["--json=no/such/place.json"], "must be a file in an existing directory"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(capsys, recipe, flags, message):
    """Red if an empty list of programs "fits", or a flag is dropped without a word."""
    assert cli.main([*recipe, "--topology=v4-8", *flags]) == cli.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
