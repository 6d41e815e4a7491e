"""Where tensors that fit nowhere belong: in another layer, or in another tensor's place."""

import numpy as np

from lemur_jax.convert.parity import damage
from lemur_jax.convert.parity.damage import EXPLAINED
from lemur_jax.convert.parity.finding import Finding, short_name


class Sketches:
    """A few numbers of every tensor, to find where a tensor that fits nowhere belongs."""

    def __init__(self):
        self.right: dict[str, list[np.ndarray]] = {}
        self.found: dict[str, list[np.ndarray]] = {}

    def add(self, leaf: str, layer: int, right: np.ndarray, found: np.ndarray) -> None:
        """Takes note of a tensor of A and of B; layers come in order."""
        rows = np.linspace(0, len(right) - 1, min(len(right), 64)).astype(int)
        columns = rows * 7 % right.shape[1]
        for side, array in ((self.right, right), (self.found, found)):
            side.setdefault(leaf, []).append(array[rows, columns])

    def origin(self, leaf: str, layer: int) -> int | None:
        """Whose tensor of A stands in this layer of B; None if it is no other layer's."""
        for other, sketch in enumerate(self.right[leaf]):
            if other != layer and damage.agree(sketch, self.found[leaf][layer]).mean() > EXPLAINED:
                return other
        return None


def place_layers(findings: list[Finding], sketches: Sketches) -> list[Finding]:
    """The findings, with tensors that no hypothesis explained traced to other layers."""
    origin: dict[tuple[str, int], int] = {}
    for f in findings:
        if f.kind in ("unexplained", "reordered") and f.layer is not None:
            where = sketches.origin(f.subject, f.layer)
            if where is not None:
                origin[f.subject, f.layer] = where
    by_layer: dict[int, dict[str, int]] = {}
    for (leaf, layer), where in origin.items():
        by_layer.setdefault(layer, {})[leaf] = where
    differing: dict[int, set] = {}
    for f in findings:
        if f.fault and f.layer is not None:
            differing.setdefault(f.layer, set()).add(f.subject)
    whole = {
        layer: set(places.values()).pop()
        for layer, places in by_layer.items()
        if len(set(places.values())) == 1 and set(places) == differing[layer] and len(places) > 1
    }
    kept = _pairs([f for f in findings if (f.subject, f.layer) not in origin])
    for layer, where in sorted(whole.items()):
        if whole.get(where) != layer:
            what, fix = f"is a copy of layer {where}", f"write layer {layer} again from its source"
            kept.append(Finding("layer_copied", "layer", layer, what, fix))
        elif layer < where:
            what = f"and layer {where} are swapped"
            kept.append(Finding("layers_swapped", "layer", layer, what, "exchange them"))
    for (leaf, layer), where in origin.items():
        if layer not in whole:
            what = f"is that of layer {where}"
            kept.append(Finding("layer_copied", leaf, layer, what, "write it again"))
    return kept


def _pairs(findings: list[Finding]) -> list[Finding]:
    """Two tensors that hold each other's weights are one finding."""
    holds = {
        (f.subject, f.layer, f.what.rpartition(" ")[2]) for f in findings if f.kind == "exchanged"
    }
    result = []
    for f in findings:
        name, held = short_name(f.subject), f.what.rpartition(" ")[2]
        partner = next(
            (
                subject
                for subject, layer, other in holds
                if layer == f.layer and other == name and short_name(subject) == held
            ),
            None,
        )
        if f.kind != "exchanged" or partner is None:
            result.append(f)
        elif f.subject < partner:
            both = f"{f.subject}+{partner}"
            result.append(Finding("swapped", both, f.layer, "are swapped", "exchange them"))
    return result
