"""Sources of documents: what is read, how it is held out, and its share of the tokens."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lemur_jax.config import ConfigError
from lemur_jax.data.files import Document, fraction_of, sha256
from lemur_jax.data.reading import formats, records, where
from lemur_jax.data.reading.patterns import FORMATS, expand, format_of
from lemur_jax.data.reading.records import ReadReport

SPLITS = ("train", "validation")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents and its share of the tokens.

    Give either files, with exactly one way to hold documents out, or a SeqIO Task.

    Attributes:
      name: of the source: a directory name.
      rate: share of the tokens, not normalised (10 and 1 mean 10:1; Lemur's table as it stands).
      train_files: paths, globs or directories, local or URLs (gs://, s3://); or, with format "hf"
        or "tfds", names of data sets: "owner/name[:config]@split", "name[/config][:version]@split".
      validation_files: held-out files, when they are separate.
      validation_fraction: holds documents out by a hash of their text, so that exact copies of a
        document always fall on the same side.
      split_key: key of a .jsonl record that says "train" or "validation".
      text_key: field of a record that holds the text; a dotted name looks inside.
      format: one of patterns.FORMATS; None tells by the files' suffixes.
      root: what relative `train_files` and `validation_files` are relative to: a directory or URL.
      where: filters on a record's fields, all of which must hold: ("max_stars_count >= 5",
        "lang in Python, SQL"); the grammar is in reading/where.py.
      meta_keys: fields to keep in Document.meta; None keeps all but the text.
      lines_per_document: of plain files: cuts them; None makes a file one document.
      bad_records: "raise" stops at the first record that cannot be a document; "count" goes on,
        and prints how many there were and the first of them.
      max_bad_records: with "count": more than so many stop the reading; None allows any number.
      max_epochs: repetitions of the source in a run that need no warning; see epochs.py.
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
    format: str | None = None
    root: str = ""
    where: tuple[str, ...] = ()
    meta_keys: tuple[str, ...] | None = None
    lines_per_document: int | None = None
    bad_records: str = "raise"
    max_bad_records: int | None = None
    max_epochs: float = 4.0
    task: str | None = None

    def __post_init__(self):
        who, problems = f"SourceConfig({self.name!r})", []
        # gin binds lists and single strings where a tuple is meant.
        for field in ("train_files", "validation_files", "where", "meta_keys"):
            value = getattr(self, field)
            if value is not None:
                whole = (value,) if isinstance(value, str) else tuple(value)
                object.__setattr__(self, field, whole)
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
        problems += _reading_problems(self, who)
        if problems:
            raise ConfigError(problems)


def _reading_problems(source: SourceConfig, who: str) -> list[str]:
    """What is wrong with the fields that say how records are read."""
    problems = where.parse(source.where, f"{who}.where")[1]
    if source.format is not None and source.format not in FORMATS:
        problems.append(f"{who}.format={source.format!r} must be one of {FORMATS}, or None")
    if source.bad_records not in ("raise", "count"):
        problems.append(f"{who}.bad_records={source.bad_records!r} must be 'raise' or 'count'")
    limits = {"max_bad_records": 0, "lines_per_document": 1}
    for field, least in limits.items():
        value = getattr(source, field)
        if value is not None and (not isinstance(value, int) or value < least):
            problems.append(f"{who}.{field}={value!r} must be an integer >= {least}, or None")
    if not isinstance(source.max_epochs, (int, float)) or not source.max_epochs > 0:
        problems.append(f"{who}.max_epochs={source.max_epochs!r} must be a positive number")
    return problems


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

    Raises ConfigError when a pattern names nothing, or numbered shards are missing.
    """
    if source.task:
        return tuple(Shard(split, 0, source.task, split) for split in SPLITS)
    found = []
    for split, given in (("train", source.train_files), ("validation", source.validation_files)):
        field = f"SourceConfig({source.name!r}).{split}_files"
        names = given
        if given and source.format not in ("hf", "tfds"):
            names = expand(given, field, source.format, source.root)
        for name, label in zip(names, _labels(names)):
            for size, units in formats.units(name, field, source.format):
                part = f"[{units[0]}:{units[1]}]" if units else ""
                found.append(Shard(f"{split}/{label}{part}", size, name, split, units))
    return tuple(found)


def _labels(names: Sequence[str]) -> list[str]:
    """Names below their common directory: unique, and the same wherever the files are."""
    directories = [name.split("/")[:-1] for name in names]
    common = 0
    while names and len({tuple(parts[: common + 1]) for parts in directories}) == 1:
        if common == len(directories[0]):
            break
        common += 1
    return ["/".join(name.split("/")[common:]) for name in names]


def read_shard(
    source: SourceConfig, shard: Shard, seed: int = 0, report: ReadReport | None = None
) -> Iterator[Document]:
    """Documents of one shard in order, with `split` set. All shards in order are the source.

    Args:
      source: which `shards` was asked about.
      shard: one of them.
      seed: of `validation_fraction`.
      report: where filtered and bad records are counted; None prints them at the end.

    Raises ConfigError with file, record, what is wrong and the fix.
    """
    counts = ReadReport() if report is None else report
    if source.task:
        from lemur_jax.data import tasks  # TensorFlow: only for sources that ask for it

        yield from (d for d in tasks.documents(source.task) if d.split == shard.split)
        return
    field = f"SourceConfig({source.name!r}).{shard.split}_files"
    rules = _rules(source)
    if (source.format or format_of(shard.path)) == "text":
        rules = dataclasses.replace(rules, text_key="text", split_key=None)
    rows = formats.read(
        shard.path, field, source.format, shard.units, rules.columns(), source.lines_per_document
    )
    label = shard.name.partition("/")[2]
    label = label.rpartition("[")[0] if shard.units else label
    for document in records.documents(rows, shard.path, label, field, rules, counts):
        held_out = shard.split
        if source.validation_fraction is not None:
            share = fraction_of(f"{seed} {sha256(document.text)}")
            held_out = "validation" if share < source.validation_fraction else "train"
        yield dataclasses.replace(document, split=document.split or held_out)
    if report is None:
        counts.show(f"{source.name} {shard.name}")


def _rules(source: SourceConfig) -> records.Rules:
    return records.Rules(
        text_key=source.text_key,
        split_key=source.split_key,
        where=where.parse(source.where, "")[0],
        meta_keys=source.meta_keys,
        raise_bad=source.bad_records == "raise",
        max_bad=source.max_bad_records,
    )


def documents(
    source: SourceConfig, seed: int = 0, report: ReadReport | None = None
) -> Iterator[Document]:
    """Every document of a source, shard by shard, with `split` set. As `read_shard` otherwise."""
    counts = ReadReport() if report is None else report
    for shard in shards(source):
        yield from read_shard(source, shard, seed, counts)
    if report is None:
        counts.show(source.name)


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
