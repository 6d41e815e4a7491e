"""A conversation, and what is wrong with it."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import NamedTuple

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn: `role` is one of ROLES, `content` is text as it was written."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What is rendered and learnt.

    Attributes:
      messages: turns in order; for `completion`, a user and an assistant message.
      path: where it came from: "file:record", for messages and provenance.
      source: name of its ChatSourceConfig.
      split: "train" or "validation".
      completion: a plain prompt and its continuation, which no chat format surrounds.
      meta: other fields of its record that steps may ask for, such as "lang".
    """

    messages: tuple[Message, ...]
    path: str
    source: str = ""
    split: str = "train"
    completion: bool = False
    meta: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """All contents, one after another: what cleaning steps look at."""
        return "\n".join(message.content for message in self.messages)


def fault(messages: tuple[Message, ...]) -> str | None:
    """Why these turns cannot be learnt from, or None.

    Legal is an optional system message, then user and assistant in turn; the last may be a user's,
    which is shown and not learnt (as the original did).
    """
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            return f"unknown role {message.role!r}"
        # An empty system message is a format of its own (MINT's); other turns must say something.
        if not message.content.strip() and message.role != "system":
            return "empty content"
        if message.role == "system" and number:
            return "not alternating: a system message after the first turn"
    turns = [message.role for message in messages if message.role != "system"]
    if "assistant" not in turns:
        return "no assistant turn"
    if turns[0] != "user":
        return "not alternating: it begins with the assistant"
    for before, after in itertools.pairwise(turns):
        if before == after:
            return f"not alternating: two {after} turns in a row"
    return None
