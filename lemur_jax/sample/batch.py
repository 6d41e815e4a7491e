"""A JSONL file of requests in, a JSONL file of completions out: same order, resumable.

In:   {"prompt": "...", "temperature": 0.7, "n": 2}      one request a line, fields of `Request`
Out:  {"line": 1, "request": "1f0c...", "completions": [{"text": "...", ...}, ...]}

`request` is a digest of the whole request, defaults included. A run that was interrupted goes on
after the last whole line of its output, if the lines that are there were made from these requests.
"""

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lemur_jax.config import ConfigError
from lemur_jax.sample.request import Completion, Request
from lemur_jax.sample.sampler import Sampler

# Most problems that one error lists.
SHOWN_PROBLEMS = 20
# Batches that are sampled between two writes: more let rows of equal length find each other, fewer
# lose less when the run is interrupted.
BATCHES_PER_WRITE = 8

_FIELDS = tuple(field.name for field in dataclasses.fields(Request))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `sample_file` did.

    Attributes:
      kept: lines that were there before.
      sampled: lines of this call.
      new_tokens: of this call, all samples.
    """

    kept: int
    sampled: int
    new_tokens: int


def sample_file(
    sampler: Sampler,
    source: str | Path,
    destination: str | Path,
    defaults: Mapping[str, Any] | None = None,
    report: Callable[[int, int], None] | None = None,
    prepare: Callable[[Request], Request] | None = None,
) -> Summary:
    """Continues every prompt of a JSONL file.

    The whole file is checked before anything is sampled. Requests of equal length buckets are
    sampled together, and lines are written in the order of the input.

    Args:
      sampler: the model.
      source: JSONL; empty lines are skipped and keep their number.
      destination: JSONL; created, or continued if it was begun with the same requests.
      defaults: fields of `Request` for lines that do not set them.
      report: called with (lines done, lines in all) after every write.
      prepare: what is done to each request first, such as rendering it as a chat.

    Raises:
      ConfigError: every bad line by its number (the first SHOWN_PROBLEMS); or the destination was
        made from other requests.
    """
    requests = read_requests(source, defaults)
    if prepare is not None:
        requests = _prepared(requests, prepare)
    _check_prompts(sampler, requests)
    destination = Path(destination)
    kept = _resume(destination, requests)
    todo = requests[kept:]
    window = BATCHES_PER_WRITE * sampler.batches[-1]
    new_tokens = 0
    with destination.open("a", encoding="utf-8") as file:
        for start in range(0, len(todo), window):
            part = todo[start : start + window]
            answers: list[list[Completion]] = [[] for _ in part]
            for completion in sampler.generate([request for _, request in part]):
                answers[completion.request].append(completion)
                new_tokens += len(completion.ids)
            for (line, request), completions in zip(part, answers):
                file.write(_answer(line, request, completions))
            file.flush()
            os.fsync(file.fileno())  # a line that was reported is on disk
            if report:
                report(kept + start + len(part), len(requests))
    return Summary(kept, len(todo), new_tokens)


def read_requests(
    source: str | Path, defaults: Mapping[str, Any] | None = None
) -> list[tuple[int, Request]]:
    """(line number from 1, request) of every line that is not empty.

    Raises:
      ConfigError: lines that are no JSON object, lack a prompt, have unknown keys (with the nearest
        known one) or bad values; all of them, by line number.
    """
    requests, problems = [], []
    try:
        text = Path(source).read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError([f"input {str(source)!r} cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"input {str(source)!r} is not UTF-8 at byte {error.start}: save it as UTF-8"]
        ) from error
    # Only "\n" ends a line: JSON strings may hold U+2028, which str.splitlines would cut at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            requests.append((number, _parse(line, defaults or {})))
        except ConfigError as error:
            problems += [f"{source}:{number}: {problem}" for problem in error.problems]
    _raise_if(problems)
    return requests


def _parse(line: str, defaults: Mapping[str, Any]) -> Request:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError([f"not JSON ({error}): write one object for each line"]) from error
    if not isinstance(fields, dict):
        raise ConfigError(
            [f'holds a {type(fields).__name__}: write an object such as {{"prompt": "..."}}']
        )
    problems = []
    for key in fields:
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_FIELDS)}"
            problems.append(f"unknown key {key!r}; {hint}")
    if "prompt" not in fields:
        problems.append('has no "prompt": give a string or a list of token ids')
    if problems:
        raise ConfigError(problems)
    return Request(**{**defaults, **fields})


def _prepared(
    requests: list[tuple[int, Request]], prepare: Callable[[Request], Request]
) -> list[tuple[int, Request]]:
    made, problems = [], []
    for number, request in requests:
        try:
            made.append((number, prepare(request)))
        except ConfigError as error:
            problems += [f"line {number}: {problem}" for problem in error.problems]
    _raise_if(problems)
    return made


def _check_prompts(sampler: Sampler, requests: list[tuple[int, Request]]) -> None:
    problems = []
    for number, request in requests:
        try:
            sampler.lengths(request)
        except ConfigError as error:
            problems += [f"line {number}: {problem}" for problem in error.problems]
    _raise_if(problems)


def _raise_if(problems: list[str]) -> None:
    more = len(problems) - SHOWN_PROBLEMS
    if problems:
        raise ConfigError(problems[:SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else []))


def _resume(destination: Path, requests: list[tuple[int, Request]]) -> int:
    """How many requests are answered already. Cuts off a line that was being written."""
    if not destination.exists():
        return 0
    data = destination.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for position, line in enumerate(lines):
        try:
            answer = json.loads(line)
            found = (answer["line"], answer["request"])
        except (ValueError, KeyError, TypeError):
            found = None
        expected = None
        if position < len(requests):
            number, request = requests[position]
            expected = (number, digest(request))
        if found is None or found != expected:
            raise ConfigError(
                [
                    f"output {str(destination)!r}: line {position + 1} was not made from this "
                    "input with these settings: give another output, or remove the file"
                ]
            )
    if len(whole) < len(data):
        with destination.open("r+b") as file:
            file.truncate(len(whole))
    return len(lines)


def digest(request: Request) -> str:
    """16 hex digits of everything that decides a request's completions, but for the model."""
    text = json.dumps(dataclasses.asdict(request), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _answer(line: int, request: Request, completions: list[Completion]) -> str:
    fields = {
        "line": line,
        "request": digest(request),
        "completions": [_without_empty(completion) for completion in completions],
    }
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _without_empty(completion: Completion) -> dict[str, Any]:
    fields = dataclasses.asdict(completion)
    del fields["request"]  # an index that means nothing outside of one call
    return {name: value for name, value in fields.items() if value is not None}
