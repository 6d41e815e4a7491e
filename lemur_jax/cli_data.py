"""`lemur data`: flags to calls. Nothing heavy is imported before a step runs (see cli.py)."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from lemur_jax.errors import UsageError

EXIT_VIOLATION = 1  # of audit


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
    chat = command("chat", _data_chat, "render and pack conversations, with a loss mask", steps)
    gin(chat)
    verify = command("verify", _data_verify, "read a data set again and compare digests", steps)
    verify.add_argument("path", metavar="DIR", help="of `lemur data build`")
    clean = command("clean", _data_clean, "remove duplicates, secrets, contaminated text...", steps)
    gin(clean)
    inspect = command("inspect", _data_inspect, "show packed rows: documents and masks", steps)
    inspect.add_argument("path", metavar="DIR", help="of `lemur data build`")
    inspect.add_argument("--source", help="default: each of them")
    inspect.add_argument("--split", default="train")
    inspect.add_argument("--rows", type=int, default=2)
    inspect.add_argument("--first", type=int, default=0, help="row to begin with")
    inspect.add_argument("--html", metavar="FILE", help="write a page instead of printing")
    audit = command("audit", _data_audit, "prove what a run has read, from its ledger", steps)
    audit.add_argument("run_dir", metavar="RUN")
    audit.add_argument("--data", metavar="DIR", help="the data set; default: where the run had it")
    audit.add_argument(
        "--full", action="store_true", help="enumerate every epoch and read every row again"
    )
    audit.add_argument("--list", metavar="F.jsonl", help="write the documents of every step")
    why = command("why", _data_why, "show the documents of a step of a run", steps)
    why.add_argument("run_dir", metavar="RUN")
    why.add_argument("step", metavar="STEP", type=int, help="as in metrics.jsonl: 1 is the first")
    why.add_argument("--data", metavar="DIR", help="the data set; default: where the run had it")
    why.add_argument("--text", action="store_true", help="the beginning of each document's part")
    exclude = command("exclude", _data_exclude, "take documents out of the steps to come", steps)
    exclude.add_argument("path", metavar="RUN_OR_DATA", help="DATA: for all runs that start later")
    exclude.add_argument("--document", action="append", default=[], metavar="PATH")
    exclude.add_argument("--pattern", action="append", default=[], metavar="GLOB")
    exclude.add_argument("--step", type=int, help="not before this step; default: the next start")
    exclude.add_argument("--data", metavar="DIR", help="the run's data set, if it has moved")


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
    from lemur_jax.data import build, epochs
    from lemur_jax.data.sources import SourceConfig

    classes = [build.BuildConfig, SourceConfig]
    config, _ = settings.load(build.BuildConfig, options.gin_file, bindings, classes)
    if build.existing(config) is None:
        # TensorFlow's import takes its time: only now that everything else is known to be well.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it greets on stderr otherwise
        from lemur_jax.data import tasks

        tasks.register_mixture(config.mixture, config.sources, config.tokenizer, config.seed)
        config = dataclasses.replace(config, sources=tasks.sources_of(config.mixture))
    manifest = build.build(config)
    epochs.show_longest_run(manifest)
    return 0


def _data_chat(options: argparse.Namespace, bindings: list[str]) -> int:
    from lemur_jax import settings
    from lemur_jax.data.chat import build, clean, config

    classes = [config.ChatBuildConfig, config.ChatSourceConfig, *clean.STEPS]
    loaded, _ = settings.load(config.ChatBuildConfig, options.gin_file, bindings, classes)
    build.build(loaded)
    return 0


def _data_verify(options: argparse.Namespace, _: list[str]) -> int:
    from lemur_jax.data import manifest

    found = list(manifest.verify(options.path))
    damaged = [(name, wrong) for name, wrong in found if wrong]
    for name, wrong in damaged:
        print(f"DAMAGED {name}: {wrong}")
    fix = "; remove the damaged parts and run `lemur data build` again" if damaged else ""
    print(f"{len(found) - len(damaged)} of {len(found)} parts are as the manifest says{fix}")
    return 1 if damaged else 0


def _data_clean(options: argparse.Namespace, bindings: list[str]) -> int:
    from lemur_jax import settings
    from lemur_jax.data.cleaning import clean, config
    from lemur_jax.data.sources import SourceConfig

    classes = [config.CleanConfig, SourceConfig, *config.STEPS]
    loaded, _ = settings.load(config.CleanConfig, options.gin_file, bindings, classes)
    clean.clean(loaded)
    return 0


def _data_inspect(options: argparse.Namespace, _: list[str]) -> int:
    from lemur_jax.data import inspect

    sources = None if options.source is None else [options.source]
    rows = range(options.first, options.first + options.rows)
    if options.html is None:
        inspect.inspect(options.path, options.split, rows, sources)
        return 0
    from lemur_jax.data import inspect_page

    inspect_page.write(options.html, options.path, options.split, rows, sources)
    print(f"wrote {options.html}")
    return 0


def _data_audit(options: argparse.Namespace, _: list[str]) -> int:
    from rich.console import Console

    from lemur_jax import checkpoint
    from lemur_jax.data import audit, ledger

    ledger.read_run(options.run_dir)  # says what is missing before anything else is looked for
    directory = Path(options.run_dir).absolute() / checkpoint.CHECKPOINTS
    positions = {
        step: checkpoint.describe(directory / str(step)).about["data"]
        for step in checkpoint.complete_steps(directory)
    }
    result = audit.audit(options.run_dir, positions, options.data, options.full)
    audit.print_audit(result, Console())
    if options.list is not None:
        from lemur_jax.data import why

        print(f"wrote {why.list_steps(options.run_dir, options.list, options.data)} steps")
    return EXIT_VIOLATION if result.violations else 0


def _data_why(options: argparse.Namespace, _: list[str]) -> int:
    from lemur_jax.data import why

    why.why(options.run_dir, options.step, options.data, options.text)
    return 0


def _data_exclude(options: argparse.Namespace, _: list[str]) -> int:
    from lemur_jax.data import exclude

    found = exclude.exclude(
        options.path, options.document, options.pattern, options.step, options.data
    )
    exclude.print_excluded(found)
    return 0
