"""Chat formats, and the one function that renders a conversation and says what is learnt of it.

A format is a value: how a turn is spelled. The seven spellings of ChatML under which Lemur-Chat
was trained, published and measured differ in a newline, a default system message or a BOS, and
each has its own name here (lemur_70b_chat in the middle column):

    chatml             training, xchat/train/train.py; contents stripped, one BOS, no EOS
    chatml_card        the model card: a newline before the system message's <|im_end|>
    chatml_fastchat    FastChat's template: a default system message, contents as they are
    chatml_mint        MINT's runs: FastChat's with an empty system message
    chatml_intercode   InterCode's policy: a newline before every <|im_end|>
    chatml_xchat       xchat's evaluations: no BOS, no system message, the answer may be begun
    chatml_openagents  OpenAgents: its server is FastChat's, so its text is (not published)
    tulu, llama2       for comparison; Tulu as train.py writes it, Llama-2 as Meta's llama does

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
from lemur_jax.data.chat.conversation import Conversation, Message
from lemur_jax.data.tokenizer import Tokenizer

START, END = "<|im_start|>", "<|im_end|>"
BOS, EOS = "bos", "eos"  # of the tokenizer, whatever it spells them
FASTCHAT_SYSTEM = "You are a helpful, respectful, and honest assistant."


@dataclasses.dataclass(frozen=True)
class Special:
    """A token that is spliced in as its id: a spelling, or BOS or EOS of the tokenizer."""

    token: str
    learnt: bool = False


@dataclasses.dataclass(frozen=True)
class Text:
    """Text. Neighbouring texts are tokenised as one; the border is found by the prefix rule."""

    text: str
    learnt: bool = False


Part = Special | Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a conversation is spelled.

    Attributes:
      name: key in FORMATS.
      family: chatml, tulu or llama2: what surrounds a turn.
      bos: begins with the tokenizer's BOS (llama2: every round does).
      strip: contents lose the whitespace around them.
      default_system: content of the system message of a conversation that has none; None adds none.
      newline_before_end: roles whose content is followed by a newline before <|im_end|>.
      system_allowed: False refuses a conversation with a system message.
      end_of_conversation: the token that `lemur_compat` packing puts after each conversation.
    """

    name: str
    family: str = "chatml"
    bos: bool = True
    strip: bool = True
    default_system: str | None = None
    newline_before_end: tuple[str, ...] = ()
    system_allowed: bool = True
    end_of_conversation: str = EOS

    @property
    def specials(self) -> tuple[str, ...]:
        """Added tokens that the tokenizer must have, each as one id."""
        return {"chatml": (START, END)}.get(self.family, ())

    @property
    def stop(self) -> str:
        """The token that ends an answer."""
        return END if self.family == "chatml" else EOS


_ALL = (
    ChatFormat(name="chatml"),
    ChatFormat(name="chatml_card", newline_before_end=("system",)),
    ChatFormat(name="chatml_fastchat", strip=False, default_system=FASTCHAT_SYSTEM),
    ChatFormat(name="chatml_mint", strip=False, default_system=""),
    ChatFormat(
        name="chatml_intercode",
        strip=False,
        newline_before_end=("system", "user", "assistant"),
    ),
    ChatFormat(name="chatml_xchat", bos=False, strip=False, system_allowed=False),
    ChatFormat(name="chatml_openagents", strip=False, default_system=FASTCHAT_SYSTEM),
    ChatFormat(name="tulu", family="tulu", end_of_conversation="<|end_of_conv|>"),
    ChatFormat(name="llama2", family="llama2"),
)
FORMATS = {chat_format.name: chat_format for chat_format in _ALL}


def format_named(name: str, field: str = "chat_format") -> ChatFormat:
    """The format of that name. Raises ConfigError naming `field` and what is legal."""
    if name not in FORMATS:
        raise ConfigError([f"{field}={name!r} is unknown; legal: {', '.join(FORMATS)}"])
    return FORMATS[name]


# ---------------------------------------------------------------------------------------------
# Spelling: messages to parts
# ---------------------------------------------------------------------------------------------


def parts_of(
    conversation: Conversation, chat_format: ChatFormat, answer: str | None = None
) -> list[Part]:
    """The conversation spelled out.

    Args:
      conversation: with legal turns (conversation.fault), or a plain completion.
      chat_format: how.
      answer: None, or the beginning of an assistant's turn that a model shall continue: "" or the
        text that is put into its mouth.
    """
    if conversation.completion:
        return _completion(conversation.messages)
    messages = list(conversation.messages)
    if chat_format.default_system is not None and messages[0].role != "system":
        messages.insert(0, Message("system", chat_format.default_system))
    if (reason := unspellable(conversation, chat_format)) is not None:
        raise ConfigError([f"{conversation.path}: {reason}"])
    if chat_format.strip:
        messages = [Message(role, content.strip()) for role, content in messages]
    spell = {"chatml": _chatml, "tulu": _tulu, "llama2": _llama2}[chat_format.family]
    return spell(messages, chat_format, answer)


def unspellable(conversation: Conversation, chat_format: ChatFormat) -> str | None:
    """Why the format has no spelling for this conversation, or None."""
    has_system = conversation.messages[0].role == "system"
    if has_system and not chat_format.system_allowed and not conversation.completion:
        return (
            f"chat_format={chat_format.name!r} has no system message: remove it, or use "
            "chat_format='chatml'"
        )
    return None


def _chatml(messages: Sequence[Message], how: ChatFormat, answer: str | None) -> list[Part]:
    parts: list[Part] = [Special(BOS)] if how.bos else []
    for role, content in messages:
        learnt = role == "assistant"
        ending = "\n" if role in how.newline_before_end else ""
        parts += [Special(START), Text(f"{role}\n"), Text(content + ending, learnt)]
        parts += [Special(END, learnt), Text("\n", learnt)]
    if answer is not None:
        parts += [Special(START), Text("assistant\n" + answer)]
    return parts


def _tulu(messages: Sequence[Message], how: ChatFormat, answer: str | None) -> list[Part]:
    parts: list[Part] = [Special(BOS)] if how.bos else []
    for role, content in messages:
        parts.append(Text(f"<|{role}|>\n"))
        if role == "assistant":
            parts += [Text(content, True), Special(EOS, True), Text("\n", True)]
        else:
            parts.append(Text(content + "\n"))
    if answer is not None:
        parts.append(Text("<|assistant|>\n" + answer))
    return parts


def _llama2(messages: Sequence[Message], how: ChatFormat, answer: str | None) -> list[Part]:
    parts: list[Part] = []
    system = ""
    for role, content in messages:
        if role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            parts += [Special(BOS), Text(f"[INST] {system}{content} [/INST]")]
            system = ""
        else:
            parts += [Text(f" {content} ", True), Special(EOS, True)]
    if answer:
        parts.append(Text(" " + answer))
    return parts


def _completion(messages: Sequence[Message]) -> list[Part]:
    """A prompt and its continuation, with a space between them unless one of them has one."""
    prompt, completion = (message.content for message in messages)
    blank = (" ", "\n", "\t")
    between = "" if prompt.endswith(blank) or completion.startswith(blank) else " "
    return [Special(BOS), Text(prompt), Text(between + completion, True), Special(EOS, True)]


# ---------------------------------------------------------------------------------------------
# Ids and mask
# ---------------------------------------------------------------------------------------------


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
