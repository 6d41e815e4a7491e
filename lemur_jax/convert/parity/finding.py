"""What the diagnosis says: findings about tensors, gathered into sentences about layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from lemur_jax.convert import tables

_THEIRS = {
    rule.ours: rule.theirs.removesuffix(".weight")
    for rule in (*tables.HF_LLAMA, *tables.HF_ATTENTION_BIAS, *tables.HF_MLP_BIAS)
}


def short_name(leaf: str) -> str:
    """What people call a tensor: "q_proj" of layers/wq; of "a+b", both."""
    if "+" in leaf:
        return " and ".join(short_name(part) for part in leaf.split("+"))
    if leaf not in _THEIRS:
        return leaf
    parts = _THEIRS[leaf].split(".")
    return ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing, about one tensor, one layer or the config.

    Attributes:
      kind: a word for programs and tests, e.g. "interleaved", "bit_flip", "norm_eps".
      subject: our flat name of a leaf, two of them with a plus, "layer" for a whole layer, or a
        field of the config.
      layer: its number, or None.
      what: the predicate of the sentence: "is interleaved (Meta layout)".
      fix: what to do about it, "" when nothing.
      fault: False for what changes no result by more than rounding.
    """

    kind: str
    subject: str
    layer: int | None
    what: str
    fix: str = ""
    fault: bool = True


@dataclass(frozen=True)
class Sentence:
    """Findings that say the same of several layers.

    Attributes:
      kind, subject, fix, fault: of the findings.
      layers: which, in order; empty where there is no layer.
      text: the sentence, without its fix.
    """

    kind: str
    subject: str
    layers: tuple[int, ...]
    text: str
    fix: str
    fault: bool


def sentences(findings: Sequence[Finding], layers: int) -> list[Sentence]:
    """Gathers equal findings over layers, faults first, otherwise in the order of appearance.

    Args:
      findings: of one model.
      layers: how many it has.
    """
    groups: dict[tuple, list[int]] = {}
    for f in findings:
        key = (f.kind, f.subject, f.what, f.fix, f.fault)
        groups.setdefault(key, [])
        if f.layer is not None:
            groups[key].append(f.layer)
    made = []
    for (kind, subject, what, fix, fault), where in groups.items():
        where = tuple(sorted(set(where)))
        if not where:
            text = f"{short_name(subject)} {what}"
        elif subject == "layer":
            text = f"{listed(where)} {what}"
        else:
            of = "every layer" if len(where) == layers else listed(where)
            text = f"{short_name(subject)} of {of} {what}"
        made.append(Sentence(kind, subject, where, text, fix, fault))
    return sorted(made, key=lambda s: not s.fault)


def listed(layers: Sequence[int]) -> str:
    """ "layer 3", "layers 0 to 4 and 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    parts = [str(a) if a == b else f"{a} to {b}" for a, b in runs]
    words = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"layer{'s' if len(layers) > 1 else ''} {words}"
