"""Chat formats: how turns are spelled, and which parts of them are learnt.

A format is a value: how a turn is spelled. The seven spellings of ChatML under which Lemur-Chat
was trained, published and measured differ in a newline, a default system message or a BOS, and
each has its own name here:

    chatml             training, xchat/train/train.py; contents stripped, one BOS, no EOS
    chatml_card        the model card: a newline before the system message's <|im_end|>
    chatml_fastchat    FastChat's template: a default system message, contents as they are
    chatml_mint        MINT's runs: FastChat's with an empty system message
    chatml_intercode   InterCode's policy: a newline before every <|im_end|>
    chatml_xchat       xchat's evaluations: no BOS, no system message, the answer may be begun
    chatml_openagents  OpenAgents: its server is FastChat's, so its text is (not published)
    tulu, llama2       for comparison; Tulu as train.py writes it, Llama-2 as Meta's llama does
"""

import dataclasses
from collections.abc import Sequence

from lemur_jax.config import ConfigError
from lemur_jax.data.chat.conversation import Conversation, Message

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
