"""Cycles = sum over regions of (bundles x times executed), with the counts given by name.

A region is a stretch of the schedule between branches. Its name is the `jax.named_scope` of its
instructions; the caller says how often each name runs. What the static schedule does not know and
this therefore leaves out: waits for DMA, pipeline fill, instruction fetch. What it adds: a region
never counts less than its matrix-unit row passes at peak, because the schedule issues vmatmuls
faster than a matrix unit takes rows (the hardware would stall there).
"""

import collections
import dataclasses

from tpu_compiler.bundles import Kernel, Node
from tpu_compiler.topology import Chip

RESERVED = ("grid", "calls", "cores", "critical")


@dataclasses.dataclass
class Region:
    """One node of the schedule's tree, without its children.

    Attributes:
      path: region name from the outermost, joined by "/"; "" outside every named region.
      bundles: VLIW bundles; mxu_cycles: its row passes / (matrix units x rows a cycle).
      executed: times it runs, all cores together; how: where that number comes from.
      slots: slots used in one run, by name. purity: share of its instructions that carry its name.
    """

    path: str
    kind: str
    start: int
    bundles: int
    mxu_cycles: float
    executed: float
    how: str
    slots: dict[str, int]
    purity: float

    @property
    def cycles(self) -> float:
        """Cycles of one run: its bundles, but never less than its row passes."""
        return max(self.bundles, self.mxu_cycles)


@dataclasses.dataclass
class KernelCost:
    """Compiler-predicted cost of one Pallas call, per TensorCore."""

    name: str
    regions: list[Region]
    share_of_busier_core: float
    capacity: dict[str, int]
    not_found: list[str]

    @property
    def cycles(self) -> float:
        """Cycles of the busier TensorCore."""
        return self.share_of_busier_core * sum(r.executed * r.cycles for r in self.regions)

    @property
    def schedule_cycles(self) -> float:
        """As cycles, but bundles alone, without the floor of the row passes."""
        return self.share_of_busier_core * sum(r.executed * r.bundles for r in self.regions)

    @property
    def mxu_cycles(self) -> float:
        """Row passes of the busier TensorCore, in cycles at the matrix units' peak."""
        return self.share_of_busier_core * sum(r.executed * r.mxu_cycles for r in self.regions)

    @property
    def code_bundles(self) -> int:
        """Size of the program in bundles."""
        return sum(r.bundles for r in self.regions)

    def slot_share(self, slot: str) -> float:
        """Share of a slot's issue capacity in use over the whole run, 0 to 1."""
        used = sum(r.executed * r.slots.get(slot, 0) for r in self.regions)
        total = sum(r.executed * r.cycles for r in self.regions)
        return used / total / self.capacity[slot] if total else 0.0

    def static(self, slot: str) -> int:
        """Slots of a name in the program text (spills: VSTORE:SPILL, fills: VLOAD:FILL)."""
        return sum(r.slots.get(slot, 0) for r in self.regions)


def attribute(kernel: Kernel, counts: dict[str, float], chip: Chip) -> KernelCost:
    """Names every region of the kernel and multiplies it by its count.

    Args:
      counts: {region path: times its body runs in one call, all cores together}; "grid" is the
        number of grid steps, "calls" how often the kernel is called (1), "cores" the TensorCores
        that share the work (the chip's by default), "critical" the busier core's share of it
        (1 / cores by default).

    Raises:
      ValueError: a loop without a name (its trip count is unknown), or a named region that no
        count matches.
    """
    cores = counts.get("cores", chip.cores)
    wanted = {path: n for path, n in counts.items() if path not in RESERVED}
    words = sorted({word for path in wanted for word in path.split("/")})
    regions: list[Region] = []

    def visit(node: Node, parent: tuple[str, ...], executed: float, in_grid: bool) -> None:
        word, purity = _name(kernel, node, words)
        path, how = parent, "its parent's"
        if node.kind == "loop" and word in parent[-1:]:
            word = ""  # what was hoisted out of a loop in it; its own name must be another
        if node.kind == "loop" and not word and parent:
            word = _implied(kernel, node, words, parent, wanted)
        if node.kind == "kernel":
            executed, how, word = cores * counts.get("calls", 1), "once a core", ""
        elif word and word not in parent[-1:]:
            key = _key(parent, word, wanted)
            if key is None:
                name = "/".join((*parent, word))
                raise ValueError(
                    f"{kernel.name}: region {name!r} at {node.start:#x} has no count; "
                    f"counts name {sorted(wanted)}"
                )
            path, executed, how = tuple(key.split("/")), wanted[key], "named"
        elif node.kind == "loop" and not word and not in_grid:
            executed, how = _grid(kernel, counts, cores), "grid steps + 2 a core"
        elif node.kind == "loop" and not word:
            raise ValueError(
                f"{kernel.name}: the loop at {node.start:#x} (operations of "
                f"{_seen(kernel, node)}) has no name: put its body in jax.named_scope"
            )
        elif in_grid and not parent:
            executed, how = counts["grid"], "grid steps"
        addresses = node.own()
        slots: dict[str, int] = collections.Counter()
        for address in addresses:
            slots.update(kernel.bundles[address].slots)
        rows = sum(kernel.bundles[address].mxu_rows for address in addresses)
        regions.append(
            Region(
                path="/".join(path),
                kind=node.kind,
                start=node.start,
                bundles=len(addresses),
                mxu_cycles=rows / (chip.mxus * chip.mxu_rows_per_cycle),
                executed=executed,
                how=how,
                slots=dict(slots),
                purity=purity,
            )
        )
        for child in node.children:
            visit(child, path, executed, in_grid or node.kind == "loop")

    visit(kernel.root, (), 1, False)
    found = {region.path for region in regions}
    return KernelCost(
        name=kernel.name,
        regions=regions,
        share_of_busier_core=counts.get("critical", 1 / cores),
        capacity=kernel.capacity,
        not_found=sorted(path for path in wanted if path not in found),
    )


def _grid(kernel: Kernel, counts: dict[str, float], cores: float) -> float:
    if "grid" not in counts:
        raise ValueError(f"{kernel.name} has a grid loop: counts must give 'grid', its steps")
    # besides the steps, the pipeline's first fetch and last write-back
    return counts["grid"] + 2 * cores * counts.get("calls", 1)


def _name(kernel: Kernel, node: Node, words: list[str]) -> tuple[str, float]:
    """The counted name that most of the node's own instructions carry, and its share of them.

    "body+mask" is the name of a node that votes "body" and in which "mask" occurs: it tells two
    instances of one unscoped function apart (tokamax).
    """
    plain = {word.split("+")[0] for word in words}
    votes, seen = collections.Counter(), set()
    for address in node.own():
        for scope in kernel.bundles[address].scopes:
            parts = scope.split("/")
            seen.update(parts)
            votes[next((part for part in parts if part in plain), "")] += 1
    if not votes:
        return "", 1.0
    word, most = votes.most_common(1)[0]
    for longer in words:
        if longer.startswith(word + "+") and longer.split("+")[1] in seen:
            word = longer
    guards = {_name(kernel, c, words)[0] for c in node.children if c.kind == "loop"}
    if node.kind == "region" and word in guards:
        word = ""  # the test in front of a loop, holding what was hoisted out of it
    return word, most / votes.total()


def _implied(kernel, node: Node, words: list[str], parent: tuple, wanted: dict) -> str:
    """The name of a loop without instructions of its own: the one step between the parent's path
    and that of a named loop inside; "" if there is not just one."""
    inside, stack = set(), list(node.children)
    while stack:
        child = stack.pop()
        stack += child.children
        key = _key(parent, _name(kernel, child, words)[0], wanted)
        steps = key.split("/") if key else []
        while steps and steps[0] in parent:
            steps.pop(0)
        if len(steps) > 1:
            inside.add(steps[0])
    return inside.pop() if len(inside) == 1 else ""


def _key(parent: tuple[str, ...], word: str, wanted: dict[str, float]) -> str | None:
    """The wanted path of a region called `word` inside `parent`. A loop of one round is no loop in
    the schedule and its body lies one level up, so ever less of the parent's path may match."""
    for depth in range(len(parent), -1, -1):
        if key := _match((*parent[:depth], word), wanted):
            return key
    return None


def _match(path: tuple[str, ...], wanted: dict[str, float]) -> str | None:
    """The wanted path that ends like `path` and contains it in order; None unless just one."""
    if "/".join(path) in wanted:
        return "/".join(path)
    fits = []
    for key in wanted:
        rest = iter(key.split("/"))
        if key.split("/")[-1] == path[-1] and all(word in rest for word in path):
            fits.append(key)
    return fits[0] if len(fits) == 1 else None


def _seen(kernel: Kernel, node: Node) -> list[str]:
    return sorted({s for a in node.own() for s in kernel.bundles[a].scopes if s})[:6] or [
        "no scope"
    ]
