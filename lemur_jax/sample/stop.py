"""From token ids to the text that a user sees: whole characters, cut before a stop string."""

from collections.abc import Sequence
from typing import Protocol


class TextStream(Protocol):
    """Incremental decoder of a tokenizer: `push` returns the text that an id completes."""

    def push(self, index: int) -> str: ...

    def flush(self) -> str: ...


class StopStrings:
    """Cuts a text that arrives in pieces before the first stop string.

    The first stop string is the one that is complete first; of those complete at the same
    character the longest, which begins earliest. That does not depend on how the text is cut into
    pieces. What is returned is never taken back: an end of the text that might still grow into a
    stop string is held until it is decided.

    Worked example, stop strings "END" and "\\n\\n": pieces "aE", "N", "O\\n", "\\nb" return
    "a", "", "ENO", "" and then `found` is "\\n\\n".

    Attributes:
      found: the stop string that ended the text, or None.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is now safe to show; "" after a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        # (end, start): earliest end first, then earliest start.
        hits = [
            (at + len(string), at, string)
            for string in self._strings
            if (at := text.find(string)) >= 0
        ]
        if hits:
            _, at, self.found = min(hits)
            self._held = ""
            return text[:at]
        shown = len(text) - self._open_end(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held: the text ends here."""
        held, self._held = self._held, ""
        return held

    def _open_end(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(string.startswith(end) for string in self._strings):
                return length
        return 0


class RowText:
    """The text of one row as its ids arrive. Ids that the tokenizer does not name make no text.

    Attributes:
      ids: ids taken so far, the one that completed a stop string included.
      text: everything returned so far, joined.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str], vocab_size: int):
        self._stream = stream
        self._vocab_size = vocab_size
        self._stop = StopStrings(stop)
        self.ids: list[int] = []
        self.text = ""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was found."""
        return self._stop.found

    def push(self, index: int) -> str:
        """The text that this id makes safe to show."""
        self.ids.append(index)
        piece = self._stream.push(index) if index < self._vocab_size else ""
        return self._show(self._stop.push(piece))

    def finish(self) -> str:
        """The rest: unfinished characters as U+FFFD, and what might have become a stop string."""
        if self.stopped_by is not None:
            return ""
        return self._show(self._stop.push(self._stream.flush()) + self._stop.flush())

    def _show(self, piece: str) -> str:
        self.text += piece
        return piece
