"""The chat format that travels with a tokenizer: for `lemur sample --chat` and for transformers."""

import json
from pathlib import Path

from lemur_jax.config import ConfigError
from lemur_jax.data.chat.formats import END, START, ChatFormat, format_named
from lemur_jax.data.tokenizer import Tokenizer

FILE = "chat_format.json"
JINJA = "chat_template.jinja"

# transformers' apply_chat_template with this makes the text of format "chatml"; its own tokenizer
# then parses special tokens that a user typed, which `formats.render` does not.
_CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_format(directory: Path, chat_format: ChatFormat) -> None:
    """Writes chat_format.json and, for plain chatml, chat_template.jinja."""
    content = {"chat_format": chat_format.name}
    (directory / FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")
    if chat_format.name == "chatml":
        (directory / JINJA).write_text(_CHATML, encoding="utf-8")
    else:
        (directory / JINJA).unlink(missing_ok=True)  # another format's would be wrong


def format_of(tokenizer: Tokenizer) -> ChatFormat:
    """The format that was written beside a tokenizer; chatml when it has ChatML's tokens.

    Raises ConfigError when it has neither.
    """
    path = tokenizer.directory / FILE
    if path.is_file():
        try:
            name = json.loads(path.read_text(encoding="utf-8"))["chat_format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError([f"{path} is damaged ({error}): remove or restore it"]) from error
        return format_named(name, f"{path}: chat_format")
    if all(tokenizer.id_of(token) is not None for token in (START, END)):
        return format_named("chatml")
    raise ConfigError(
        [
            f"{tokenizer.directory} has no {FILE} and its tokenizer no {END}: this model has not "
            "been taught to chat; leave --chat out"
        ]
    )
