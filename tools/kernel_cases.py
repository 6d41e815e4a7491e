"""Our kernels under the measuring tools: a case in, the function, its arguments and its region
counts out. The only file of the tools that knows the kernel package."""

from tpu_compiler.cases import Built, Case, segment_ids

HEAD_DIMS = (64, 80, 96, 128, 256)  # what the attention kernels are certified for, on some chip


def build(case: Case) -> Built:
    """The project's kernel for the case.

    Raises:
      NotImplementedError: the kernel does not exist for the case, in one line.
    """
    if case.kernel not in BUILDERS:
        raise NotImplementedError(f"no TPU kernel for {case.kernel} yet")
    return BUILDERS[case.kernel](case)


def candidates(case: Case) -> list[dict]:
    """Block sizes to try for the case, the ones expected to be fastest first; [] where there is no
    kernel. Each is what `case.blocks` takes: the fields of the kernel's Tiling."""
    import dataclasses

    if case.kernel != "attention":
        return []
    return [dataclasses.asdict(tiling) for tiling in _proposals(case, case.direction)]


def refused(case: Case) -> str | None:
    """Why there is nothing to compile for a case, before any compiler starts; None: there is."""
    try:
        if case.kernel == "cross_entropy":
            from lemur_kernels.cross_entropy.blocks import choose

            sizes = dict(case.sizes)
            choose(case.chip, case.seq, sizes["embed"], sizes["vocab"], case.dtype)
    except ValueError as error:
        return str(error)
    if case.kernel != "attention":
        return None
    if case.head_dim not in HEAD_DIMS:
        return f"head_dim={case.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    for direction in ("forward", "backward"):
        if not _proposals(case, direction):
            return (
                f"heads={case.heads}, kv_heads={case.kv_heads}, head_dim={case.head_dim}, "
                f"seq={case.seq}: no blocks fit {case.chip}"
            )
    return None


def block_names() -> list[str]:
    """What `case.blocks` may name: fields of the kernel's Tiling, of both directions or of one."""
    import dataclasses

    from lemur_kernels.attention.tilings import Tiling

    fields = [field.name for field in dataclasses.fields(Tiling)]
    return [*fields, *(f"{side}_{f}" for side in ("forward", "backward") for f in fields)]


def fingerprint() -> str:
    """Changes when the code that the compiled programs are made of does: the kernels and their
    block list; comments and layout do not count. What XLA does around them (pallas_tpu.py) may
    change without hours of compilation. Comparable on one Python version only, as ast.dump is:
    3.11, which the pinned libtpu is installed for.
    """
    import ast
    import hashlib
    from pathlib import Path

    import lemur_kernels.attention as package

    folder = Path(package.__file__).parent
    names = ("steps.py", "tpu_forward.py", "tpu_backward.py")
    code = [ast.dump(ast.parse((folder / name).read_text())) for name in names]
    return hashlib.sha256("".join(code).encode()).hexdigest()[:12]


def _attention(case: Case) -> Built:
    """Heads first, as the public kernels take them, so that no transpose is charged to either."""
    import collections

    import jax
    import numpy as np
    from lemur_kernels.attention import pallas_tpu as tpu
    from lemur_kernels.attention.counts import region_counts, span_count
    from lemur_kernels.attention.mask import Options, Rows
    from lemur_kernels.attention.tilings import kv_heads_per_step

    H, K, S, D = case.heads, case.kv_heads, case.seq, case.head_dim
    window = case.window if case.mask == "window" else None
    options = Options(packed=True, scale=D**-0.5, window=window)
    tilings = {backward: _tiling(case, backward) for backward in (False, True)}

    def rows_of(ids_1S, positions_1S):
        return Rows(positions_1S, positions_1S, ids_1S, ids_1S)

    def forward(q, k, v, ids, positions):
        rows = rows_of(ids, positions)
        return tpu.forward_heads_first(q, k, v, rows, options, tilings[False])

    def backward(q, k, v, ids, positions, out, lse, dout):
        rows = rows_of(ids, positions)
        return tpu.backward_heads_first(q, k, v, rows, options, out, lse, dout, tilings[True])

    def both(q, k, v, ids, positions, dout):
        out, lse = forward(q, k, v, ids, positions)
        return out, backward(q, k, v, ids, positions, out, lse, dout)

    q = ((H, S, D), case.dtype)
    kv = ((K, S, D), case.dtype)
    inputs = [q, kv, kv, ((1, S), "int32"), ((1, S), "int32")]
    saved = [q, ((H, 1, S), "float32"), q]
    functions = {
        "forward": (forward, inputs),
        "backward": (backward, inputs + saved),
        "forward+backward": (both, [*inputs, q]),
    }
    chains = K // kv_heads_per_step(tilings[True].heads, H // K)
    ids = [segment_ids(case)]
    if case.mask == "apart":
        ids = [np.ones(length, np.int32) for length in case.lengths]

    def counted(backward: bool) -> dict[str, int]:
        """Runs of each region in one call on these rows."""
        total, tiling = collections.Counter(), tilings[backward]
        for row in ids:
            starts = np.flatnonzero(np.diff(row, prepend=-1))
            places = np.arange(len(row)) - np.repeat(starts, np.diff(starts, append=len(row)))
            rows = rows_of(row[None], places[None].astype(np.int32))
            total.update(
                region_counts(
                    tpu.padded_rows(rows, tiling.block),
                    options,
                    tiling,
                    heads=H,
                    backward=backward,
                    chains=chains * tiling.split,
                )
            )
        return dict(total)

    with jax.default_device(jax.devices("cpu")[0]):
        counts = {
            "lemur_attention_forward": counted(False),
            "lemur_attention_backward": counted(True),
        }
    # one call for each span of keys that dk and dv are held of
    counts["lemur_attention_backward"] |= {"calls": -(-S // tilings[True].span)}
    # the repeat with a running maximum: its list is empty unless scores leave the safe range
    counts["lemur_attention_online"] = dict.fromkeys(counts["lemur_attention_forward"], 0)
    counts["lemur_attention_online"]["start"] = 0
    fn, args = functions[case.direction]
    spans = span_count(-(-S // tilings[True].block), tilings[True])
    return Built(fn, args, counts, trips=spans)


def cross_entropy(case: Case, implementation: str = "pallas_tpu") -> Built:
    """Loss of one row of `seq` tokens, sizes "embed" and "vocab", in one chunk; "backward" is not a
    thing of its own, as the gradient is computed in the forward pass."""
    import jax
    import jax.numpy as jnp
    from lemur_kernels import cross_entropy as package

    N, E, V = case.seq, dict(case.sizes)["embed"], dict(case.sizes)["vocab"]
    if case.direction == "backward":
        raise NotImplementedError("cross-entropy is compiled forward or forward+backward")
    names = package.cross_entropy.__code__.co_varnames
    if implementation == "pallas_tpu" and "chip" not in names:
        raise NotImplementedError("cross_entropy has no TPU kernel yet")
    chip = {"chip": case.chip} if implementation == "pallas_tpu" else {}

    def loss(x, w, targets, weights):
        out = package.cross_entropy(
            *(x, w, targets, weights),
            z_loss=1e-4,
            chunk_tokens=N,
            implementation=implementation,
            **chip,
        )
        return out.loss + out.z_loss

    fn = loss if case.direction == "forward" else jax.value_and_grad(loss, (0, 1))
    args = [
        ((1, N, E), jnp.dtype(case.dtype)),
        ((E, V), jnp.dtype(case.dtype)),
        ((1, N), jnp.int32),
        ((1, N), jnp.float32),
    ]
    if implementation != "pallas_tpu":
        return Built(fn, args, {})
    from lemur_kernels.cross_entropy.blocks import choose

    b = choose(case.chip, N, E, V, case.dtype)
    tokens, columns, depth = -(-N // b.tokens), -(-V // b.columns), E // b.depth
    counts = {
        "lemur_cross_entropy_project": {
            "grid": tokens * columns * depth,
            "start": tokens,
            "clear": tokens * columns,
            "strip": tokens * columns * (b.tokens // b.strip),
            "close": tokens,
        },
        "lemur_cross_entropy_gradient": {"grid": -(-N // b.gradient_tokens) * columns},
    }
    return Built(fn, args, counts)


def _proposals(case: Case, direction: str) -> list:
    from lemur_kernels.attention.tilings import proposals

    itemsize = {"bfloat16": 2, "float32": 4}[case.dtype]
    sizes = (case.head_dim, case.heads, case.kv_heads, case.seq)
    return proposals(case.chip, direction, itemsize, *sizes)


def _tiling(case: Case, backward: bool):
    """The certified tiling, else the first proposal, with the case's blocks in it; "forward_heads"
    and "backward_heads" are one direction's."""
    import dataclasses

    from lemur_kernels.attention import shapes
    from lemur_kernels.attention.tilings import Tiling

    direction, other = ("backward", "forward") if backward else ("forward", "backward")
    blocks = {
        name.removeprefix(f"{direction}_"): value
        for name, value in case.blocks
        if not name.startswith(f"{other}_")
    }
    sizes = (case.head_dim, case.heads, case.kv_heads, case.seq)
    shape = shapes.Shape(case.chip, direction, case.dtype, *sizes)
    try:
        chosen = Tiling(**shapes.certificate_for(shape).blocks)
    except (ValueError, FileNotFoundError):  # not certified yet: certify_kernels.py asks this too
        chosen = _proposals(case, direction)[0]
    return dataclasses.replace(chosen, **blocks)


BUILDERS = {"attention": _attention, "cross_entropy": cross_entropy}
