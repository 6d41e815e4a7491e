"""The parity check as a whole: plan, comparison, diagnosis, and what is printed of it."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.model import open_source
from lemur_jax.convert.parity import alone, configs, diagnose, expanded, places, vocabulary
from lemur_jax.convert.parity.compare import Comparison, compare
from lemur_jax.convert.parity.finding import Finding, Sentence, sentences
from lemur_jax.convert.parity.weights import Weights, of_source, tensor_bytes
from lemur_jax.convert.recognise import recognise

GIB = 2**30
_MIN_TOKENS = 8
# Python, numpy, JAX and its compiled code; blocks in flight.
_BASE_BYTES = int(0.9 * GIB)


@dataclass
class Report:
    """Everything that was found.

    Attributes:
      a, b: the paths; b is None if there was one.
      findings: about weights and config, faults first.
      comparison: of the computation; None where the structures differ.
      layers: how many the model has.
    """

    a: Path
    b: Path | None
    findings: list[Sentence]
    comparison: Comparison | None
    layers: int

    @property
    def same(self) -> bool:
        """No fault, and nothing differs by more than rounding."""
        diverges = self.comparison is not None and self.comparison.first_diverging is not None
        return not diverges and not any(finding.fault for finding in self.findings)


def parity(
    a: str | Path,
    b: str | Path | None = None,
    *,
    tokens: int = 16,
    text: str | Path | None = None,
    transformers: bool = False,
    max_positions: int | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Compares two models layer by layer and says what is the matter.

    Args:
      a: trusted: the numpy reference runs its weights.
      b: our code runs its weights. The same path: our code against the reference. None: the same,
        and the weights are judged by themselves and by a text, with no twin to compare with.
      tokens: of each of two rows, at positions up to twice the model's length.
      text: file whose likelihood judges a model without a twin; None takes a passage of ours. With
        b it is refused: nothing would read it.
      transformers: run A's layers through transformers too, which must be installed.
      max_positions: of Meta's format, which does not say it; refused if neither model is Meta's.
      say: takes each line of the report.

    Raises:
      ConversionError, CheckpointError: a model that cannot be read; names file and tensors.
    """
    if tokens < _MIN_TOKENS:
        raise ConversionError([f"tokens={tokens} is too few: give at least {_MIN_TOKENS}"])
    paths = [a] if b is None or Path(b) == Path(a) else [a, b]
    if text is not None and b is not None:
        problem = f"--text={text} judges one model without a twin: leave out {b}, or --text"
        raise ConversionError([problem])
    of_meta = [recognise(path) == "meta" for path in paths]
    if max_positions is not None and not any(of_meta):
        problem = f"--max_positions={max_positions} is for Meta's weights, which do not say it"
        raise ConversionError([f"{problem}: leave it out, the config of this model says it"])
    first, *other = (
        of_source(open_source(path, max_positions=max_positions if meta else None))
        for path, meta in zip(paths, of_meta)
    )
    second = other[0] if other else first
    for line in plan(first, second, tokens):
        say(line)
    found = list(configs.differences(first.config, second.config, configs.spelling(second.source)))
    comparable = configs.same_structure(first.config, second.config)
    comparison = None
    if comparable:
        comparison, more = _stream(first, second, tokens, transformers)
        found += more
    elif expanded.is_expansion(first.config, second.config):
        found += expanded.diagnose_expansion(first, second)
    if b is None:
        found += alone.judge(first, text, say)
    layers = first.config.layers
    report = Report(
        Path(a), None if b is None else Path(b), sentences(found, layers), comparison, layers
    )
    for line in lines(report):
        say(line)
    return report


def _stream(
    a: Weights, b: Weights, tokens: int, transformers: bool
) -> tuple[Comparison, list[Finding]]:
    found: list[Finding] = []
    sketches = places.Sketches()
    begun = time.monotonic()

    def each_layer(layer: int) -> None:
        if a is not b:
            found.extend(diagnose.diagnose_layer(a, b, layer, sketches))
        if sys.stderr.isatty():
            left = (time.monotonic() - begun) / max(layer, 1) * (a.config.layers - layer)
            eta = f", {left / 60:.0f} min left" if layer else ""
            print(f"\rlayer {layer + 1} of {a.config.layers}{eta} ", end="", file=sys.stderr)

    comparison = compare(a, b, tokens=tokens, each_layer=each_layer, transformers=transformers)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if a is b:
        return comparison, found
    found = places.place_layers(found, sketches)
    return comparison, [*found, *vocabulary.diagnose_vocabulary(a, b)]


# ---------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------


def plan(a: Weights, b: Weights, tokens: int) -> list[str]:
    """What will be read and held, before anything of it happens."""
    peak = peak_bytes(a, b, tokens)
    twice = f"A {a.nbytes() / GIB:.2f} GiB" + (
        f", B {b.nbytes() / GIB:.2f} GiB" if b is not a else " (A and B are one)"
    )
    last = 2 * max(a.config.max_positions, 4096) - 1
    return [
        f"plan: {a.config.layers} layers, one at a time; {twice}",
        f"plan: 2 rows of {tokens} tokens at positions 0 to {last}; reference in float64",
        f"plan: at most about {peak / GIB:.1f} GiB of memory",
    ]


def peak_bytes(a: Weights, b: Weights, tokens: int) -> int:
    """An estimate of the largest resident memory of a comparison."""
    layer = sum(tensor_bytes(b, leaf) for leaf in b.layer_leaves)
    largest = max(a.layer_leaves, key=lambda leaf: tensor_bytes(a, leaf))
    stored = tensor_bytes(a, largest)
    elements = stored // a.dtype(largest).itemsize
    widened = 4 * elements if a.dtype(largest).itemsize < 4 else stored
    computing = layer + stored * 3 // 2 + widened
    diagnosing = 3 * stored if a is not b else 0
    states = 2 * 2 * tokens * a.config.embed * 4 * (a.config.layers + 100)
    return _BASE_BYTES + max(computing, diagnosing) + states


def lines(report: Report) -> list[str]:
    """The report as text."""
    out = []
    if report.comparison is not None:
        out += _table(report.comparison)
        if (where := report.comparison.first_not_finite) is not None:
            out.append(
                f"note: A's own result is not finite from {where[1]!r} of layer {where[0]} on"
            )
    for sentence in report.findings:
        word = "FAULT" if sentence.fault else "note"
        out.append(f"{word}: {sentence.text}" + (f". Fix: {sentence.fix}" if sentence.fix else ""))
    if report.comparison is None:
        out.append(
            "verdict: NOT the same; the models have different shapes or structures, so nothing "
            "else was compared"
        )
    elif report.same:
        same = "the same" if report.b else "no fault found, and our code agrees with the reference"
        within = "float32 rounding"
        if any(sentence.kind == "rounded" for sentence in report.findings):
            same, within = "the same but for rounding of weights to 16 bits", "what that explains"
        out.append(f"verdict: {same}; every operation is within {within}")
    else:
        wrong = "NOT the same" if report.b else "faults found"
        out.append(f"verdict: {wrong}{_first(report.comparison)}")
        if not any(sentence.fault for sentence in report.findings):
            out[-1] += ", by more than the notes explain" if report.findings else ""
    return out


def _first(comparison: Comparison) -> str:
    if (where := comparison.first_diverging) is None:
        return ", though every operation is within rounding on these tokens"
    return f"; the first operation that differs is {where[1]!r} of {_place(where[0], comparison)}"


def _place(layer: int, comparison: Comparison) -> str:
    if layer < 0 or layer == len(comparison.layers) - 2:
        return "the model's ends"
    return f"layer {layer}"


def _table(comparison: Comparison) -> list[str]:
    out = [f"{'layer':>9} {'max abs':>9} {'budget':>9} {'KL nats':>9}  operations that differ"]
    for result in comparison.layers:
        wrong = ", ".join(op.name for op in result.ops if op.diverges)
        whole = result.whole or max(result.ops, key=lambda op: op.max_abs / max(op.budget, 1e-300))
        kl = "" if result.logits is None else f"{result.logits.kl:.1e}"
        name = {-1: "embedding", len(comparison.layers) - 2: "head"}.get(result.layer, result.layer)
        out.append(
            f"{name:>9} {whole.max_abs:>9.1e} {whole.budget:>9.1e} {kl:>9}  "
            f"{wrong or result.first_diverging or '-'}"
        )
        if result.theirs is not None and result.theirs.diverges:
            out.append(f"{'':>9} transformers' layer is {result.theirs.max_abs:.1e} off")
        out += [f"{'':>9} {note}" for note in result.notes]
    if theirs := [r.theirs for r in comparison.layers if r.theirs is not None]:
        worst = max(theirs, key=lambda op: op.max_abs / max(op.budget, 1e-300))
        out.append(f"transformers' layers: max abs {worst.max_abs:.1e}, budget {worst.budget:.1e}")
    pairs = (("A and B", comparison.final), ("A in float64 and float32", comparison.rounding))
    for what, d in pairs:
        out.append(
            f"final logits, {what}: max abs {d.max_abs:.2e}, KL {d.kl:.2e} nats (worst token "
            f"{d.kl_max:.2e}), same first choice {d.same_choice:.0%}"
        )
    return out
