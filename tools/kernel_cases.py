"""Our kernels under the measuring tools: a case in, the function, its arguments and its region
counts out. The only file of the tools that knows the kernel package."""

from tpu_compiler.cases import Built, Case, segment_ids
from tpu_compiler.topology import chip_named


def build(case: Case) -> Built:
    """The project's kernel for the case.

    Raises:
      NotImplementedError: the kernel does not exist for the case, in one line.
    """
    if case.kernel not in BUILDERS:
        raise NotImplementedError(f"no TPU kernel for {case.kernel} yet")
    return BUILDERS[case.kernel](case)


def candidates(case: Case) -> list[dict[str, int]]:
    """Block sizes to try for the case, by name; [] where there is no kernel.

    Each is what `case.blocks` takes: fields of the kernel's Tiling.
    """
    import dataclasses

    if case.kernel != "attention":
        return []
    chosen = dataclasses.asdict(_tiling(case, case.direction == "backward"))
    tried = [{n: chosen[n] for n in ("block", "heads", "unroll", "strip", "trapezoid")}]
    for heads in (4, 2, 1):
        fewer = {"heads": heads, "unroll": min(tried[0]["unroll"], heads)}
        if heads < tried[0]["heads"] and case.heads % heads == 0:
            tried.append(tried[0] | fewer)
    return tried


def fingerprint() -> str:
    """Changes when the code of the TPU attention kernels does; comments and layout do not count."""
    import ast
    import hashlib
    from pathlib import Path

    import lemur_kernels.attention as package

    folder = Path(package.__file__).parent
    code = [
        ast.dump(ast.parse((folder / name).read_text()))
        for name in ("mask.py", "steps.py", "tpu_forward.py", "tpu_backward.py", "pallas_tpu.py")
    ]
    return hashlib.sha256("".join(code).encode()).hexdigest()[:12]


def _attention(case: Case) -> Built:
    """Heads first, as the public kernels take them, so that no transpose is charged to either."""
    import jax
    import numpy as np
    from lemur_kernels.attention import pallas_tpu as tpu
    from lemur_kernels.attention.counts import region_counts
    from lemur_kernels.attention.mask import Options, Rows

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
    ids_1S = segment_ids(case)[None]
    starts = np.flatnonzero(np.diff(ids_1S[0], prepend=-1))
    positions_1S = (np.arange(S) - np.repeat(starts, np.diff(starts, append=S)))[None]
    inputs = [q, kv, kv, ((1, S), "int32"), ((1, S), "int32")]
    saved = [q, ((H, 1, S), "float32"), q]
    functions = {
        "forward": (forward, inputs),
        "backward": (backward, inputs + saved),
        "forward+backward": (both, [*inputs, q]),
    }
    chains = K // tpu.tpu_forward.kv_heads_per_step(tilings[True].heads, H // K)
    with jax.default_device(jax.devices("cpu")[0]):
        rows = rows_of(ids_1S.astype(np.int32), positions_1S.astype(np.int32))
        counts = {
            "lemur_attention_forward": region_counts(
                rows, options, tilings[False], heads=H, backward=False
            ),
            "lemur_attention_backward": region_counts(
                rows,
                options,
                tilings[True],
                heads=H,
                backward=True,
                chains=chains * tilings[True].split,
            ),
        }
    # the repeat with a running maximum: its list is empty unless scores leave the safe range
    counts["lemur_attention_online"] = dict.fromkeys(counts["lemur_attention_forward"], 0)
    counts["lemur_attention_online"]["start"] = 0
    fn, args = functions[case.direction]
    return Built(fn, args, counts)


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


def _tiling(case: Case, backward: bool):
    """The package's own choice for the chip, with the case's blocks in it; "forward_heads" and
    "backward_heads" are one direction's."""
    import dataclasses

    from lemur_kernels.attention import pallas_tpu as tpu

    wide = chip_named(case.chip).mxu_size == 256
    chosen = tpu.choose(case.seq, case.heads, case.kv_heads, wide, backward)
    mine, other = ("backward_", "forward_") if backward else ("forward_", "backward_")
    blocks = {n.removeprefix(mine): v for n, v in case.blocks if not n.startswith(other)}
    return dataclasses.replace(chosen, **blocks)


BUILDERS = {"attention": _attention, "cross_entropy": cross_entropy}
