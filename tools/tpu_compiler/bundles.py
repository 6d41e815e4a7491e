"""Reads one kernel's final schedule: a tree of loops and predicated regions over VLIW bundles.

The dump has a text of all bundles in address order, with `sbr` branches to numbered regions, and a
table of slot use with one row per bundle. One bundle issues per cycle.
"""

import collections
import dataclasses
import re
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+((?:[A-Z]{2}\s?)*):(?:\s*>)*\s*\{")
_TARGET = re.compile(r"\bsbr\.\w+.*?target = \$region(\d+)", re.S)
_REGION = re.compile(r"(Start|Start/End empty|End) region (\d+)")
_SCOPE = re.compile(r'loc\("\[([^"\]]*)\]"')
_MATMUL = re.compile(r"= (vmatmul\.[\w.]+)")
_BITS = {"f32": 32, "bf16": 16, "s8": 8, "u8": 8, "f8e5m2": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8}


@dataclasses.dataclass
class Bundle:
    """One bundle: its instructions' scopes ("" for an instruction outside every named scope),
    slots used by name, and bf16-equivalent rows sent through the matrix units."""

    text: str
    tags: tuple[str, ...]
    slots: dict[str, int]
    scopes: tuple[str, ...] = ()
    mxu_rows: int = 0


@dataclasses.dataclass
class Node:
    """A stretch [start, stop) of bundles that runs as one: "kernel", "loop" or "region"."""

    kind: str
    start: int
    stop: int
    children: list["Node"] = dataclasses.field(default_factory=list)

    def own(self) -> list[int]:
        """Addresses in this node and in none of its children."""
        inside = {a for child in self.children for a in range(child.start, child.stop)}
        return [a for a in range(self.start, self.stop) if a not in inside]


@dataclasses.dataclass
class Kernel:
    """One Pallas call's final schedule; prefix names its files in the dump folder."""

    name: str
    prefix: str
    bundles: list[Bundle]
    root: Node
    capacity: dict[str, int]


def dumped(folder: Path) -> list[str]:
    """File prefixes of every custom call's dump in the folder, oldest first."""
    found = []
    for path in sorted(folder.glob("*-final_hlo-static-per-bundle-utilization.txt")):
        prefix = re.sub(r"-\d+-final_hlo-static-per-bundle-utilization\.txt$", "", path.name)
        if not prefix.split("-", 1)[1].startswith(("<", "TLP")):
            found.append(str(path.parent / prefix))
    return found


def read_kernel(prefix: str, branch_delay: int) -> Kernel:
    """Reads `PREFIX-NN-final_bundles.txt` and its utilization table.

    Raises:
      ValueError: the dump is not in the form of libtpu 0.0.42.1, with what was unexpected.
    """
    folder, stem = Path(prefix).parent, Path(prefix).name
    paths = [p for p in folder.iterdir() if p.name.startswith(stem + "-")]
    text = next(p for p in paths if re.search(r"-\d+-final_bundles\.txt$", p.name)).read_text()
    table = next(p for p in paths if p.name.endswith("-bundle-utilization.txt")).read_text()
    lines = table.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split())))
    rows = [dict(zip(names, map(int, line.split()))) for line in lines[4:] if line.strip()]
    bundles = _bundles(text, rows)
    name = stem.split("-", 1)[1]
    return Kernel(name, prefix, bundles, _tree(bundles, branch_delay), capacity)


def _bundles(text: str, rows: list[dict[str, int]]) -> list[Bundle]:
    found: list[Bundle] = []
    pieces: list[list[str]] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            if int(match[1], 16) != len(found):
                raise ValueError(
                    f"bundle {match[1]} follows {len(found) - 1:#x}: not address order"
                )
            slots = rows[len(found)] if len(found) < len(rows) else {}
            found.append(Bundle("", tuple(match[2].split()), slots))
            pieces.append([line])
        elif pieces:
            pieces[-1].append(line)
    if not 0 <= len(found) - len(rows) <= 1:  # the exit bundle has no row
        raise ValueError(f"{len(found)} bundles but {len(rows)} rows of slot use")
    for bundle, lines in zip(found, pieces):
        bundle.text = "\n".join(lines)
        bundle.scopes = tuple(_SCOPE.findall(bundle.text))
        bundle.mxu_rows = sum(_rows(op) for op in _MATMUL.findall(bundle.text))
    return found


def _rows(op: str) -> int:
    """bf16-equivalent rows of one vmatmul: a register of 8 sublanes, 32 bits each. An 8-bit row
    takes half the time of a bf16 row (where the chip has 8-bit products), an f32 row that of a
    bf16 row."""
    for part in op.split("."):
        if part in _BITS:
            return 8 if _BITS[part] == 32 else 16
    raise ValueError(f"{op}: operand type not in {sorted(_BITS)}; add its width to bundles._BITS")


def _tree(bundles: list[Bundle], branch_delay: int) -> Node:
    starts = collections.defaultdict(list)
    for address, bundle in enumerate(bundles):
        for what, region in _REGION.findall(bundle.text):
            if what != "End":
                starts[int(region)].append(address)
    nodes: dict[tuple, Node] = {}
    lost = []
    for address, bundle in enumerate(bundles):
        for region in map(int, _TARGET.findall(bundle.text)):
            forward = [a for a in starts[region] if a > address]
            back = [a for a in starts[region] if a <= address]
            if forward:
                start = min(address + 1 + branch_delay, forward[0])
                node = Node("region", start, forward[0])
            elif back:
                start = next((a for a in reversed(back) if "LB" in bundles[a].tags), back[-1])
                node = Node("loop", start, _loop_end(bundles, address))
            else:
                lost.append((address, region))
                continue
            if node.start < node.stop:
                nodes[node.kind, node.start, node.stop] = node
    # The compiler drops labels of empty regions in the prologue (core-id tests); inside a loop a
    # lost target would mean a region that nobody counts.
    for address, region in lost:
        if any(n.kind == "loop" and n.start <= address < n.stop for n in nodes.values()):
            raise ValueError(f"branch at {address:#x} to region {region}, which is nowhere")
    return _nest(list(nodes.values()), len(bundles))


def _loop_end(bundles: list[Bundle], branch: int) -> int:
    """First bundle after the backward branch and its delay slots: the next labelled one."""
    for address in range(branch + 1, len(bundles)):
        bundle = bundles[address]
        if bundle.tags or re.search(r"\bStart", bundle.text):
            return address
    return len(bundles)


def _nest(nodes: list[Node], stop: int) -> Node:
    root = Node("kernel", 0, stop)
    stack = [root]
    for node in sorted(nodes, key=lambda n: (n.start, -n.stop, n.kind == "loop")):
        while node.start >= stack[-1].stop:
            stack.pop()
        if node.stop > stack[-1].stop:
            # A jump out of the innermost stretch (an early exit): it cuts nothing off here.
            node.stop = stack[-1].stop
        stack[-1].children.append(node)
        stack.append(node)
    return root
