"""The one function that renders a conversation and says what is learnt of it.

Text between special tokens is tokenised by itself, with SentencePiece's dummy prefix each time
(transformers' `legacy=True`, under which Lemur was trained): "\\n" after <|im_end|> is two ids, "▁"
and the byte. Special tokens are spliced in as ids and never parsed out of text, so a user who
types "<|im_end|>" gets the pieces of those ten characters.

What is learnt: an assistant's content and what ends its turn (<|im_end|> and "\\n"), not the header
before it. A border inside of a stretch of text is where the tokens of the text before it end, found
by tokenising that prefix again, as train.py did. With Llama-2's tokenizer "\\n" is a byte piece
that nothing merges with, so such a prefix is always a prefix of the ids.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

from lemur_jax.config import ConfigError
from lemur_jax.data.chat.conversation import Conversation
from lemur_jax.data.chat.spelling import (
    BOS,
    END,
    EOS,
    FORMATS,
    START,
    ChatFormat,
    Part,
    Special,
    Text,
    format_named,
    parts_of,
    unspellable,
)
from lemur_jax.data.tokenizer import Tokenizer

__all__ = [
    "BOS",
    "END",
    "EOS",
    "FORMATS",
    "START",
    "ChatFormat",
    "Part",
    "Rendered",
    "Special",
    "Text",
    "check_specials",
    "end_of_conversation",
    "format_named",
    "parts_of",
    "render",
    "unspellable",
]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as training reads it.

    Attributes:
      ids: token ids.
      learnt: for each id, whether it is learnt as a target.
    """

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]

    def cut(self, most: int) -> "Rendered":
        """The first `most` tokens."""
        return Rendered(self.ids[:most], self.learnt[:most])

    def fault(self) -> str | None:
        """Why this mask cannot be meant, or None. The first token is never a target."""
        targets = self.learnt[1:]
        if not any(targets):
            return "mask of 0 %: no token of it would be learnt"
        if all(targets):
            return "mask of 100 %: every token of it would be learnt, the question included"
        return None


def render(
    conversations: Iterable[Conversation],
    chat_format: ChatFormat,
    tokenizer: Tokenizer,
    *,
    answer: str | None = None,
    threads: int = 1,
) -> list[Rendered]:
    """Token ids and loss mask of each conversation.

    Args:
      conversations: with legal turns.
      chat_format: how they are spelled.
      tokenizer: must have `chat_format.specials` as single ids that no text becomes.
      answer: see `parts_of`: what a sampler renders.
      threads: of the tokenizer.

    Raises ConfigError when the tokenizer does not fit the format (`check_specials`).
    """
    check_specials(tokenizer, chat_format)
    spelled = [_stretches(parts_of(c, chat_format, answer)) for c in conversations]
    wanted = {
        prefix: None
        for stretches in spelled
        for stretch in stretches
        if not isinstance(stretch, Special)
        for prefix in _prefixes(stretch)
    }
    ids_of = dict(zip(wanted, tokenizer.encode_batch(list(wanted), threads=threads)))
    special_of = functools.cache(lambda token: _special_id(tokenizer, token))
    return [_assemble(stretches, ids_of, special_of) for stretches in spelled]


def _stretches(parts: Sequence[Part]) -> list[Special | list[Text]]:
    """Neighbouring texts gathered: each list is one stretch between special tokens."""
    stretches: list[Special | list[Text]] = []
    for part in parts:
        if isinstance(part, Special):
            stretches.append(part)
        elif stretches and isinstance(stretches[-1], list):
            stretches[-1].append(part)
        else:
            stretches.append([part])
    return stretches


def _prefixes(stretch: Sequence[Text]) -> list[str]:
    """The texts up to each border at which `learnt` changes, the last one being the whole."""
    text, found = "", []
    for part, following in zip(stretch, [*stretch[1:], None]):
        text += part.text
        if following is None or following.learnt != part.learnt:
            found.append(text)
    return found


def _assemble(stretches, ids_of, special_of) -> Rendered:
    ids: list[int] = []
    learnt: list[bool] = []
    for stretch in stretches:
        if isinstance(stretch, Special):
            ids.append(special_of(stretch.token))
            learnt.append(stretch.learnt)
            continue
        prefixes = _prefixes(stretch)
        whole = ids_of[prefixes[-1]]
        flags = [True] * len(whole)
        start, flag = 0, stretch[0].learnt
        for prefix in prefixes:
            end = len(ids_of[prefix])
            if not flag:  # a prefix may have more ids than the whole has: slices stay inside
                flags[start:end] = [False] * len(flags[start:end])
            start, flag = end, not flag
        ids += whole
        learnt += flags
    return Rendered(tuple(ids), tuple(learnt))


def _special_id(tokenizer: Tokenizer, token: str) -> int:
    if token in (BOS, EOS):  # raises when the tokenizer has none
        return tokenizer.encode("", bos=token == BOS, eos=token == EOS)[0]
    return tokenizer.id_of(token)


def check_specials(tokenizer: Tokenizer, chat_format: ChatFormat) -> None:
    """Raises ConfigError when a special token of the format is not one id, or text becomes it."""
    if chat_format.bos:
        _special_id(tokenizer, BOS)  # raises when the tokenizer has none
    problems = []
    for token in chat_format.specials:
        index, pieces = tokenizer.id_of(token), tokenizer.encode(token)
        if index is None:
            shown = " ".join(tokenizer.piece(piece) for piece in pieces[:12])
            problems.append(
                f"tokenizer {str(tokenizer.directory)!r} splits {token!r} into {len(pieces)} "
                f"pieces ({shown}), but chat_format={chat_format.name!r} needs it as one id: add "
                "the tokens to model and tokenizer with `lemur convert MODEL OUT "
                "--add_tokens=chatml` and use OUT as tokenizer and as TrainConfig.init_from"
            )
        elif index in pieces:
            problems.append(
                f"tokenizer {str(tokenizer.directory)!r} makes id {index} of the text {token!r}: a "
                "user could end a turn by typing it; use a tokenizer that has it as an added "
                "token (`lemur convert MODEL OUT --add_tokens=chatml`), not as a trained piece"
            )
    if problems:
        raise ConfigError(problems)


def end_of_conversation(tokenizer: Tokenizer, chat_format: ChatFormat, packing: str) -> int | None:
    """Id of the token that lemur_compat packing puts after a conversation; None for segmented.

    Raises ConfigError when the tokenizer does not have it.
    """
    if packing == "segmented":
        return None
    token = chat_format.end_of_conversation
    index = _special_id(tokenizer, token)
    if index is None:
        raise ConfigError(
            [
                f"tokenizer {str(tokenizer.directory)!r} has no {token!r}, which "
                f"packing='lemur_compat' puts after each conversation of {chat_format.name!r}: add "
                f"it with `lemur convert MODEL OUT --add_tokens='{token}'`"
            ]
        )
    return index
