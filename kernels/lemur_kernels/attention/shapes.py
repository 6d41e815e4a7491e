"""Which shapes the TPU kernels are certified for, and the block sizes to run them with.

certified.csv is written by tools/certify_kernels.py: every line went through the TPU compiler for
its chip (legality, fast memory, spills, predicted cycles). A shape outside of it is an error that
names the nearest one inside. Reading it needs no device.
"""

import csv
import dataclasses
import functools
from pathlib import Path

from lemur_kernels.attention.tilings import CHIPS, kv_heads_per_step
from lemur_kernels.target import DEVICE_KINDS

TABLE = Path(__file__).with_name("certified.csv")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a certificate is for.

    chip: "v4", "v5e", "v5p", "v6e" or "v7x". direction: "forward" or "backward".
    dtype: "bfloat16" or "float32". seq: tokens of a row.
    """

    chip: str
    direction: str
    dtype: str
    head_dim: int
    heads: int
    kv_heads: int
    seq: int


@dataclasses.dataclass(frozen=True)
class Certificate:
    """One compiled program: compiler-predicted, never measured.

    Attributes:
      shape: what was compiled.
      blocks: the chosen sizes by name: fields of tilings.Tiling.
      vmem_kib: fast memory that it takes. spills: registers stored to it, in the program text.
      kcycles: thousand cycles of a TensorCore by mask ("causal", "segments", "window").
    """

    shape: Shape
    blocks: dict[str, int | None]
    vmem_kib: int
    spills: int
    kcycles: dict[str, float]


def chip_of(device_kind: str) -> str:
    """The chip's name in the table; `jax.Device.device_kind` in.

    Raises:
      ValueError: not a TPU that the kernels are certified for.
    """
    if device_kind not in DEVICE_KINDS:
        raise ValueError(
            f"device_kind={device_kind!r} has no certified kernels; supported: "
            f"{', '.join(DEVICE_KINDS)}; use implementation='chunked' elsewhere, or trace under "
            "jax.set_mesh(mesh) to compile for TPUs that are not attached"
        )
    return DEVICE_KINDS[device_kind]


@functools.cache
def certificates(path: Path = TABLE) -> tuple[Certificate, ...]:
    """All of the table: a comment, a header, one line for each shape."""
    with path.open(newline="") as file:
        file.readline()
        return tuple(_certificate(row) for row in csv.DictReader(file))


def _certificate(row: dict[str, str]) -> Certificate:
    def part(prefix: str) -> dict[str, str]:
        return {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}

    names = [field.name for field in dataclasses.fields(Shape)]
    return Certificate(
        shape=Shape(
            *(row[n] if n in ("chip", "direction", "dtype") else int(row[n]) for n in names)
        ),
        blocks={name: int(value) if value else None for name, value in part("blocks.").items()},
        vmem_kib=int(row["vmem_kib"]),
        spills=int(row["spills"]),
        kcycles={mask: float(value) for mask, value in part("kcycles.").items()},
    )


def certificate_for(shape: Shape, path: Path = TABLE) -> Certificate:
    """The certificate to run a shape with: same chip, direction, dtype and head_dim, as many query
    heads to a kv head, the shortest certified row that holds `seq` tokens (kernels pad). Of several
    its own heads', or else the one with the fewest predicted cycles a head.

    Raises:
      ValueError: outside of the table; names the field and the nearest supported value.
    """
    left = certificates(path)
    group = shape.heads // shape.kv_heads
    fields = (
        ("chip", shape.chip, lambda s: s.chip),
        ("direction", shape.direction, lambda s: s.direction),
        ("dtype", shape.dtype, lambda s: s.dtype),
        ("head_dim", shape.head_dim, lambda s: s.head_dim),
        ("heads / kv_heads", group, lambda s: s.heads // s.kv_heads),
    )
    for name, value, read in fields:
        fit = tuple(c for c in left if read(c.shape) == value)
        if not fit:
            raise ValueError(_outside(shape, name, value, sorted({read(c.shape) for c in left})))
        left = fit
    # A program cuts the heads into steps, which a group divides or is divided by: it serves every
    # multiple of its step's heads.
    steps = {c.blocks.get("heads", 1) for c in left}
    left = tuple(c for c in left if shape.heads % c.blocks.get("heads", 1) == 0)
    if not left:
        padded = {-(-shape.heads // step) * step for step in steps}
        raise ValueError(_outside(shape, "heads", shape.heads, sorted(padded)))
    lengths = sorted({c.shape.seq for c in left})
    left = tuple(c for c in left if c.shape.seq >= shape.seq)
    if not left:
        raise ValueError(_outside(shape, "seq", shape.seq, lengths))

    def order(c: Certificate):
        return c.shape.seq, c.shape.heads != shape.heads, _cycles_per_head(c, shape)

    return min(left, key=order)


def _cycles_per_head(c: Certificate, shape: Shape) -> float:
    """Predicted kcycles of one document, a query head, when a certificate's program runs a shape:
    what cannot be shared evenly leaves a core idle."""
    step, split = c.blocks.get("heads", 1), c.blocks.get("split", 1)
    runs = shape.heads // step
    if shape.direction == "backward":
        runs = shape.kv_heads // kv_heads_per_step(step, shape.heads // shape.kv_heads) * split
    cores = CHIPS[shape.chip].cores
    return c.kcycles["causal"] / c.shape.heads * (-(-runs // cores) * cores / runs)


def _fix(shape: Shape, name: str, value, supported: list) -> str:
    """The nearest supported value and how to get there."""
    if name == "heads / kv_heads":
        # Repeating kv heads only divides the ratio.
        reached = max((ratio for ratio in supported if value % ratio == 0), default=None)
        if reached is None:
            listed = ", ".join(map(str, supported))
            return (
                f"none ({listed} cannot be reached by repeating kv heads); certify it with {_TOOL}"
            )
        times, kv_heads = value // reached, shape.heads // reached
        return f"{reached}; repeat each kv head {times} times, {kv_heads} in all"
    if name == "heads":
        N, group = supported[0], shape.heads // shape.kv_heads
        return f"{N}; pad heads to {N} with zeros, kv heads to {N // group}, and drop them from out"
    if name in ("chip", "direction", "dtype"):
        fix = "cast q, k and v" if name == "dtype" else f"certify it with {_TOOL}"
        return f"{', '.join(map(str, supported)) or 'none'}; {fix}"
    nearest = min((s for s in supported if s >= value), default=supported[-1])
    if name == "head_dim" and value > nearest:
        return f"{nearest}, less than that"
    if name == "head_dim":
        return f"{nearest}; pad q, k and v with zeros to it and keep the scale"
    return f"{nearest}; split the row, or shard it over the sequence axis"


_TOOL = "tools/certify_kernels.py"


def _outside(shape: Shape, name: str, value, supported: list) -> str:
    return (
        f"attention implementation='pallas_tpu' is not certified for {name}={value} ({shape}); "
        f"nearest supported: {_fix(shape, name, value, supported)}, or use "
        "implementation='chunked'"
    )


def table_text(found: list[Certificate], made_with: dict[str, str]) -> str:
    """The table's file, one sorted line for each shape: a change of one is a change of one line.

    Raises:
      ValueError: certificates whose blocks or masks have different names.
    """
    rows = []
    for c in sorted(found, key=lambda c: dataclasses.astuple(c.shape)):
        row = dataclasses.asdict(c.shape)
        row |= {f"blocks.{name}": value for name, value in sorted(c.blocks.items())}
        row |= {"vmem_kib": c.vmem_kib, "spills": c.spills}
        rows.append(row | {f"kcycles.{mask}": value for mask, value in c.kcycles.items()})
    names = [*rows[0]] if rows else []
    for row in rows:
        if [*row] != names:
            raise ValueError(f"{row} has other columns than {names}: certify all shapes again")
    cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
    return "".join(line + "\n" for line in (comment(made_with), *map(",".join, [names, *cells])))


def comment(made_with: dict[str, str]) -> str:
    """The table's first line: what its programs were compiled from, and by what."""
    return "# compiler-predicted; " + ", ".join(f"{k} {v}" for k, v in sorted(made_with.items()))


def stamp(path: Path = TABLE) -> str:
    """The first line of a table."""
    with path.open() as file:
        return file.readline().rstrip("\n")
