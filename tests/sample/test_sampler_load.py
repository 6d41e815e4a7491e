"""`Sampler.load`: HF directories and checkpoints, and tokenizers that are not the model's."""

import json
import shutil

import jax
import pytest
from letters import config

from lemur_jax import checkpoint
from lemur_jax.config import ConfigError
from lemur_jax.convert import hf
from lemur_jax.data import tokenizer_files
from lemur_jax.model.decoder import Decoder
from lemur_jax.sample.request import Request
from lemur_jax.sample.sampler import Sampler

VOCAB = 320


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"the cat {n} sat on the mat and was long\n" * 3 for n in range(200)]
    return tokenizer_files.train(texts, tmp_path_factory.mktemp("tok") / "t", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """A run directory with one checkpoint, as training writes it."""
    # HF directories name no kernel, so the run must not either: outputs are compared bit by bit.
    model_config = config(vocab_size=VOCAB, attention="auto")
    return _save(tmp_path_factory.mktemp("run"), tokenizer, tokenizer.fingerprint, model_config)


def _save(directory, tokenizer, fingerprint, model_config):
    import dataclasses

    from lemur_jax.model import param

    model = Decoder(model_config, jax.random.key(1))
    arrays = {f"params/{name}": leaf for name, leaf in param.flatten(model).items()}
    about = {"model": dataclasses.asdict(model_config), "tokenizer_fingerprint": fingerprint}
    files = {f"tokenizer/{path.name}": path.read_bytes() for path in tokenizer.directory.iterdir()}
    with checkpoint.CheckpointWriter(directory / "checkpoints", keep_latest=1) as writer:
        writer.save(3, {"params": arrays}, about=about, files=files)
    return directory


@pytest.fixture(scope="module")
def hf_directory(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "model"
    hf.export_hf(run, out)
    return out


# One token needs prefill alone, which is one program to compile for each sampler.
REQUEST = Request(prompt="the cat", max_new_tokens=1, logprobs=True)


def test_run_checkpoint_and_hf_are_one_model(run, hf_directory):
    """Red if load reads another tokenizer directory, or HF weights are not the checkpoint's."""
    paths = (run, run / "checkpoints" / "3", hf_directory)
    answers = [Sampler.load(str(path), dtype="float32").generate([REQUEST]) for path in paths]
    assert answers[0] == answers[1] == answers[2] and len(answers[0][0].ids) == 1


def test_streaming_real_text_equals_generate(run):
    """Red if the text of a completion is not what continues the prompt's."""
    sampler = Sampler.load(run)
    request = Request(prompt="the cat", max_new_tokens=33, temperature=1.5, seed=1)
    (done,) = sampler.generate([request])
    assert "".join(piece.text for piece in sampler.stream(request)) == done.text
    prompt = sampler.tokenizer.encode("the cat", bos=True)
    assert sampler.tokenizer.decode([*prompt, *done.ids]) == "the cat" + done.text


def test_fingerprint_of_another_tokenizer(tokenizer, tmp_path):
    """Red if the fingerprint in the checkpoint is not compared."""
    run = _save(tmp_path, tokenizer, "f" * 64, config(vocab_size=VOCAB))
    with pytest.raises(ConfigError, match=f"{tokenizer.fingerprint[:16]}.*{'f' * 16}"):
        Sampler.load(run)


def test_model_with_fewer_rows(tokenizer, tmp_path):
    """Red if only the fingerprint is compared: both numbers are named."""
    run = _save(tmp_path, tokenizer, None, config(vocab_size=101))
    with pytest.raises(ConfigError, match="vocab_size=320 is larger.*vocab_size=101"):
        Sampler.load(run)


def test_no_tokenizer(hf_directory, tmp_path):
    """Red if a missing tokenizer is found out only when a text is encoded."""
    shutil.copytree(hf_directory, tmp_path / "m")
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / "m" / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="no tokenizer for the model in"):
        Sampler.load(tmp_path / "m")


def test_every_eos_of_the_generation_config(hf_directory, tmp_path):
    """Red if only the tokenizer's EOS ends a text (Llama 3 names three)."""
    shutil.copytree(hf_directory, tmp_path / "m")
    (done,) = Sampler.load(hf_directory).generate([REQUEST])
    (stop,) = done.ids
    generation = {"eos_token_id": [2, stop]}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(generation))
    sampler = Sampler.load(tmp_path / "m")
    assert sampler.stop_ids == (2, stop)
    (cut,) = sampler.generate([REQUEST])
    assert (cut.ids, cut.stopped_by) == ((), stop)


def test_path_without_a_model(tmp_path):
    """Red if the error of a wrong path does not say what was looked for."""
    with pytest.raises(ValueError, match=r"config\.json"):
        Sampler.load(tmp_path)
