"""Sources of documents: what is read, how it is held out, and its share of the tokens."""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lemur_jax.config import ConfigError
from lemur_jax.data.files import Document, expand, fraction_of, read_documents, sha256

SPLITS = ("train", "validation")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents and its share of the tokens.

    Give either files, with exactly one way to hold documents out, or a SeqIO Task.

    Attributes:
      name: of the source: a directory name.
      rate: share of the tokens, not normalised (10 and 1 mean 10:1; Lemur's table as it stands).
      train_files: paths or globs of .jsonl, .jsonl.gz or .txt files.
      validation_files: held-out files, when they are separate.
      validation_fraction: holds documents out by a hash of their text, so that exact copies of a
        document always fall on the same side.
      split_key: key of a .jsonl record that says "train" or "validation".
      text_key: key of a .jsonl record that holds the text.
      task: name of a SeqIO Task with splits "train" and "validation" to read instead of files;
        `module.path:task_name` imports the module first, which registers the Task.
    """

    name: str
    rate: float
    train_files: tuple[str, ...] = ()
    validation_files: tuple[str, ...] = ()
    validation_fraction: float | None = None
    split_key: str | None = None
    text_key: str = "text"
    task: str | None = None

    def __post_init__(self):
        who, problems = f"SourceConfig({self.name!r})", []
        # gin binds lists and single strings where a tuple is meant.
        for field in ("train_files", "validation_files"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        if not _NAME.match(self.name) or self.name == "tokenizer":
            problems.append(
                f"SourceConfig.name={self.name!r} must be letters, digits, '_', '-' or '.', "
                "and not 'tokenizer': it names a directory"
            )
        if not isinstance(self.rate, (int, float)) or not 0 < self.rate < float("inf"):
            problems.append(
                f"{who}.rate={self.rate!r} must be a positive number; to leave a source out, "
                "remove it from BuildConfig.sources"
            )
        if bool(self.train_files) == bool(self.task):
            problems.append(
                f"{who}.train_files={self.train_files!r}, task={self.task!r}: give exactly one"
            )
        ways = {
            "validation_files": self.validation_files or None,
            "validation_fraction": self.validation_fraction,
            "split_key": self.split_key,
        }
        given = {name: value for name, value in ways.items() if value is not None}
        if self.train_files and len(given) != 1:
            problems.append(
                f"{who} has {len(given)} ways to hold out documents ({given}): give exactly one "
                f"of {', '.join(ways)}"
            )
        if self.task and given:
            problems.append(f"{who}.task={self.task!r} has its own splits: remove {list(given)}")
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            problems.append(
                f"{who}.validation_fraction={self.validation_fraction} must be between 0 and 1"
            )
        if problems:
            raise ConfigError(problems)


def corpus_sources(corpus: str | Path) -> tuple[SourceConfig, ...]:
    """Sources of a `corpus.collect` directory, 10:1 in tokens as in Lemur (arXiv:2310.06830)."""
    return tuple(
        SourceConfig(
            name=name,
            rate=rate,
            train_files=(str(Path(corpus) / f"{name}.jsonl"),),
            split_key="split",
        )
        for name, rate in (("code", 10.0), ("text", 1.0))
    )


@dataclasses.dataclass(frozen=True)
class Shard:
    """A unit of a source's input, which can be read alone: a file, or a range of its row groups.

    Attributes:
      name: unique in its source and the same on every machine, e.g. "train/part-003.jsonl".
      bytes: size of the input as it is stored; 0 where nobody knows.
      path: what to read.
      split: "train" or "validation": which of the source's fields named it.
      units: first and last + 1 of the row groups or records; None for all of them.
    """

    name: str
    bytes: int
    path: str
    split: str
    units: tuple[int, int] | None = None


def shards(source: SourceConfig) -> tuple[Shard, ...]:
    """Units of input of a source in reading order: the same for the same files, on any machine.

    Raises ConfigError when a pattern names nothing.
    """
    if source.task:
        return tuple(Shard(split, 0, source.task, split) for split in SPLITS)
    found = []
    for split, files in (("train", source.train_files), ("validation", source.validation_files)):
        names = expand(files, f"SourceConfig({source.name!r}).{split}_files") if files else []
        root = os.path.commonpath([os.path.dirname(name) for name in names]) if names else ""
        for name in names:
            short = os.path.relpath(name, root or ".")
            found.append(Shard(f"{split}/{short}", os.path.getsize(name), name, split))
    return tuple(found)


def read_shard(source: SourceConfig, shard: Shard, seed: int = 0) -> Iterator[Document]:
    """Documents of one shard in order, with `split` set; raises as `read_documents` does.

    All shards one after the other are the source: `documents`.
    """
    if source.task:
        from lemur_jax.data import tasks  # TensorFlow: only for sources that ask for it

        yield from (d for d in tasks.documents(source.task) if d.split == shard.split)
        return
    field = f"SourceConfig({source.name!r}).{shard.split}_files"
    for document in read_documents([shard.path], field, source.text_key, source.split_key):
        held_out = shard.split
        if source.validation_fraction is not None:
            share = fraction_of(f"{seed} {sha256(document.text)}")
            held_out = "validation" if share < source.validation_fraction else "train"
        yield dataclasses.replace(document, split=document.split or held_out)


def documents(source: SourceConfig, seed: int = 0) -> Iterator[Document]:
    """Every document of a source, shard by shard, with `split` set. Raises as `read_shard` does."""
    for shard in shards(source):
        yield from read_shard(source, shard, seed)


def training_texts(sources: tuple[SourceConfig, ...], seed: int = 0) -> Iterator[str]:
    """Training texts, sources interleaved by rate in bytes: what a tokenizer learns from.

    Any prefix is a fair sample, as `tokenizer_files.train` wants it. Held-out text is not in it.
    """
    streams = {source.name: documents(source, seed) for source in sources}
    rates = {source.name: source.rate for source in sources}
    used = dict.fromkeys(streams, 0)
    while streams:
        name = min(streams, key=lambda name: used[name] / rates[name])
        document = next((d for d in streams[name] if d.split == "train"), None)
        if document is None:
            del streams[name]
        else:
            used[name] += len(document.text.encode("utf-8"))
            yield document.text
