"""`lemur data`: flags to calls. Nothing heavy is imported before a step runs (see cli.py)."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from lemur_jax.errors import UsageError


def add(
    command: Callable[..., argparse.ArgumentParser],
    gin: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Adds `lemur data STEP` for every step.

    Args:
      command: cli's: (name, run, summary, into) -> parser of a command.
      gin: adds --gin_file to one.
    """
    data = command("data", None, "collect, tokenise, pack and inspect training data")
    steps = data.add_subparsers(title="steps", metavar="STEP", required=True)
    corpus = command("corpus", _data_corpus, "collect the demo corpus of this machine", steps)
    corpus.add_argument("out", metavar="DIR")
    corpus.add_argument("--seed", type=int, default=0)
    tokenizer = command("tokenizer", _data_tokenizer, "train a SentencePiece tokenizer", steps)
    tokenizer.add_argument("files", nargs="+", metavar="F.jsonl")
    tokenizer.add_argument("--out", required=True, metavar="DIR")
    tokenizer.add_argument("--vocab_size", type=int, default=8192)
    build = command("build", _data_build, "tokenise and pack a mixture into rows", steps)
    gin(build)
    inspect = command("inspect", _data_inspect, "show packed rows: documents and masks", steps)
    inspect.add_argument("path", metavar="DIR", help="of `lemur data build`")
    inspect.add_argument("--source", help="default: each of them")
    inspect.add_argument("--split", default="train")
    inspect.add_argument("--rows", type=int, default=2)


def _data_corpus(options: argparse.Namespace, _: list[str]) -> int:
    from lemur_jax.data import corpus

    _check_new("DIR", options.out)
    corpus.collect(Path(options.out), seed=options.seed)
    return 0


def _data_tokenizer(options: argparse.Namespace, _: list[str]) -> int:
    from lemur_jax.data import files, tokenizer_files

    _check_new("--out", options.out)
    texts = files.texts(options.files)
    tokenizer_files.train(texts, options.out, vocab_size=options.vocab_size)
    print(f"wrote {options.out}")
    return 0


def _check_new(flag: str, directory: str) -> None:
    """Data sets and runs point at what lies there: it is never replaced in passing."""
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{flag}={directory} exists: remove it, or give a new directory")


def _data_build(options: argparse.Namespace, bindings: list[str]) -> int:
    from lemur_jax import settings
    from lemur_jax.data import build
    from lemur_jax.data.sources import SourceConfig

    classes = [build.BuildConfig, SourceConfig]
    config, _ = settings.load(build.BuildConfig, options.gin_file, bindings, classes)
    if build.existing(config) is None:
        # TensorFlow's import takes its time: only now that everything else is known to be well.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it greets on stderr otherwise
        from lemur_jax.data import tasks

        tasks.register_mixture(config.mixture, config.sources, config.tokenizer, config.seed)
        config = dataclasses.replace(config, sources=tasks.sources_of(config.mixture))
    build.build(config)
    return 0


def _data_inspect(options: argparse.Namespace, _: list[str]) -> int:
    from lemur_jax.data import inspect

    sources = None if options.source is None else [options.source]
    inspect.inspect(options.path, options.split, range(options.rows), sources)
    return 0
