"""A user's message as a chat model was taught to read it: `lemur sample --chat`."""

import dataclasses
from collections.abc import Callable

from lemur_jax.config import ConfigError
from lemur_jax.data.chat import formats
from lemur_jax.data.chat.conversation import Conversation, Message
from lemur_jax.data.chat.template import format_of
from lemur_jax.data.tokenizer import Tokenizer
from lemur_jax.sample.request import Request


def as_chat(tokenizer: Tokenizer, system: str | None = None) -> Callable[[Request], Request]:
    """A function that turns a request's text into token ids of a rendered chat.

    The format is the one that was written beside the tokenizer when the model was tuned
    (chat_format.json). The prompt becomes a user's message, behind it stands the header of an
    answer, and the format's end of a turn (<|im_end|>) ends the text.

    Args:
      tokenizer: the model's.
      system: a system message before it; None: the format's own, if it has one.

    Raises:
      ConfigError: the tokenizer has no chat format; or, by the function, a prompt that is empty or
        is token ids already.
    """
    chat_format = format_of(tokenizer)
    stop = chat_format.stop
    stop_id = tokenizer.eos_id if stop == formats.EOS else tokenizer.id_of(stop)

    def render(request: Request) -> Request:
        if not isinstance(request.prompt, str) or not request.prompt.strip():
            raise ConfigError(["prompt must be a user's message for --chat: a text, not empty"])
        messages = [Message("user", request.prompt)]
        if system is not None:
            messages.insert(0, Message("system", system))
        conversation = Conversation(tuple(messages), "--prompt")
        made = formats.render([conversation], chat_format, tokenizer, answer="")[0]
        stop_ids = (*request.stop_ids, *([] if stop_id is None else [stop_id]))
        return dataclasses.replace(request, prompt=made.ids, stop_ids=stop_ids)

    return render
