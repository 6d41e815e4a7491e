"""Conversations of one split, rendered, packed and written window by window."""

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lemur_jax.config import ConfigError
from lemur_jax.data import manifest
from lemur_jax.data.chat import formats, pack
from lemur_jax.data.chat.config import ChatBuildConfig
from lemur_jax.data.chat.conversation import Conversation
from lemur_jax.data.store import RowsWriter, part_name
from lemur_jax.data.tokenizer import Tokenizer

_NAMED = 10  # bad records that a message names


class Refused:
    """Counts what could not be learnt from: by source and reason, with the first few places."""

    def __init__(self):
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self.first: list[str] = []

    def add(self, source: str, place: str, reason: str) -> None:
        """One more."""
        self.counts[source][reason] += 1
        if len(self.first) < _NAMED:
            self.first.append(f"{source}: {place}: {reason}")

    @property
    def total(self) -> int:
        """Of all sources and reasons."""
        return sum(sum(reasons.values()) for reasons in self.counts.values())

    def check(self, config: ChatBuildConfig) -> None:
        """Raises ConfigError if there is any and the config does not allow it."""
        if self.total and config.bad_records == "raise":
            more = self.total - len(self.first)
            raise ConfigError(
                [
                    *self.first,
                    *([f"and {more} more"] if more else []),
                    f"{self.total} records cannot be learnt from: mend them, or set "
                    "ChatBuildConfig.bad_records='count' to leave them out with a count",
                ]
            )


class SplitWriter:
    """Renders and packs the conversations of one split, and writes them."""

    def __init__(
        self,
        config: ChatBuildConfig,
        chat_format: formats.ChatFormat,
        tokenizer: Tokenizer,
        end_id: int | None,
        directory: Path,
    ):
        self._config, self._format, self._tokenizer = config, chat_format, tokenizer
        self._end_id = end_id
        self._columns = config.sequence_length + 1
        # A compat row also holds the end token.
        self._most = self._columns - (end_id is not None)
        self._writer = RowsWriter(
            directory / part_name(0), config.sequence_length, tokenizer.vocab_size, loss=True
        )
        self._targets = np.zeros(tokenizer.vocab_size, np.int64)
        self._counts: collections.Counter[str] = collections.Counter(
            rows=0, conversations=0, tokens=0, learnt_tokens=0, truncated=0, dropped=0, emptied=0
        )

    def write(self, conversations: Sequence[Conversation], refused: Refused, split: str) -> dict:
        """Writes all; returns the split's entry of the manifest, with "chat" for the counts."""
        window: list[tuple[Conversation, formats.Rendered]] = []
        for pair in self._rendered(conversations, refused):
            window.append(pair)
            if len(window) == self._config.window:
                self._pack(window)
                window = []
        self._pack(window)
        rows = self._counts["rows"]
        empty = -rows % self._config.rows_multiple if split == "train" else 0
        self._append_empty(empty)
        about = self._writer.close(
            {"tokens": self._counts["tokens"], "tokenizer": self._tokenizer.fingerprint}
        )
        if not rows:
            return {"documents": 0}
        counts: dict[str, Any] = dict(self._counts) | {"empty_rows": empty}
        counts["fill"] = about["filled"] / (rows * self._columns)  # of rows that hold something
        made = manifest.split_of([about | {"name": part_name(0)}])
        if split == "validation":
            made["unigram_entropy"] = _entropy(self._targets)
        return made | {"chat": counts}

    def _rendered(
        self, conversations: Sequence[Conversation], refused: Refused
    ) -> Iterator[tuple[Conversation, formats.Rendered]]:
        threads = self._config.threads or os.cpu_count() or 1
        for at in range(0, len(conversations), 1000):
            some = conversations[at : at + 1000]
            some = [c for c in some if not self._has_no_place(c, refused)]
            made = formats.render(some, self._format, self._tokenizer, threads=threads)
            for conversation, one in zip(some, made):
                reason = one.fault()
                if reason is not None:
                    refused.add(conversation.source, conversation.path, reason)
                    continue
                if len(one.ids) > self._most:
                    if self._config.long_conversations == "drop":
                        self._counts["dropped"] += 1
                        continue
                    one = one.cut(self._most)
                    self._counts["truncated"] += 1
                    if not any(one.learnt[1:]):
                        self._counts["emptied"] += 1
                        continue
                yield conversation, one

    def _has_no_place(self, conversation: Conversation, refused: Refused) -> bool:
        """Whether the format has no spelling for it: then it is refused."""
        reason = formats.unspellable(conversation, self._format)
        if reason is not None:
            refused.add(conversation.source, conversation.path, reason)
        return reason is not None

    def _pack(self, window: Sequence[tuple[Conversation, formats.Rendered]]) -> None:
        rendered = [one for _, one in window]
        if self._end_id is None:
            rows = pack.segmented(rendered, self._columns)
        else:
            rows = pack.lemur_compat(rendered, self._columns, self._end_id)
        for row in rows:
            # Numbered as they are packed: a row's documents are neighbours.
            numbers = [
                self._writer.add_document(f"{window[i][0].source}/{window[i][0].path}")
                for i in row.conversations
            ]
            self._writer.append_rows(
                row.tokens[None],
                row.segments[None],
                np.array([[numbers[0], numbers[-1]]]),
                row.loss[None],
            )
            self._counts["rows"] += 1
            learnt = row.tokens[row.loss == 1]
            self._targets += np.bincount(learnt, minlength=len(self._targets))
            self._counts["learnt_tokens"] += len(learnt)
            self._counts["tokens"] += int(np.count_nonzero(row.segments))
        self._counts["conversations"] += len(window)

    def _append_empty(self, rows: int) -> None:
        number = self._writer.documents
        for _ in range(rows):
            blank = np.zeros((1, self._columns), np.uint16)
            none = np.array([[number, number - 1]])  # an empty range
            self._writer.append_rows(blank, blank, none, blank)


def _entropy(counts: np.ndarray) -> float:
    """Nats of the distribution proportional to `counts`, those of the learnt targets."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
