"""Records of published conversation sets, turned into conversations.

    messages           {"messages": [{"role", "content"}, ...]}
    prompt_completion  {"prompt", "completion"}
    openorca           {"system_prompt", "question", "response"}
    sharegpt           {"conversations": [{"from", "value"}, ...]}: human, gpt, system
    evol_code          {"instruction", "output"}, or {"instruction", "response"}; an "input" that is
                       not empty follows the instruction
    oasst              OpenAssistant's trees or messages: see oasst.py

Files are .jsonl and .jsonl.gz (one record a line), .json (a list of records) and .parquet. What
cannot be learnt from is handed to `refuse` with its place and its reason; nothing is left out
in silence.
"""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lemur_jax.config import ConfigError
from lemur_jax.data.chat import oasst
from lemur_jax.data.chat.conversation import Conversation, Message, fault

FORMATS = ("messages", "prompt_completion", "openorca", "sharegpt", "evol_code", "oasst")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

Refuse = Callable[[str, str], None]  # (place, reason)


class RecordError(Exception):
    """A record that is not what its format says; the message is the reason."""


def expand(patterns: Sequence[str], field: str) -> list[str]:
    """Files that paths or globs name, sorted. Raises ConfigError naming all that name none."""
    problems, found = [], set()
    for pattern in patterns:
        matches = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        if not matches:
            problems.append(f"{field}={pattern!r} matches no file: check the path")
        found.update(matches)
    problems += [
        f"{field}={name!r} has an unknown suffix: use one of {', '.join(SUFFIXES)}"
        for name in sorted(found)
        if not name.endswith(SUFFIXES)
    ]
    if problems:
        raise ConfigError(problems)
    return sorted(found)


def labels(names: Sequence[str]) -> dict[str, str]:
    """File -> how it is called in places and manifests: its name, or, where two have the same one,
    its path below what all have in common; never a path of this machine."""
    short = [os.path.basename(name) for name in names]
    if len(set(short)) < len(names):
        common = os.path.commonpath([os.path.abspath(name) for name in names])
        short = [os.path.relpath(os.path.abspath(name), common) for name in names]
    return dict(zip(names, short))


def read(
    names: Sequence[str],
    record_format: str,
    refuse: Refuse,
    *,
    paths: str = "best",
    split_key: str | None = None,
) -> Iterator[Conversation]:
    """Conversations of files, in order.

    Args:
      names: files, as `expand` returns them.
      record_format: one of FORMATS.
      refuse: is told (place, reason) of every record that is no conversation.
      paths: of oasst: oasst.PATHS.
      split_key: key of a record that says "train" or "validation".

    Raises ConfigError for a file that cannot be read at all.
    """
    for name, label in labels(names).items():
        records = _records(name, label, refuse)
        if record_format == "oasst":
            yield from oasst.conversations(records, refuse, paths)
            continue
        turns_of = _TURNS[record_format]
        for place, record in records:
            try:
                split = _split(record, split_key)
                messages = tuple(turns_of(record))
            except RecordError as error:
                refuse(place, str(error))
                continue
            reason = None if record_format == "prompt_completion" else fault(messages)
            if reason is None:
                reason = next((r for m in messages if (r := _not_text(m.content))), None)
            if reason is not None:
                refuse(place, reason)
                continue
            meta = {k: v for k, v in record.items() if isinstance(v, str | int | float)}
            completion = record_format == "prompt_completion"
            yield Conversation(messages, place, split=split, completion=completion, meta=meta)


def _not_text(content: str) -> str | None:
    """Why a string that JSON could spell is not text."""
    if "\0" in content:
        return "not text: a NUL"
    if any("\ud800" <= character <= "\udfff" for character in content):
        return "not text: half of a surrogate pair"
    return None


def _split(record: Mapping[str, Any], key: str | None) -> str:
    if key is None:
        return "train"
    if record.get(key) not in ("train", "validation"):
        raise RecordError(f"{key}={record.get(key)!r} is neither 'train' nor 'validation'")
    return record[key]


# ---------------------------------------------------------------------------------------------
# Records to turns
# ---------------------------------------------------------------------------------------------


def _text(record: Mapping[str, Any], *keys: str) -> str:
    """The string under the first of `keys` that the record has."""
    for key in keys:
        if key in record:
            if not isinstance(record[key], str):
                raise RecordError(f"{key!r} is {type(record[key]).__name__}, not a string")
            return record[key]
    raise RecordError(f"no field {' or '.join(map(repr, keys))} (found {_found(record)})")


def _found(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, record))[:8]) or "nothing"


def _list(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    turns = record.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RecordError(f"no list of turns {key!r} (found {_found(record)})")
    return turns


def _messages(record: Mapping[str, Any]) -> Iterator[Message]:
    for turn in _list(record, "messages"):
        yield Message(_text(turn, "role"), _text(turn, "content"))


def _sharegpt(record: Mapping[str, Any]) -> Iterator[Message]:
    for turn in _list(record, "conversations"):
        role = _text(turn, "from", "role")
        yield Message(_SHAREGPT_ROLES.get(role, role), _text(turn, "value", "content"))


def _openorca(record: Mapping[str, Any]) -> Iterator[Message]:
    if record.get("system_prompt"):  # OpenOrca writes "" where there is none
        system = _text(record, "system_prompt")
        if system.strip():
            yield Message("system", system)
    yield Message("user", _text(record, "question"))
    yield Message("assistant", _text(record, "response"))


def _evol_code(record: Mapping[str, Any]) -> Iterator[Message]:
    question = _text(record, "instruction")
    extra = _text(record, "input") if record.get("input") is not None else ""
    yield Message("user", f"{question}\n\n{extra}" if extra.strip() else question)
    yield Message("assistant", _text(record, "output", "response"))


def _prompt_completion(record: Mapping[str, Any]) -> Iterator[Message]:
    prompt, completion = _text(record, "prompt"), _text(record, "completion")
    if not completion.strip():
        raise RecordError("empty content: 'completion'")
    yield Message("user", prompt)
    yield Message("assistant", completion)


_TURNS: dict[str, Callable[[Mapping[str, Any]], Iterator[Message]]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "openorca": _openorca,
    "sharegpt": _sharegpt,
    "evol_code": _evol_code,
}


# ---------------------------------------------------------------------------------------------
# Files to records
# ---------------------------------------------------------------------------------------------


def _records(name: str, label: str, refuse: Refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of one file; what is no JSON object is refused, a broken file raises."""
    reader = _parquet if name.endswith(".parquet") else _json
    if name.endswith((".jsonl", ".jsonl.gz")):
        reader = _lines
    try:
        for number, record in reader(name):
            place = f"{label}:{number}"
            if isinstance(record, Exception):
                refuse(place, _json_reason(record))
            elif not isinstance(record, dict):
                refuse(place, f"not a JSON object but {type(record).__name__}")
            else:
                yield place, record
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(
            [
                f"{name} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}): "
                "copy the file again or remove it"
            ]
        ) from error


def _json_reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return "not JSON"


def _lines(name: str) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if name.endswith(".gz") else open
    with opener(name, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ones
                record = error
            yield number, record


def _json(name: str) -> Iterator[tuple[int, Any]]:
    """A list, one record at a time: the text is held whole, the records are not."""
    with open(name, encoding="utf-8") as file:
        text = file.read()
    decode, blank = json.JSONDecoder().raw_decode, " \t\r\n,"
    at = len(text) - len(text.lstrip())
    if text[at : at + 1] != "[":
        raise ValueError("a .json file must hold a list of records; name it .jsonl if it has lines")
    at, number = at + 1, 0
    while True:
        while at < len(text) and text[at] in blank:
            at += 1
        if text[at : at + 1] == "]":
            return
        number += 1
        record, at = decode(text, at)
        yield number, record


def _parquet(name: str) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet  # late: only for those who have such files

    number = 0
    with pyarrow.parquet.ParquetFile(name) as file:
        for batch in file.iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield number, record
