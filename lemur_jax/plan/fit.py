"""The smallest change with which a program that does not fit would: found by compiling."""

import dataclasses
from collections.abc import Callable, Iterator

from lemur_jax import sharding
from lemur_jax.config import ConfigError, MeshConfig, TrainConfig
from lemur_jax.plan.programs import Compiled, CompileRefused
from lemur_jax.plan.serving import Serving
from lemur_jax.plan.slices import Slice, shapes, slice_named

MOST_COMPILES = 13
SMALLEST_CHUNK = 512
_MICRO = "TrainConfig.micro_batches"


@dataclasses.dataclass(frozen=True)
class Change:
    """A changed recipe: `text` says what was changed, as gin bindings."""

    text: str
    config: TrainConfig
    where: Slice
    serving: Serving | None


Compile = Callable[[TrainConfig, Slice, str, Serving | None], Compiled]


def smallest_fix(
    config: TrainConfig,
    where: Slice,
    name: str,
    serving: Serving | None,
    compile_program: Compile,
    tried: Callable[[str, str], None] = lambda change, verdict: None,
) -> tuple[Change, Compiled] | None:
    """Tries changes in the order of `changes`, each compiled; the first that fits.

    Args:
      config: resolved; the compiler has refused it for its memory.
      tried: told each change and what became of it.

    Returns:
      None when none of MOST_COMPILES changes fits.
    """
    compiled = 0
    for change in changes(config, where, name, serving):
        if compiled == MOST_COMPILES:
            break
        try:
            made = compile_program(change.config, change.where, name, change.serving)
        except ConfigError:
            continue  # does not divide: no change for this model
        except CompileRefused as refusal:
            compiled += 1
            tried(change.text, refusal.reason())
            continue
        tried(change.text, "fits")
        return change, made
    return None


def changes(
    config: TrainConfig, where: Slice, name: str, serving: Serving | None
) -> Iterator[Change]:
    """Changes to a recipe, the least costly to its speed first: loss chunks, remat, micro-batches,
    mesh, offload; then all memory savers at once; then larger slices, without and with them."""

    def change(text: str, new: TrainConfig, place: Slice = where) -> Change:
        return Change(text, new, place, serving)

    if name in ("prefill", "decode"):
        yield from _serving(config, where, name, serving)
        return
    savers: list[tuple[str, Callable[[TrainConfig], TrainConfig]]] = []
    chunk = min(config.loss.chunk_tokens, config.data.sequence_length)
    if chunk > SMALLEST_CHUNK:
        smaller = max(SMALLEST_CHUNK, chunk // 4)
        savers.append((f"LossConfig.chunk_tokens={smaller}", _loss(chunk_tokens=smaller)))
    if name == "train":
        if config.model.remat in ("none", "dots"):
            yield change(*_remat(config, saved=("kv", "attention", "mlp_residual")))
        if config.model.remat != "full":
            full = _model(remat="full", remat_saved=(), remat_offloaded=())
            savers.append(("ModelConfig.remat='full'", full))
        ways = sharding.batch_ways(config.mesh)
        rows = config.data.batch_size // config.micro_batches // ways
        # The last: one row a device. What a step holds shrinks with the rows of a micro-batch.
        for factor in sorted({2, 4, 8, rows}):
            if factor > 1 and rows % factor == 0:
                micro = config.micro_batches * factor
                savers.append((f"{_MICRO}={micro}", _micro_batches(micro)))
    for text, apply in savers:
        yield change(text, apply(config))
    for text, mesh in _meshes(config):
        yield change(text, dataclasses.replace(config, mesh=mesh))
    if name == "train":
        yield change(*_remat(config, offloaded=("layer_input", "attention")))
    # The last saver of each setting is its strongest.
    strongest = {text.split("=")[0]: (text, apply) for text, apply in savers}
    smallest, texts = config, []
    for text, apply in strongest.values():
        smallest, texts = apply(smallest), [*texts, text]
    if len(texts) > 1:
        yield change(", ".join(texts), smallest)
    yield from _larger(config, where, [], serving)
    if texts:
        yield from _larger(smallest, where, texts, serving)


def _loss(**fields) -> Callable[[TrainConfig], TrainConfig]:
    return lambda c: dataclasses.replace(c, loss=dataclasses.replace(c.loss, **fields))


def _model(**fields) -> Callable[[TrainConfig], TrainConfig]:
    return lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, **fields))


def _remat(
    config: TrainConfig, saved: tuple[str, ...] = (), offloaded: tuple[str, ...] = ()
) -> tuple[str, TrainConfig]:
    """Text and config of remat="named" with these lists."""
    lists = {"remat_saved": saved, "remat_offloaded": offloaded}
    text = ", ".join(f"ModelConfig.{field}={names!r}" for field, names in lists.items() if names)
    changed = _model(remat="named", **lists)(config)
    return f"ModelConfig.remat='named', {text}", changed


def _micro_batches(count: int) -> Callable[[TrainConfig], TrainConfig]:
    return lambda c: dataclasses.replace(c, micro_batches=count)


def _meshes(config: TrainConfig) -> Iterator[tuple[str, MeshConfig]]:
    """More devices for each weight: data into fsdp, then a wider tensor axis, which a step with
    explicit gradients cannot have."""
    mesh = config.mesh
    if mesh.data > 1:
        fsdp = mesh.data * mesh.fsdp
        yield (
            f"MeshConfig.data=1, MeshConfig.fsdp={fsdp}",
            dataclasses.replace(mesh, data=1, fsdp=fsdp),
        )
    if mesh.fsdp % 2 == 0 and not config.explicit_gradients:
        fsdp, tensor = mesh.fsdp // 2, mesh.tensor * 2
        yield (
            f"MeshConfig.fsdp={fsdp}, MeshConfig.tensor={tensor}",
            dataclasses.replace(mesh, fsdp=fsdp, tensor=tensor),
        )


def _serving(
    config: TrainConfig, where: Slice, name: str, serving: Serving | None
) -> Iterator[Change]:
    """Fewer rows, a wider tensor axis, a shorter cache."""
    ways = sharding.batch_ways(config.mesh)
    for factor in (2, 4, 8):
        if serving.batch % (factor * ways) == 0:
            fewer = dataclasses.replace(serving, batch=serving.batch // factor)
            yield Change(f"--rows={fewer.batch}", config, where, fewer)
    for text, mesh in _meshes(config):
        yield Change(text, dataclasses.replace(config, mesh=mesh), where, serving)
    field = {"prefill": "prompt", "decode": "cache"}[name]
    half = getattr(serving, field) // 2
    shorter = dataclasses.replace(serving, **{field: half})
    yield Change(f"--{field}_tokens={half}", config, where, shorter)
    yield from _larger(config, where, [], serving)


def _larger(
    config: TrainConfig, where: Slice, texts: list[str], serving: Serving | None
) -> Iterator[Change]:
    """Slices of two and four times the devices; the mesh grows along fsdp."""
    chip = where.chip.name
    legal = shapes(chip)
    now = next(n for n, shape in legal.items() if shape == where.shape)
    for factor in (2, 4):
        if now * factor not in legal:
            continue
        prefix = f"{where.slices}x" if where.slices > 1 else ""
        place = slice_named(f"{prefix}{chip}-{now * factor}")
        mesh = dataclasses.replace(config.mesh, fsdp=config.mesh.fsdp * factor)
        ways, micro = sharding.batch_ways(mesh), config.micro_batches
        while micro % 2 == 0 and config.data.batch_size % (micro * ways):
            micro //= 2  # as many rows on each device as before
        said = [text for text in texts if not text.startswith(_MICRO)]
        if micro != config.micro_batches or len(said) < len(texts):
            said.append(f"{_MICRO}={micro}")
        text = ", ".join([*said, f"--topology={place.name}", f"MeshConfig.fsdp={mesh.fsdp}"])
        new = dataclasses.replace(config, mesh=mesh, micro_batches=micro)
        yield Change(text, new, place, serving)
