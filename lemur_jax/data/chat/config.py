"""Settings of `lemur data chat`."""

import dataclasses
import re
from typing import Any

from lemur_jax.config import ConfigError
from lemur_jax.data.chat import clean, formats, oasst, pack, readers

LONG = ("truncate", "drop")
BAD_RECORDS = ("raise", "count")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSourceConfig:
    """One set of conversations.

    Attributes:
      name: for tables, `sources` of steps and provenance.
      files: paths or globs of .jsonl, .jsonl.gz, .json or .parquet files.
      format: readers.FORMATS: whose fields the records have.
      paths: of format oasst: "best" or "leaves"; see oasst.py.
      validation_files: held-out files, when they are separate.
      validation_fraction: holds conversations out by a hash of their first user message, so that
        one question is never on both sides.
      split_key: key of a record that says "train" or "validation".
      most: conversations that are used, chosen by a seeded hash of their place; None: all. (The
        paper took 200,000 of OpenOrca and does not say which.)
    """

    name: str
    files: tuple[str, ...]
    format: str
    paths: str = "best"
    validation_files: tuple[str, ...] = ()
    validation_fraction: float = 0.0
    split_key: str | None = None
    most: int | None = None

    def __post_init__(self):
        who, problems = f"ChatSourceConfig({self.name!r})", []
        for field in ("files", "validation_files"):  # lists and single strings too
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        if not _NAME.match(self.name):
            problems.append(
                f"ChatSourceConfig.name={self.name!r} must be letters, digits, '_', '-' or '.'"
            )
        if not self.files:
            problems.append(f"{who}.files=() is empty: give paths or globs")
        if self.format not in readers.FORMATS:
            problems.append(
                f"{who}.format={self.format!r} is unknown; legal: {', '.join(readers.FORMATS)}"
            )
        if self.paths not in oasst.PATHS:
            problems.append(
                f"{who}.paths={self.paths!r} is unknown; legal: {', '.join(oasst.PATHS)}"
            )
        if not 0 <= self.validation_fraction < 1:
            problems.append(
                f"{who}.validation_fraction={self.validation_fraction} must be in [0, 1)"
            )
        ways = [n for n in ("validation_files", "validation_fraction", "split_key") if self._has(n)]
        if len(ways) > 1:
            problems.append(f"{who} holds out in {len(ways)} ways ({', '.join(ways)}): keep one")
        if self.format == "oasst" and self.split_key:
            problems.append(f"{who}.split_key: messages of a tree have no split; remove it")
        if self.most is not None and self.most < 1:
            problems.append(f"{who}.most={self.most} must be positive, or None for all")
        if problems:
            raise ConfigError(problems)

    def _has(self, field: str) -> bool:
        return bool(getattr(self, field))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatBuildConfig:
    """One run of `lemur data chat`.

    Attributes:
      path: DATA_DIR: a new directory, or one that the same build wrote before.
      sources: what goes in; all of them are mixed, and each conversation is in once.
      tokenizer: its directory; it must have the format's special tokens as single ids.
      sequence_length: T: rows hold T+1 tokens.
      chat_format: name in formats.FORMATS.
      packing: pack.PACKINGS.
      steps: cleaning steps of clean.STEPS, in order.
      long_conversations: one that does not fit into a row loses its end ("truncate", as train.py)
        or is left out ("drop"); both are counted. A row of segmented packing takes T+1 tokens, one
        of lemur_compat T and the end token.
      bad_records: what cannot be learnt from stops the build ("raise"), after everything was read
        and with all reasons, or is left out, counted and printed ("count").
      shuffle: conversations are packed in a seeded order; False: as they are read.
      rows_multiple: empty rows are added until the training rows divide by it: the batch size,
        with which TrainConfig.epochs then sees each row exactly that often.
      window: conversations that are packed at a time.
      seed: of the order, of held-out choices and of `most`.
      threads: of the tokenizer; 0: one for each core.
    """

    path: str
    sources: tuple[ChatSourceConfig, ...]
    tokenizer: str
    sequence_length: int
    chat_format: str = "chatml"
    packing: str = "segmented"
    steps: tuple[Any, ...] = ()
    long_conversations: str = "truncate"
    bad_records: str = "raise"
    shuffle: bool = True
    rows_multiple: int = 1
    window: int = 20_000
    seed: int = 0
    threads: int = 0

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "steps", tuple(self.steps))
        problems = [
            f"ChatBuildConfig.{field}='' is empty: give a directory"
            for field in ("path", "tokenizer")
            if not getattr(self, field)
        ]
        legal = {
            "chat_format": tuple(formats.FORMATS),
            "packing": pack.PACKINGS,
            "long_conversations": LONG,
            "bad_records": BAD_RECORDS,
        }
        problems += [
            f"ChatBuildConfig.{field}={getattr(self, field)!r} is unknown; legal: "
            f"{', '.join(names)}"
            for field, names in legal.items()
            if getattr(self, field) not in names
        ]
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            problems.append(f"ChatBuildConfig.sources={names}: at least one, each name once")
        # Segments are uint16: at most 65535 documents in a row.
        if not 2 <= self.sequence_length <= 65534:
            problems.append(
                f"ChatBuildConfig.sequence_length={self.sequence_length} must be in [2, 65534]"
            )
        for field, least in (("rows_multiple", 1), ("window", 1), ("threads", 0)):
            if getattr(self, field) < least:
                problems.append(
                    f"ChatBuildConfig.{field}={getattr(self, field)} must be at least {least}"
                )
        if self.packing == "lemur_compat" and self.window % pack.COMPAT_GROUP:
            problems.append(
                f"ChatBuildConfig.window={self.window} must divide by {pack.COMPAT_GROUP} for "
                "packing='lemur_compat': train.py packs groups of that size"
            )
        for step in self.steps:
            if not isinstance(step, clean.STEPS):
                kinds = ", ".join(kind.__name__ for kind in clean.STEPS)
                problems.append(f"ChatBuildConfig.steps has {step!r}; legal: {kinds}")
                continue
            problems += [
                f"{type(step).__name__}.sources names {name!r}, which is no source; there are: "
                f"{', '.join(names)}"
                for name in step.sources
                if name not in names
            ]
        if problems:
            raise ConfigError(problems)
