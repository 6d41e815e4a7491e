"""Rows of a batch: one for each sample of a request, on their way in as arrays and out as text."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from lemur_jax.sample import loop, methods
from lemur_jax.sample.request import Completion, Piece, Request
from lemur_jax.sample.stop import RowText, TextStream


class Tokenizer(Protocol):
    """What the sampler needs of lemur_jax.data.tokenizer.Tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str, bos: bool = False) -> list[int]: ...

    def stream(self, after: Sequence[int] = ()) -> TextStream: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One sample of a request on its way through a batch.

    Attributes:
      request: what was asked.
      index: of the request in the call.
      sample: which of the request's n samples.
      prompt: token ids, at least one.
      limit: new tokens at most, cut to the context.
      stop_ids: every id that ends the row.
      note: for Completion.note.
    """

    request: Request
    index: int
    sample: int
    prompt: tuple[int, ...]
    limit: int
    stop_ids: tuple[int, ...]
    note: str | None


class Progress:
    """What a row has become so far.

    Attributes:
      row: the row.
      finished: its last piece has been made.
    """

    def __init__(self, row: Row, tokenizer: Tokenizer):
        self.row = row
        self.finished = False
        # What follows a text keeps its first space: the stream must know that it is a continuation.
        after = [index for index in row.prompt if index < tokenizer.vocab_size]
        stream = tokenizer.stream(after=after)
        self._text = RowText(stream, row.request.stop, tokenizer.vocab_size)
        self._logprobs: list[float] = []

    def take(self, tokens: np.ndarray, logprobs: np.ndarray, done: bool) -> Iterator[Piece]:
        """Takes the row's next tokens; yields at most one piece of text, and the last piece."""
        if self.finished:  # a chunk that was in flight when a stop string was found
            return
        shown, stopped_by = "", None
        for token, logprob in zip(tokens.tolist(), logprobs.tolist()):
            if token in self.row.stop_ids:
                stopped_by = token
                break
            shown += self._text.push(token)
            self._logprobs.append(logprob)
            if self._text.stopped_by is not None:
                break
        self.finished = done or self._text.stopped_by is not None
        if not self.finished:
            if shown:
                yield Piece(sample=self.row.sample, text=shown)
            return
        shown += self._text.finish()
        if self._text.stopped_by is not None:
            stopped_by = self._text.stopped_by
        completion = Completion(
            request=self.row.index,
            sample=self.row.sample,
            text=self._text.text,
            ids=tuple(self._text.ids),
            finish_reason="length" if stopped_by is None else "stop",
            stopped_by=stopped_by,
            prompt_tokens=len(self.row.prompt),
            logprobs=tuple(self._logprobs) if self.row.request.logprobs else None,
            note=self.row.note,
        )
        yield Piece(sample=self.row.sample, text=shown, completion=completion)


def prompts(group: list[Row], batch: int, bucket: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded prompts [B,P] and their lengths [B]; rows that fill up the batch have one 0."""
    tokens_BP = np.zeros((batch, bucket), np.int32)
    lengths_B = np.ones(batch, np.int32)
    for r, row in enumerate(group):
        tokens_BP[r, : len(row.prompt)] = row.prompt
        lengths_B[r] = len(row.prompt)
    return tokens_BP, lengths_B


def constants(group: list[Row], batch: int) -> loop.Rows:
    """The rows as arrays, filled up to the batch with rows that are done from the start."""
    filler = batch - len(group)

    def column(values, fill, dtype):
        return np.asarray([*values, *[fill] * filler], dtype)

    # Powers of two from 8 on: the number of stop ids is part of the compiled shape.
    width = 8
    while width < max(len(row.stop_ids) for row in group):
        width *= 2
    stop_ids = np.full((batch, width), -1, np.int32)
    for r, row in enumerate(group):
        stop_ids[r, : len(row.stop_ids)] = row.stop_ids
    chains = [methods.standard(**_numbers(row.request)) for row in group]
    chains += [methods.standard(temperature=0.0)] * filler
    return loop.Rows(
        seed=column([row.request.seed for row in group], 0, np.uint32),
        sample=column([row.sample for row in group], 0, np.uint32),
        limit=column([row.limit for row in group], 0, np.int32),
        stop_ids=stop_ids,
        chain=methods.stack(chains),
    )


def _numbers(request: Request) -> dict[str, float]:
    settings = request.method_settings()
    return {name: v if name == "top_k" else float(v) for name, v in settings.items()}
