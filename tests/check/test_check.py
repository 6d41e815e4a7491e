"""`lemur check` on a sound run passes; each injected fault is caught, and by its own check."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from check_runs import Changed, make_config

from lemur_jax import checkpoint
from lemur_jax.check import accumulation, certificate, ids, isolation, masks, stop
from lemur_jax.check.evidence import collect
from lemur_jax.check.subject import subject
from lemur_jax.cli import main
from lemur_jax.config import ConfigError, LoraConfig, MeshConfig
from lemur_jax.data.pipeline import Pipeline
from lemur_jax.data.tokenizer import Tokenizer
from lemur_jax.model import param
from lemur_jax.model.decoder import Decoder
from lemur_jax.train import step as training


def evidence_of(pipeline, rows=64):
    return collect(pipeline, Tokenizer.load(pipeline.tokenizer_dir), 16, rows)


@pytest.fixture(scope="module")
def evidence(pipeline):
    return evidence_of(pipeline)


@pytest.fixture(scope="module")
def small(run_config):
    """The run on one device and with one layer, which compile fast, and its weights."""
    found = subject(dataclasses.replace(run_config, mesh=MeshConfig(fsdp=256)), 1)
    return found, found.weights()


def write_model(directory, config, copied=()):
    """A checkpoint of random weights; `copied`: head rows and which rows they shall equal."""
    flat = param.flatten(Decoder(config, jax.random.key(0)))
    for row, other in dict(copied).items():
        flat["head"] = flat["head"].at[:, row].set(flat["head"][:, other])
    writer = checkpoint.CheckpointWriter(
        directory / "checkpoints", keep_latest=1, keep_every_steps=None, report=print
    )
    about = {"kind": "params", "model": dataclasses.asdict(config)}
    writer.save(0, {"params": {f"params/{n}": w for n, w in flat.items()}}, about=about)
    writer.close()
    return directory


def one_segment(batch):
    """The fault: all documents of a row are one."""
    positions = np.broadcast_to(np.arange(64, dtype=np.int32), batch.positions.shape)
    ones = np.ones_like(batch.segment_ids)
    return batch._replace(segment_ids=ones, positions=positions, weights=ones.astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": LoraConfig(rank=2), "init_from": None, "micro_batches": 1},
        {"mesh": MeshConfig(fsdp=2, fsdp_outer=2, sequence=2), "explicit_gradients": True},
    ],
    ids=["fsdp and tensor", "lora", "explicit and sequence"],
)
def test_a_sound_run_passes(pipeline, run_config, results, changes, tmp_path):
    """Red if any check cried wolf (e.g. `masks` without the part of a document in the next row)."""
    if "lora" in changes:
        changes |= {"init_from": str(write_model(tmp_path, run_config.model))}
    found = results(pipeline, dataclasses.replace(run_config, **changes))
    assert {name: r.status for name, r in found.items()} == dict.fromkeys(
        ("masks", "ids", "stop", "isolation", "accumulation"), "passed"
    ), found
    assert found["isolation"].figures["documents"] > 2
    assert found["ids"].figures["parts"] > 20
    shares = found["accumulation"].figures["learnt tokens of each"]
    assert shares[0] < shares[1] / 4


def test_segment_ids_all_one_are_caught_twice(pipeline, small):
    """Red if documents were told apart by the segment ids that are to be judged."""
    wrong = evidence_of(Changed(pipeline, one_segment))
    said = masks.check_masks(wrong)
    assert said.status == "failed" and "begin inside of another's segment" in said.fixes[0]
    leak = isolation.check_isolation(wrong, *small)
    assert leak.status == "failed"
    assert leak.figures["largest change of another document's logits"] > 1e-3
    assert leak.figures["largest change of the gradient of another document's loss"] > 1e-4


def test_attention_that_leaks_is_caught(evidence, small, monkeypatch):
    """Red if isolation were judged by the ids alone, without the model."""
    from lemur_jax.model import attention

    whole = attention.attention

    def leaking(*args, q_segments_BT, kv_segments_BS, **rest):
        ones = q_segments_BT * 0 + 1
        return whole(*args, q_segments_BT=ones, kv_segments_BS=ones, **rest)

    monkeypatch.setattr(attention, "attention", leaking)
    assert isolation.check_isolation(evidence, *small).status == "failed"


def test_compat_packing_is_noted_and_not_failed(pipeline, small):
    """Red if lemur_compat were judged as segmented, or passed without documents that mix."""
    chat = {"format": "llama2", "packing": "lemur_compat"}
    mixed = evidence_of(Changed(pipeline, one_segment, chat=chat))
    documents = np.where(mixed.batch.inputs == mixed.tokenizer.bos_id, 1, 0).sum()
    assert documents
    mixed = dataclasses.replace(mixed, chat_format="chatml")  # a BOS begins a document
    found = isolation.check_isolation(mixed, *small)
    assert found.status == "noted" and "lemur_compat" in found.summary
    apart = dataclasses.replace(evidence_of(pipeline), packing="lemur_compat")
    assert isolation.check_isolation(apart, *small).status == "failed"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b._replace(weights=np.ones_like(b.weights)), "of another document"),
        (lambda b: b._replace(weights=b.weights * (np.arange(64) % 2)), "have no weight"),
        (lambda b: b._replace(weights=b.weights * 2), "neither 0 nor 1"),
        (lambda b: b._replace(targets=b.inputs), "not the next input"),
        (
            lambda b: b._replace(
                segment_ids=b.segment_ids * (np.arange(64) < 60),
            ),
            "padding tokens have a weight",
        ),
    ],
)
def test_faults_of_masks(pipeline, change, said):
    """Red if the rule of the problem that is named were left out of check_masks."""
    found = masks.check_masks(evidence_of(Changed(pipeline, change)))
    assert found.status == "failed" and said in " ".join(found.fixes)


def test_ids_of_another_tokenizer_are_caught(pipeline):
    """Red if ids were compared with our own encoder's cut, or only whole documents were judged."""
    order = np.arange(512)
    order[3:] = np.random.default_rng(0).permutation(np.arange(3, 512))

    def other(batch):
        return batch._replace(inputs=order[batch.inputs], targets=order[batch.targets])

    found = ids.check_ids(evidence_of(Changed(pipeline, other)), 512)
    assert found.status == "failed" and "another tokenizer" in found.fixes[0]
    assert ids.check_ids(evidence_of(pipeline), 512).status == "passed"


def test_a_vocabulary_without_the_specials_is_caught(evidence):
    """Red if an id beyond the model's rows were looked up all the same."""
    assert any("no such row" in fix for fix in ids.check_ids(evidence, 2).fixes)


def test_a_stop_token_that_is_masked_is_caught(pipeline, run_config):
    """Red if the stop token were counted without its weight."""

    def masked(batch):
        return batch._replace(weights=np.where(batch.targets == 2, 0, batch.weights))

    found = stop.check_stop(evidence_of(Changed(pipeline, masked)), run_config)
    assert found.status == "failed" and "never has a weight" in found.fixes[0]

    def without(batch):
        return batch._replace(targets=np.where(batch.targets == 2, 5, batch.targets))

    found = stop.check_stop(evidence_of(Changed(pipeline, without)), run_config)
    assert "is no target" in found.fixes[0]


def test_a_loss_averaged_per_micro_batch_is_caught(evidence, small, monkeypatch):
    """Red if the micro-batches that are compared had equal weights."""
    right = training.gradients

    def averaged(model, batch, config, adapters=None):
        parts = [
            right(model, jax.tree.map(lambda x, m=m: x[m : m + 1], batch), config, adapters)
            for m in range(batch.inputs.shape[0])
        ]
        count = len(parts)
        tokens = sum(sums.tokens for sums, _ in parts)

        def mean(*values):
            return (
                sum(v / sums.tokens for v, (sums, _) in zip(values, parts, strict=True))
                / count
                * tokens
            )

        sums = jax.tree.map(mean, *(sums for sums, _ in parts))._replace(tokens=tokens)
        return sums, jax.tree.map(mean, *(grads for _, grads in parts))

    monkeypatch.setattr(training, "gradients", averaged)
    found = accumulation.check_accumulation(evidence, *small)
    assert found.status == "failed"
    assert found.figures["largest relative difference of a gradient"] > 0.05


def test_less_than_the_run_is_said(run_config):
    """Red if a smaller model or another mesh were certified as the run's own."""
    found = subject(dataclasses.replace(run_config, mesh=MeshConfig(fsdp=256)), 1)
    assert found.config.model.layers == 1 and found.mesh.size == 1
    assert "one device in place of the run's mesh" in found.reduced[0]
    assert "1 of 2 layers" in found.reduced[1]
    with pytest.raises(ConfigError, match="--layers=3: the model has 2"):
        subject(run_config, 3)


def test_lora_on_a_head_that_cannot_tell_the_stop_token(evidence, run_config, tmp_path):
    """Red if equal frozen rows of the head were let through: equal rows have equal logits."""
    write_model(tmp_path, run_config.model, {2: 7})
    config = dataclasses.replace(run_config, init_from=str(tmp_path), lora=LoraConfig(rank=2))
    found = stop.check_stop(evidence, config)
    assert found.status == "failed" and "equal to those of [7]" in found.fixes[0]
    assert stop.check_stop(evidence, dataclasses.replace(config, lora=None)).status == "passed"


def gin(config) -> list[str]:
    """The flags of a run, as a user gives them."""
    model, data = config.model, config.data
    values = {f"ModelConfig.{f}": getattr(model, f) for f in (
        "vocab_size", "embed", "mlp", "layers", "heads", "kv_heads", "head_dim", "max_positions",
        "norm_eps", "dtype",
    )}  # fmt: skip
    values |= {
        "RopeConfig.theta": 1e4,
        "DataConfig.path": data.path,
        "DataConfig.batch_size": data.batch_size,
        "DataConfig.sequence_length": data.sequence_length,
        "OptimizerConfig.peak_learning_rate": 1e-3,
        "TrainConfig.steps": config.steps,
        "TrainConfig.run_dir": config.run_dir,
        "MeshConfig.fsdp": 8,
    }
    return [f"--gin.{name}={value!r}" for name, value in values.items()]


def test_a_certificate_is_of_one_config_and_data(tmp_path):
    """Red if the fingerprint left out the manifest or the config, or damage were an exception."""
    manifest = {"digest": "a"}
    mark = certificate.fingerprint("text", manifest)
    result = certificate.judge("masks", "wrong", {}, ["mend it"])
    made = certificate.Certificate(mark, {"model": "m"}, ("one layer",), (result,))
    assert not made.passed
    text = made.write(tmp_path / "run").read_text()
    assert "FAILED: masks" in text and "to do: mend it" in text and "one layer" in text
    found = functools.partial(certificate.found_for, tmp_path / "run")
    assert found("text", manifest) == "certificate of this config and data: FAILED: masks"
    for other in (("text 2", manifest), ("text", {"digest": "b"})):
        assert "another config or data" in found(*other)
    (tmp_path / "run" / certificate.JSON).write_text("{")
    assert "cannot be read" in found("text", manifest)
    assert "none" in certificate.found_for(tmp_path, "text", manifest)


def test_what_the_command_refuses(tiny_data, tmp_path, capsys):
    """Red if the data set or --rows were looked at late, with a traceback."""
    config = make_config(tmp_path / "run", tiny_data)
    for flags, said in (
        ([*gin(config), "--rows=0"], "--rows=0"),
        ([*gin(config), "--gin.DataConfig.path='none'"], "DataConfig.path='none' holds no data"),
        ([*gin(config), "--gin.ModelConfig.vocab_size=100"], "vocab_size=100 is smaller"),
    ):
        assert main(["check", *flags]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_writes_a_certificate_that_train_finds(
    tiny_data, tmp_path, capsys, monkeypatch
):
    """Red if the fingerprint left out the config or the data, or a failed check exited with 0."""
    config = make_config(tmp_path / "run", tiny_data)
    assert main(["check", *gin(config), "--layers=1", "--rows=16"]) == 0
    out = capsys.readouterr().out
    assert "passed isolation" in out and "less than the run: 1 of 2 layers" in out
    content = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert content["passed"] and len(content["results"]) == 5
    assert "## isolation: passed" in (tmp_path / "run" / "certificate.md").read_text()

    from lemur_jax.train import loop

    class Ended(Exception):
        """Raised in place of training."""

    def end(*_):
        raise Ended

    monkeypatch.setattr(loop, "train", end)
    for more, said in (
        ([], "certificate of this config and data: passed"),
        (["--gin.TrainConfig.seed=5"], "is of another config or data"),
    ):
        with pytest.raises(Ended):
            main(["train", *gin(config), *more])
        assert said in capsys.readouterr().out
    (tmp_path / "run" / "certificate.json").unlink()
    with pytest.raises(Ended):
        main(["train", *gin(config)])
    assert "certificate: none" in capsys.readouterr().out

    monkeypatch.setattr(
        Pipeline, "rows", lambda self, *args, rows=Pipeline.rows: one_segment(rows(self, *args))
    )
    assert main(["check", *gin(config), "--layers=1", "--rows=16"]) == 1
    assert certificate.found_for(config.run_dir, "", {}).startswith("certificate: ")
    assert "FAILED: masks" in capsys.readouterr().out
