"""Rules that carry weights between another layout and ours: one table, read in both directions.

A rule is an einops pattern on one tensor of theirs. The inverse is the same pattern with its sides
exchanged, so import and export cannot drift apart. Patterns only permute and split axes; nothing is
scaled or added, so a round trip gives back the same bits.

Letters of a pattern are the dimension key in lower case: e embed, h heads, k kv heads, d head dim,
f mlp, v vocab. Our vocabulary has padding rows, theirs has none; see `pad_vocab`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import einops
import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.errors import ConversionError
from lemur_jax.sharding import padded_vocab

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table.

    Attributes:
      ours: flat name of the leaf, e.g. "layers/wq".
      theirs: name of the tensor; "{}" stands for the layer, whose tensors are stacked in front.
      pattern: einops, from theirs (one layer) to ours, e.g. "(h d) e -> e h d".
    """

    ours: str
    theirs: str
    pattern: str

    @property
    def stacked(self) -> bool:
        """Whether the leaf holds all layers, [L, ...], and theirs is one tensor for each."""
        return "{}" in self.theirs

    def source_names(self, config: ModelConfig) -> list[str]:
        """Names of the tensors that fill the leaf, in layer order."""
        if not self.stacked:
            return [self.theirs]
        return [self.theirs.format(layer) for layer in range(config.layers)]

    def their_shape(self, config: ModelConfig) -> Shape:
        """Shape of one tensor of theirs."""
        return _shape(self.pattern.split("->")[0], sizes(config))

    def our_shape(self, config: ModelConfig) -> Shape:
        """Shape of the leaf as the model holds it: layers stacked, vocabulary padded."""
        inner = _shape(self.pattern.split("->")[1], {**sizes(config), "v": padded_vocab(config)})
        return (config.layers, *inner) if self.stacked else inner

    def to_ours(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        """One tensor of theirs in our axis order, vocabulary padded with zeros."""
        array = einops.rearrange(array, self.pattern, **self._split(config))
        return _pad_vocab(array, self._vocab_axis(), padded_vocab(config))

    def to_theirs(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        """The inverse of `to_ours`: padding rows cut off, axes in their order."""
        axis = self._vocab_axis()
        if axis is not None:
            array = array[(slice(None),) * axis + (slice(config.vocab_size),)]
        left, right = self.pattern.split("->")
        return einops.rearrange(array, f"{right} -> {left}", **self._split(config))

    def _split(self, config: ModelConfig) -> dict[str, int]:
        letters = set(re.findall("[a-z]", self.pattern))
        return {letter: size for letter, size in sizes(config).items() if letter in letters}

    def _vocab_axis(self) -> int | None:
        axes = self.pattern.split("->")[1].split()
        return axes.index("v") if "v" in axes else None


def sizes(config: ModelConfig) -> dict[str, int]:
    """What the letters of a pattern stand for."""
    return {
        "e": config.embed,
        "h": config.heads,
        "k": config.kv_heads,
        "d": config.head_dim,
        "f": config.mlp,
        "v": config.vocab_size,
    }


def _shape(side: str, by_letter: dict[str, int]) -> Shape:
    axes = re.findall(r"\([^)]*\)|[a-z]", side)
    return tuple(math.prod(by_letter[letter] for letter in re.findall("[a-z]", a)) for a in axes)


def _pad_vocab(array: np.ndarray, axis: int | None, rows: int) -> np.ndarray:
    if axis is None or array.shape[axis] == rows:
        return array
    widths = [(0, rows - n if d == axis else 0) for d, n in enumerate(array.shape)]
    return np.pad(array, widths)


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor that a checkpoint of theirs contains.

    Attributes:
      name: as stored.
      shape: as stored.
      file: where it lies, for messages.
    """

    name: str
    shape: Shape
    file: str


def check_complete(
    rules: Sequence[Rule], config: ModelConfig, leaves: dict[str, Shape], sources: Iterable[Source]
) -> None:
    """Every tensor has a place and every leaf is filled exactly once, or nothing is converted.

    Args:
      rules: the table for this config.
      config: the model.
      leaves: flat name -> shape of every weight of the model (from `model.decoder.abstract`).
      sources: every tensor of the checkpoint, known buffers left out.

    Raises:
      ConversionError: four kinds of problem, all of them at once: a tensor that no rule matches, a
        leaf that nothing fills, a leaf filled twice, a wrong shape (expected and found).
    """
    rule_of = {name: rule for rule in rules for name in rule.source_names(config)}
    filled: dict[str, Source] = {}
    problems = []
    for source in sources:
        rule = rule_of.get(source.name)
        if rule is None:
            problems.append(
                f"unmatched tensor {source.name!r} {list(source.shape)} in {source.file}: no rule "
                f"of the table takes it{_hint(source.name, config)}"
            )
            continue
        if source.name in filled:
            problems.append(
                f"{rule.ours!r} is filled twice: {source.name!r} is in "
                f"{filled[source.name].file} and in {source.file}; remove one of them"
            )
            continue
        filled[source.name] = source
        expected = rule.their_shape(config)
        if source.shape != expected:
            problems.append(
                f"wrong shape of {source.name!r} in {source.file}: expected {list(expected)} "
                f"({rule.pattern.split('->')[0].strip()}), found {list(source.shape)}; the config "
                "and the weights are of different models"
            )
    problems += _unfilled(rules, config, leaves, filled)
    if problems:
        raise ConversionError(problems)


def _unfilled(rules, config, leaves, filled) -> list[str]:
    problems, targets = [], {}
    for rule in rules:
        if rule.ours in targets:
            problems.append(
                f"{rule.ours!r} is filled twice: by rules {targets[rule.ours].theirs!r} and "
                f"{rule.theirs!r}; the table must name each leaf once"
            )
        targets[rule.ours] = rule
        if leaves.get(rule.ours) != rule.our_shape(config):
            problems.append(
                f"wrong shape of leaf {rule.ours!r}: the table makes "
                f"{list(rule.our_shape(config))}, the model has {leaves.get(rule.ours)}"
            )
    for leaf in leaves:
        if leaf not in targets:
            problems.append(f"leaf {leaf!r} is not filled: no rule of the table names it")
            continue
        names = targets[leaf].source_names(config)
        missing = [name for name in names if name not in filled]
        if missing:
            shown = ", ".join(repr(name) for name in missing[:4])
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            problems.append(
                f"leaf {leaf!r} is not filled: the checkpoint has no {shown}{more} "
                f"{list(targets[leaf].their_shape(config))}; the download may be incomplete"
            )
    return problems


def _hint(name: str, config: ModelConfig) -> str:
    """Why a tensor of a usual name may be left over."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.layers:
        return f" (config.json has num_hidden_layers={config.layers})"
    if name.endswith(".bias"):
        return (
            f" (config.json has attention_bias={config.attention_bias}, mlp_bias={config.mlp_bias})"
        )
    if "lora_" in name:
        return " (a LoRA adapter: merge it into its base model first)"
    return ""
