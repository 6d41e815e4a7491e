"""One small real corpus, tokenizer and data set for the whole folder: about 10 s, once."""

import json

import pytest
from rich.console import Console

from lemur_jax.data.build import BuildConfig, build
from lemur_jax.data.corpus import collect
from lemur_jax.data.sources import corpus_sources, training_texts
from lemur_jax.data.tokenizer_files import train

SEQUENCE_LENGTH = 128


@pytest.fixture(scope="session")
def quiet():
    return Console(quiet=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, quiet):
    directory = tmp_path_factory.mktemp("corpus") / "corpus"
    limits = {"code": 4_000_000, "text": 800_000}
    collect(directory, max_bytes_per_source=limits, validation_fraction=0.1, console=quiet)
    return directory


@pytest.fixture(scope="session")
def records(corpus):
    """{"code": [record, ...], "text": [...]} of the corpus, in file order."""
    return {
        name: [
            json.loads(line) for line in (corpus / f"{name}.jsonl").read_text().split("\n") if line
        ]
        for name in ("code", "text")
    }


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, corpus):
    texts = training_texts(corpus_sources(corpus))
    directory = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return train(texts, directory, vocab_size=2048, max_bytes=2_000_000)


@pytest.fixture(scope="session")
def build_config(tmp_path_factory, corpus, tokenizer):
    return BuildConfig(
        path=str(tmp_path_factory.mktemp("data") / "data"),
        sources=corpus_sources(corpus),
        tokenizer=str(tokenizer.directory),
        sequence_length=SEQUENCE_LENGTH,
        mixture="lemur_demo",
    )


@pytest.fixture(scope="session")
def data_dir(build_config, quiet):
    build(build_config, quiet)
    return build_config.path
