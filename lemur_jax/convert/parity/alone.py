"""One model with no twin to compare it with: what can be said, and how sure it is.

Facts: see facts.py. Evidence: how likely a text is
under each candidate mistake, with the difference to the model as it is token by token. A candidate
is named only if the text becomes likelier by a margin and by several standard errors, no other
mistake explains it as well, and the result is a model that has learnt something; everything short
of that is said to be undecided.
"""

import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lemur_jax.config import ConfigError
from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.parity.candidates import AS_IT_IS, Candidate, candidates, name
from lemur_jax.convert.parity.facts import facts
from lemur_jax.convert.parity.finding import Finding
from lemur_jax.convert.parity.likelihood import losses
from lemur_jax.convert.parity.weights import Weights
from lemur_jax.convert.small_files import TOKENIZER_DIR

if TYPE_CHECKING:
    from lemur_jax.data.tokenizer import Tokenizer

# Nats per token by which a text must become likelier, and in how many standard errors: with some
# forty candidates tried, one in 7000 healthy models would pass 4.5 if errors were normal.
_MARGIN = 0.02
_SURE = 4.5
_HOPELESS = ("not_finite", "bit_flip", "constant")
_RIVAL = 3.0  # standard errors: a mistake that is no worse than this explains it as well
_LEARNT = 0.5  # nats per token below the uniform distribution, or the model knows nothing
_ROUNDS = 3
_MIN_TOKENS, _MAX_TOKENS = 128, 1024
_OPERATIONS = 2e14  # of one pass: an hour at 50 GFLOP/s; a 70B model needs more

PASSAGE = '''\
The river rises in the hills to the north of the town and runs slowly through the fields. In the
spring, when the snow melts, it is often twice as wide as it is in the summer, and the people who
live near it have learned to build their houses on the higher ground. There is an old bridge of
stone, and a mill that has not been used for many years. The mill was built by a family of farmers,
and for a long time everyone in the town bought their bread from them. When the last of the family
left, the mill was closed, and the wheel was taken away. Today there is a small museum in it, where
children can see how the grain was made into flour and how the flour was made into bread.

def count_words(path):
    """Return the number of times that each word appears in a file."""
    counts = {}
    with open(path) as file:
        for line in file:
            for word in line.split():
                counts[word] = counts.get(word, 0) + 1
    return counts


class Stack:
    """A last-in, first-out list of items."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("the stack is empty")
        return self.items.pop()

    def __len__(self):
        return len(self.items)
'''


@dataclass(frozen=True)
class Verdict:
    """What a text says.

    Attributes:
      findings: the mistakes, one for each round that found one.
      lines: for the report: losses, and how sure it is.
    """

    findings: list[Finding]
    lines: list[str]


def judge(weights: Weights, text: str | Path | None, say: Callable[[str], None]) -> list[Finding]:
    """Facts and evidence about one model; `say` takes the lines about how sure it is."""
    if text is not None and not Path(text).is_file():
        raise ConversionError([f"--text={text} is not a file: give a text file in UTF-8"])
    tokenizer, missing = None, ""
    try:
        tokenizer = _tokenizer(weights)
    except ConfigError as error:
        missing = str(error)
    found = list(facts(weights, tokenizer and tokenizer.vocab_size))
    if any(f.kind in _HOPELESS for f in found):
        say("alone: with such weights no text says anything: put them right first")
        return found
    try:
        if tokenizer is None:
            raise ConfigError([missing])
        tokens = _tokens(weights, tokenizer, text)
    except ConfigError as error:
        say(f"alone: no text can be judged, so nothing is said about what only it shows: {error}")
        return found
    tried = len(candidates(weights.config))
    work = 2 * _parameters(weights) * tried * len(tokens)
    say(f"alone: plan: {tried} mistakes on {len(tokens)} tokens, {work:.0e} operations a fault")
    verdict = by_text(weights, tokens)
    for line in verdict.lines:
        say(f"alone: {line}")
    return [*found, *verdict.findings]


def _tokenizer(weights: Weights) -> "Tokenizer":
    """The model's own tokenizer. Raises ConfigError, naming the model: it has none that works."""
    # Imported late: the tokenizers' libraries are needed here only.
    from lemur_jax.data.tokenizer import JSON, MODEL, Tokenizer

    path = weights.source.path
    files = {}
    for file, content in weights.source.files().items():
        folder, _, rest = file.partition("/")
        if folder == TOKENIZER_DIR:
            files[rest] = content
    if not {JSON, MODEL} & files.keys():
        raise ConfigError(
            [f"{path} holds neither {MODEL} nor {JSON}: put the model's tokenizer beside it"]
        )
    with tempfile.TemporaryDirectory() as directory:
        for file, content in files.items():
            (Path(directory) / file).write_bytes(content)
        try:
            return Tokenizer.load(directory)
        except ConfigError as error:  # in the user's words: no temporary directory
            raise ConfigError([p.replace(directory, path) for p in error.problems]) from error


def _tokens(weights: Weights, tokenizer: "Tokenizer", text: str | Path | None) -> np.ndarray:
    """Ids of the text by the model's own tokenizer."""
    content = PASSAGE if text is None else Path(text).read_text(encoding="utf-8")
    ids = tokenizer.encode(content, bos=tokenizer.bos_id is not None)
    ids = np.array(ids[: _length(weights)], np.int64)
    if len(ids) < 32 or ids.max() >= weights.config.vocab_size:
        raise ConfigError(
            [
                f"the text has {len(ids)} tokens, the largest id {ids.max(initial=0)}, the model "
                f"{weights.config.vocab_size} rows: give a longer --text, or the right tokenizer"
            ]
        )
    return ids


def _length(weights: Weights) -> int:
    """How many tokens of the text are used."""
    each = 2 * _parameters(weights) * len(candidates(weights.config))
    return int(np.clip(_OPERATIONS / each, _MIN_TOKENS, _MAX_TOKENS))


def _parameters(weights: Weights) -> int:
    """Of all layers."""
    each = sum(int(np.prod(weights.shape(leaf))) for leaf in weights.layer_leaves)
    return each * weights.config.layers


# ---------------------------------------------------------------------------------------------
# Evidence
# ---------------------------------------------------------------------------------------------


def by_text(weights: Weights, tokens_T: np.ndarray) -> Verdict:
    """Mistakes that a text speaks for, one after another until it speaks for no more."""
    cure, found, lines = AS_IT_IS, [], []
    uniform = math.log(weights.config.vocab_size)
    tried = [AS_IT_IS, *candidates(weights.config)]
    for _ in range(_ROUNDS):
        nats = losses(weights, tokens_T, [cure + each for each in tried], _progress(weights))
        means = nats.mean(axis=1)
        best = int(means.argmin())
        margin, sure = _gain(nats[0], nats[best])
        if best == 0 or margin < _MARGIN or sure < _SURE:
            lines += _nothing_better(tried, means, nats, uniform, bool(found))
            break
        chosen = tried[best]
        lines.append(
            f"{name(chosen)}: the text costs {means[best]:.3f} nats/token in place of "
            f"{means[0]:.3f} ({sure:.0f} standard errors over {nats.shape[1]} tokens; uniform "
            f"{uniform:.2f})"
        )
        rivals = _rivals(nats, means, best)
        if rivals:
            lines += [f"or {name(tried[i])}: {means[i]:.3f}" for i in rivals]
            names = "; or ".join(name(tried[i]) for i in (best, *rivals))
            what = f"is wrong, and the text cannot tell in which way: {names}"
            found.append(Finding("ambiguous", "one thing", None, what, "give a longer --text"))
            break
        what = f"{chosen.what} (judged by a text alone, {sure:.0f} standard errors)"
        layers = range(weights.config.layers) if chosen.subject.startswith("layers/") else [None]
        found += [Finding(chosen.kind, chosen.subject, i, what, chosen.fix) for i in layers]
        cure = cure + chosen
    if found and means.min() > uniform - _LEARNT:
        lines.append("undecided: even so the model knows nothing of the text; nothing is named")
        found = []
    return Verdict(found, lines)


def _rivals(nats: np.ndarray, means: np.ndarray, best: int) -> list[int]:
    """Candidates that explain the text about as well as the best."""
    return [
        int(i)
        for i in np.argsort(means)
        if i not in (0, best) and means[i] < means[0] and _gain(nats[i], nats[best])[1] < _RIVAL
    ]


def _nothing_better(tried: list[Candidate], means, nats, uniform: float, again: bool) -> list[str]:
    order = [i for i in np.argsort(means) if i != 0]
    near = order[0]
    margin, sure = _gain(nats[0], nats[near])
    more = "with that, " if again else ""
    if means[0] > uniform - _LEARNT:
        return [
            f"undecided: {more}the text costs {means[0]:.3f} nats/token, uniform guessing "
            f"{uniform:.2f}, and no single mistake of {len(order)} tried makes it learnt: an "
            "untrained model, another language, or several faults"
        ]
    if margin >= _MARGIN and means[near] < uniform - _LEARNT:
        return [
            f"undecided: {more}the text costs {means[0]:.3f} nats/token (uniform {uniform:.2f}); "
            f"if {name(tried[near])}, {means[near]:.3f}, but only by {sure:.1f} standard errors, "
            f"and {_SURE} are wanted: give a longer --text"
        ]
    alike = [name(tried[i]) for i in order if abs(means[i] - means[0]) < _MARGIN][:6]
    lines = [
        f"{more}the text costs {means[0]:.3f} nats/token (uniform {uniform:.2f}); none of "
        f"{len(order)} mistakes tried makes it likelier by {_MARGIN} (closest: "
        f"{name(tried[near])}, {means[near]:.3f})"
    ]
    if alike:
        lines.append(f"undecided by this text, it makes no difference: {'; '.join(alike)}")
    return lines


def _gain(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Nats per token gained, and in standard errors of the paired differences."""
    gain = np.clip(before, None, 100) - np.clip(after, None, 100)
    error = float(gain.std(ddof=1)) / math.sqrt(len(gain))
    return float(gain.mean()), float(gain.mean()) / max(error, 1e-9)


def _progress(weights: Weights) -> Callable[[int], None]:
    def show(layer: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if layer == weights.config.layers - 1 else ""
            print(
                f"\rtext: layer {layer + 1} of {weights.config.layers} ", end=end, file=sys.stderr
            )

    return show
