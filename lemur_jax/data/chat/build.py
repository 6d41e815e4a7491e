"""`lemur data chat`: conversations, read, cleaned, rendered and packed into rows with a loss mask.

    DATA_DIR/manifest.json          as of `lemur data build`, and "chat": see `build`
    DATA_DIR/tokenizer/             a copy of the tokenizer, chat_format.json, chat_template.jinja
    DATA_DIR/chat/<split>/          rows with a loss mask (data/store.py)

The texts of all conversations are held in memory (about 1 GB for Lemur-Chat's 300,000); ids and
rows are made window by window.
"""

import collections
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from lemur_jax.config import ConfigError
from lemur_jax.data import manifest as manifests
from lemur_jax.data.chat import clean, formats, readers, report
from lemur_jax.data.chat.config import ChatBuildConfig, ChatSourceConfig
from lemur_jax.data.chat.conversation import Conversation
from lemur_jax.data.chat.split_writer import Refused, SplitWriter
from lemur_jax.data.chat.template import write_format
from lemur_jax.data.files import fraction_of, new_directory
from lemur_jax.data.rows_writer import FORMAT_VERSION
from lemur_jax.data.sources import SPLITS
from lemur_jax.data.tokenizer import Tokenizer

SOURCE = "chat"  # the one source of the data set: conversations of all kinds share rows


def build(config: ChatBuildConfig, console: Console | None = None) -> dict:
    """Builds a data set and returns its manifest; an identical existing one is returned as it is.

    The manifest is that of `lemur data build`, and "chat" has: format, packing, conversations read
    and refused, what each step removed, tokens, learnt tokens, truncated and dropped conversations,
    fill, and the training rows.

    Raises ConfigError on bad input; then, and on any crash, `config.path` is as it was before.
    """
    console = console or Console(stderr=True)
    started = time.monotonic()
    chat_format = formats.format_named(config.chat_format, "ChatBuildConfig.chat_format")
    tokenizer = Tokenizer.load(config.tokenizer)
    formats.check_specials(tokenizer, chat_format)
    end_id = formats.end_of_conversation(tokenizer, chat_format, config.packing)
    identity = _identity(config, tokenizer)
    if (manifest := _existing(config.path, identity)) is not None:
        console.print(f"data set {config.path} is complete already", soft_wrap=True)
        return manifest
    refused = Refused()
    conversations = [c for source in config.sources for c in _read(config, source, refused)]
    read = collections.Counter(c.source for c in conversations)
    conversations.sort(key=lambda c: c.split != "train")  # training first: see clean.py
    conversations, removed = clean.clean(conversations, config.steps)
    if config.shuffle:
        conversations.sort(key=lambda c: fraction_of(f"order {config.seed} {c.source} {c.path}"))
    with new_directory(config.path) as temporary:
        splits = {}
        for split in SPLITS:
            chosen = [c for c in conversations if c.split == split]
            rows = SplitWriter(config, chat_format, tokenizer, end_id, temporary / SOURCE / split)
            splits[split] = rows.write(chosen, refused, split)
        refused.check(config)
        steps = [dataclasses.asdict(step) for step in removed]
        if not all(counts["documents"] for counts in splits.values()):  # before the error says so
            report.show_left_out(refused.counts, refused.first, steps, console)
        _check_splits(config, splits)
        tokenizer.save(temporary / "tokenizer")
        write_format(temporary / "tokenizer", chat_format)
        about = {
            "format": config.chat_format,
            "packing": config.packing,
            "read": dict(read),
            "refused": {name: dict(reasons) for name, reasons in refused.counts.items()},
            "removed": steps,
            "left": dict(collections.Counter(c.source for c in conversations)),
            "splits": {split: counts.pop("chat") for split, counts in splits.items()},
        }
        sources = {SOURCE: {"rate": 1.0, "splits": splits}}
        manifest = json.loads(json.dumps(identity | {"sources": sources, "chat": about}))
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    report.show(manifest, refused.first, config.path, time.monotonic() - started, console)
    return manifest


def _identity(config: ChatBuildConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the content of a build, without any path of this machine."""
    settings = dataclasses.asdict(config)
    for field in ("path", "tokenizer", "threads", "sources"):
        del settings[field]
    settings["steps"] = [
        [type(step).__name__, {**dataclasses.asdict(step), "processes": None}]  # decide no content
        for step in config.steps
    ]
    inputs = {}
    for source in config.sources:
        fields = dataclasses.asdict(source)
        for field in ("files", "validation_files"):
            names = readers.expand(fields[field], f"ChatSourceConfig({source.name!r}).{field}")
            fields[field] = {
                label: manifests.fingerprint(name) for name, label in readers.labels(names).items()
            }
        inputs[source.name] = fields
    return {
        "format_version": FORMAT_VERSION,
        "mixture": SOURCE,
        "sequence_length": config.sequence_length,
        "seed": config.seed,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "settings": settings,
        "inputs": inputs,
    }


def _existing(directory: str, identity: dict[str, Any]) -> dict | None:
    """Manifest of an identical earlier build; None when there is nothing at that place."""
    path = Path(directory)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    where, fix = (
        f"ChatBuildConfig.path={directory!r}",
        "nothing was touched; give a new directory or remove this one",
    )
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"{where} exists and is not a data set: {fix}"]) from error
    same = json.loads(json.dumps(identity))
    different = [name for name, value in same.items() if manifest.get(name) != value]
    if different:
        raise ConfigError([f"{where} was built with other {', '.join(different)}: {fix}"])
    return manifest


def _read(
    config: ChatBuildConfig, source: ChatSourceConfig, refused: Refused
) -> list[Conversation]:
    """The conversations of a source, with `source` and `split` set, at most `most`."""
    found = []
    for field, split in (("files", None), ("validation_files", "validation")):
        names = readers.expand(getattr(source, field), f"ChatSourceConfig({source.name!r}).{field}")
        for conversation in readers.read(
            names,
            source.format,
            lambda place, reason: refused.add(source.name, place, reason),
            paths=source.paths,
            split_key=source.split_key,
        ):
            held_out = split or conversation.split
            if source.validation_fraction:
                question = next(m.content for m in conversation.messages if m.role == "user")
                share = fraction_of(f"split {config.seed} {question}")
                held_out = "validation" if share < source.validation_fraction else "train"
            found.append(dataclasses.replace(conversation, source=source.name, split=held_out))
    if source.most is not None and len(found) > source.most:
        by_hash = sorted(found, key=lambda c: fraction_of(f"choice {config.seed} {c.path}"))
        chosen = set(map(id, by_hash[: source.most]))
        found = [c for c in found if id(c) in chosen]
    return found


def _check_splits(config: ChatBuildConfig, splits: dict[str, dict]) -> None:
    empty = [split for split in SPLITS if not splits[split]["documents"]]
    if empty:
        raise ConfigError(
            [
                f"ChatBuildConfig.sources give no conversation for split {split!r}: set "
                "validation_fraction, validation_files or split_key of a source, or give more files"
                for split in empty
            ]
        )
