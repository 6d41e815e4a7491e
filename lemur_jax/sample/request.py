"""What is asked of a sampler and what it answers."""

import dataclasses
from typing import Literal

from lemur_jax.config import ConfigError
from lemur_jax.sample import methods


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to continue it. Checks itself; all problems are reported at once.

    Attributes:
      prompt: text, or token ids, which are taken as they are (a rendered chat, for example).
        Text starts with the tokenizer's BOS; an empty prompt is BOS alone.
      max_new_tokens: at most so many; fewer when the model's context ends before (see
        Completion.note), a stop id or a stop string comes.
      temperature: 0 takes the most likely token.
      top_k, top_p, min_p, repetition_penalty: see lemur_jax.sample.methods; neutral by default.
      seed: of this request's draws, in [0, 2^32). The same request with the same seed gives the
        same text wherever it runs in a batch or a file.
      n: samples, which differ in their draws.
      stop: strings that end the text; they are not part of it.
      stop_ids: tokens that end the text, besides the tokenizer's EOS.
      ignore_eos: EOS does not end the text; it is fed back like any token.
      logprobs: also return the log-probability of each token.
    """

    prompt: str | tuple[int, ...]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self):
        for field in ("prompt", "stop", "stop_ids"):  # JSON and callers give lists
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        problems = _integers(self) + methods.check(**self.method_settings()) + _kinds(self)
        if not problems and self.n > 1 and self.temperature == 0:
            problems.append(
                f"n={self.n} with temperature=0 would give the same text {self.n} times: "
                "set a temperature, or n=1"
            )
        if problems:
            raise ConfigError(problems)

    def method_settings(self) -> dict[str, float]:
        """The arguments of methods.standard."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integers(request: Request) -> list[str]:
    problems = []
    for field in ("max_new_tokens", "n"):
        value = getattr(request, field)
        if not _is_int(value) or value < 1:
            problems.append(f"{field}={value!r} must be an integer >= 1")
    if not _is_int(request.seed) or not 0 <= request.seed < 2**32:
        problems.append(f"seed={request.seed!r} must be an integer in [0, 2^32)")
    return problems


def _kinds(request: Request) -> list[str]:
    problems = []
    prompt = request.prompt
    if not isinstance(prompt, str) and not (
        isinstance(prompt, tuple) and all(_is_int(index) for index in prompt)
    ):
        problems.append("prompt must be a string or a list of token ids")
    if not isinstance(request.stop, tuple) or not all(
        isinstance(string, str) and string for string in request.stop
    ):
        problems.append(f"stop={request.stop!r} must be a list of strings, none of them empty")
    if not isinstance(request.stop_ids, tuple) or not all(map(_is_int, request.stop_ids)):
        problems.append(f"stop_ids={request.stop_ids!r} must be a list of token ids")
    texts = [("prompt", prompt)] if isinstance(prompt, str) else []
    texts += [("stop", text) for text in request.stop] if isinstance(request.stop, tuple) else []
    for field, text in texts:
        if isinstance(text, str) and not text.isascii() and not _is_unicode(text):
            problems.append(f"{field}={text!r} holds half of a surrogate pair: not a character")
    for field in ("ignore_eos", "logprobs"):
        if not isinstance(getattr(request, field), bool):
            problems.append(f"{field}={getattr(request, field)!r} must be true or false")
    return problems


def _is_unicode(text: str) -> bool:
    """Whether every code point is a character: JSON can spell "\\ud800" alone."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample of one request.

    Attributes:
      request: index of its request in the call.
      sample: index among the request's n samples.
      text: what follows the prompt, cut before a stop string.
      ids: new tokens. A stop id that ended the text is not among them; all tokens of a stop string
        are, so `text` may be shorter than what they decode to.
      finish_reason: "stop" (EOS, a stop id or a stop string) or "length" (max_new_tokens or the
        end of the context).
      stopped_by: the stop string or stop id; None for "length".
      prompt_tokens: tokens of the prompt, BOS included.
      logprobs: of each of `ids` under the model's own distribution, if they were asked for.
      note: what the caller should know, such as a max_new_tokens that had to be cut.
    """

    request: int
    sample: int
    text: str
    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    stopped_by: str | int | None
    prompt_tokens: int
    logprobs: tuple[float, ...] | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a streamed text. The pieces of a sample, joined, are its completion's text.

    Attributes:
      sample: which of the request's n samples.
      text: never taken back, always whole characters; "" only in a sample's last piece.
      completion: the whole result, in the last piece of the sample.
    """

    sample: int
    text: str
    completion: Completion | None = None
