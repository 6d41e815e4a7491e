"""Rules that carry weights between another layout and ours: one table, read in both directions.

A rule is an einops pattern on one tensor of theirs. The inverse is the same pattern with its sides
exchanged, so import and export cannot drift apart. Patterns only permute and split axes; nothing is
scaled or added, so a round trip gives back the same bits.

Letters of a pattern are the dimension key in lower case: e embed, h heads, k kv heads, d head dim,
f mlp, v vocab; r, j: the two parts of a rotated pair, and the pairs of a head. Our vocabulary has
padding rows, theirs has none.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import einops
import numpy as np

from lemur_jax.config import ModelConfig
from lemur_jax.convert.errors import ConversionError, first_few
from lemur_jax.convert.stored import Region, Shape, whole
from lemur_jax.sharding import padded_vocab

_FEW_LAYERS = 1000  # that may be listed where all names are unknown


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
        return self.part(whole(self._inner_shape(config)), config).to_ours(array)

    def to_theirs(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        """The inverse of `to_ours`: padding rows cut off, axes in their order."""
        return self.part(whole(self._inner_shape(config)), config).to_theirs(array)

    def part(self, region: Region, config: ModelConfig) -> "Part":
        """A region of one layer of the leaf, and where it lies in the tensor of theirs.

        Args:
          region: of our axes, without the layer; may reach into the padding of the vocabulary.
          config: the model.
        """
        by_letter = sizes(config)
        left, right = (_axes(side) for side in self.pattern.split("->"))
        cut, rest, pad = {}, [], None
        for axis, wanted in zip(right, region, strict=True):
            if not _leads(axis, left):
                rest.append(wanted)
                continue
            stop = by_letter[axis]
            cut[axis] = slice(min(wanted.start, stop), min(wanted.stop, stop))
            missing = wanted.stop - wanted.start - (cut[axis].stop - cut[axis].start)
            rest.append(slice(0, cut[axis].stop - cut[axis].start))
            if missing:
                pad = (len(rest) - 1, missing)
        theirs = []
        for group in left:
            inner = math.prod(by_letter[letter] for letter in group[1:])
            first = cut.get(group[0], slice(0, by_letter[group[0]]))
            theirs.append(slice(first.start * inner, first.stop * inner))
        lengths = by_letter | {k: s.stop - s.start for k, s in cut.items()}
        letters = set(re.findall("[a-z]", self.pattern))
        lengths = {letter: lengths[letter] for letter in letters}
        return Part(self.pattern, tuple(theirs), lengths, tuple(rest), pad)

    def may_cut(self) -> tuple[bool, ...]:
        """For each of our axes without the layer: whether a part of it is a part of theirs."""
        left, right = (_axes(side) for side in self.pattern.split("->"))
        return tuple(_leads(axis, left) for axis in right)

    def rows_axis(self) -> int | None:
        """Our axis (without the layer) that runs along their rows: cutting it cuts no row."""
        left, right = (_axes(side) for side in self.pattern.split("->"))
        return right.index(left[0][0]) if left[0][0] in right else None

    def _inner_shape(self, config: ModelConfig) -> Shape:
        shape = self.our_shape(config)
        return shape[1:] if self.stacked else shape


@dataclasses.dataclass(frozen=True)
class Part:
    """A region of one tensor of theirs and the same region of ours.

    Attributes:
      pattern: of the rule.
      theirs: the region of their tensor that must be read, or is written.
      lengths: of each letter of the pattern within it.
      rest: what is cut out of our axes after the rearrangement, where theirs could not be cut.
      pad: (our axis, rows of zeros behind), of the vocabulary; None: none.
    """

    pattern: str
    theirs: Region
    lengths: dict[str, int]
    rest: Region
    pad: tuple[int, int] | None

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Their region in our axis order; a view where the padding allows."""
        array = einops.rearrange(array, self.pattern, **self.lengths)[self.rest]
        if self.pad is None:
            return array
        axis, rows = self.pad
        return np.pad(array, [(0, rows if d == axis else 0) for d in range(array.ndim)])

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Our region in their axis order, padding rows cut off; a view."""
        if self.pad is not None:
            axis, rows = self.pad
            array = array[(slice(None),) * axis + (slice(array.shape[axis] - rows),)]
        left, right = self.pattern.split("->")
        return einops.rearrange(array, f"{right} -> {left}", **self.lengths)


def _axes(side: str) -> list[str]:
    """The letters of each axis: "(h d) e" -> ["hd", "e"]."""
    return [re.sub("[^a-z]", "", axis) for axis in re.findall(r"\([^)]*\)|[a-z]", side)]


def _leads(axis: str, groups: list[str]) -> bool:
    return len(axis) == 1 and any(group[0] == axis for group in groups)


def sizes(config: ModelConfig) -> dict[str, int]:
    """What the letters of a pattern stand for."""
    return {
        "e": config.embed,
        "h": config.heads,
        "k": config.kv_heads,
        "d": config.head_dim,
        "f": config.mlp,
        "v": config.vocab_size,
        # Interleaved heads: d = (j r), r the two halves of a rotated pair.
        "r": 2,
        "j": config.head_dim // 2,
    }


def _shape(side: str, by_letter: dict[str, int]) -> Shape:
    return tuple(math.prod(by_letter[letter] for letter in axis) for axis in _axes(side))


@dataclasses.dataclass(frozen=True)
class Found:
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
    rules: Sequence[Rule], config: ModelConfig, leaves: dict[str, Shape], sources: Iterable[Found]
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
    sources = list(sources)
    _check_layers(rules, config, [source.name for source in sources])
    rule_of = {name: rule for rule in rules for name in rule.source_names(config)}
    filled: dict[str, Found] = {}
    problems, unmatched, misshapen = [], [], []
    for source in sources:
        rule = rule_of.get(source.name)
        if rule is None:
            unmatched.append(
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
            misshapen.append(
                f"wrong shape of {source.name!r} in {source.file}: expected {list(expected)} "
                f"({rule.pattern.split('->')[0].strip()}), found {list(source.shape)}; the config "
                "and the weights are of different models"
            )
    problems += first_few(unmatched, "tensors") + first_few(misshapen, "tensors")
    problems += _unfilled(rules, config, leaves, filled)
    if problems:
        raise ConversionError(problems)


def _check_layers(rules: Sequence[Rule], config: ModelConfig, names: Sequence[str]) -> None:
    """Before anything is listed for each layer: a config may claim a million of them.

    Raises:
      ConversionError: the names have fewer layers than the config.
    """
    stacked = [re.escape(rule.theirs) for rule in rules if rule.stacked]
    pattern = re.compile("|".join(text.replace(r"\{\}", r"(\d{1,9})") for text in stacked))
    matches = [match for name in names if stacked and (match := pattern.fullmatch(name))]
    found = {int(match[match.lastindex]) for match in matches}
    if config.layers <= max(len(found), _FEW_LAYERS if not found else 0):
        return
    missing = next(layer for layer in range(config.layers) if layer not in found)
    raise ConversionError(
        [
            f"the config says {config.layers} layers (num_hidden_layers; n_layers in Meta's "
            f"params.json), the weights have {len(found)}: there is no layer {missing}. Correct "
            "the config, or, if the download is incomplete, download the rest"
        ]
    )


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
