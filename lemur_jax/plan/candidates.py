"""Which configurations of a run a slice could have, and a model of their memory and time.

The model ranks; it never says that something fits: only the compiler does. Its constants are those
of compiled programs (Llama-2-70B, v4-512); docs/plan.md has its errors.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from lemur_jax import sharding
from lemur_jax.config import ConfigError, MeshConfig, TrainConfig
from lemur_jax.model import decoder, lora, param
from lemur_jax.plan.knobs import activation_bytes, making_weights
from lemur_jax.plan.slices import Slice
from lemur_jax.train.metrics import flops_per_token

GIB = 2**30
SEPARATE = (
    "xla_enable_async_all_gather=true",
    "xla_enable_async_collective_permute=true",
    "xla_tpu_enable_async_collective_fusion=false",
)
FUSED = (
    "xla_enable_async_all_gather=true",
    "xla_enable_async_collective_permute=true",
    "xla_tpu_enable_async_collective_fusion=true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "xla_tpu_overlap_compute_collective_tc=true",
)
# remat, saved, offloaded: from the least memory to the most.
POLICIES = (
    ("named", (), ("layer_input", "attention", "mlp_residual")),
    ("named", (), ("layer_input", "attention")),
    ("named", (), ("layer_input",)),
    ("full", (), ()),
    ("named", ("kv", "attention"), ()),
    ("named", ("q", "kv", "attention", "mlp_residual"), ()),
    ("named", ("q", "kv", "attention", "mlp_residual", "up"), ()),
)
PRODUCT_RATE = 0.89  # of the peak, as compiled
MEMORY_BOUND = 0.05  # of the products' time
FORWARD_SHARE = 0.3  # of a step, in which offloaded activations leave


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One configuration with the model's figures of one device.

    Attributes:
      hbm_bytes, host_bytes: at the peak.
      seconds: of a step: synchronous collectives and half of the asynchronous ones exposed.
      host_bytes_per_s: that offloading needs in each direction.
    """

    config: TrainConfig
    hbm_bytes: float
    host_bytes: float
    seconds: float
    host_bytes_per_s: float

    def __str__(self) -> str:
        c, mesh = self.config, self.config.mesh
        sizes = " x ".join(
            f"{name} {getattr(mesh, name)}"
            for name in sharding.MESH_AXES
            if getattr(mesh, name) > 1
        )
        kept = [f"{name} saved" for name in c.model.remat_saved]
        kept += [f"{name} offloaded" for name in c.model.remat_offloaded]
        remat = c.model.remat + (f" ({', '.join(kept)})" if kept else "")
        return f"{sizes or 'one device'}; {c.micro_batches} micro-batches; remat {remat}"


def candidates(config: TrainConfig, where: Slice, host_gib_per_s: float) -> list[Candidate]:
    """All configurations that divide, fastest first by the model.

    Args:
      config: resolved; its mesh, micro-batches, remat, loss chunk and options are replaced.
      host_gib_per_s: what offloading may use of a device's link to its host, each way.
    """
    found = []
    weights = param.size(decoder.abstract(config.model)).parameters
    trained = weights
    if config.lora is not None:
        trained = param.size(lora.abstract(config.lora, config.model)).parameters
    data = config.data
    length = data.sequence_length
    flops = flops_per_token(config.model, length, config.lora) * data.batch_size * length
    loss = dataclasses.replace(config.loss, chunk_tokens=length)
    # Only v4 makes gathers asynchronous that are not fused with a product.
    options = SEPARATE if where.chip.name == "v4" else FUSED
    for mesh, explicit in _meshes(config, where):
        most = data.batch_size // sharding.batch_ways(mesh)
        counts = [m for m in range(1, most + 1) if most % m == 0]
        for micro, (remat, saved, offloaded) in itertools.product(counts, POLICIES):
            model = dataclasses.replace(
                config.model, remat=remat, remat_saved=saved, remat_offloaded=offloaded
            )
            try:
                changed = dataclasses.replace(
                    config,
                    mesh=mesh,
                    model=model,
                    loss=loss,
                    micro_batches=micro,
                    explicit_gradients=explicit,
                    compiler_options=options,
                )
                rows = data.batch_size // micro
                sharding.check(model, mesh, rows=rows, sequence_length=length)
            except ConfigError:
                continue
            one = estimate(changed, where, weights, trained, flops)
            if one.host_bytes_per_s <= host_gib_per_s * GIB:
                found.append(one)
    return sorted(found, key=lambda c: c.seconds)


def _meshes(config: TrainConfig, where: Slice) -> Iterator[tuple[MeshConfig, bool]]:
    """Explicit gradients on two fsdp axes, and automatic ones beside a tensor axis."""
    devices, per_slice = where.devices, where.devices // where.slices
    for tensor in (1, 2, 4, 8, 16):
        if per_slice % tensor:
            continue
        for data in (1, 2, 4, 8):
            if per_slice % (tensor * data):
                continue
            fsdp = devices // where.slices // tensor // data
            outer = _outer(fsdp, where) if tensor == 1 else 1
            mesh = MeshConfig(
                data=data,
                fsdp_outer=outer,
                fsdp=fsdp // outer,
                tensor=tensor,
                dcn_data=where.slices,
            )
            yield mesh, tensor == 1


def _outer(fsdp: int, where: Slice) -> int:
    """The larger part of the fsdp devices, made of whole sides of the slice: all but one side."""
    side = min(where.shape)
    return fsdp // side if side > 1 and fsdp % side == 0 and fsdp > side else 1


def estimate(
    config: TrainConfig, where: Slice, weights: int, trained: int, flops: float
) -> Candidate:
    """The model of one configuration of so many weights (of which some may be frozen, beside
    adapters that are trained) and model FLOPs a step."""
    c, mesh, chip = config.model, config.mesh, where.chip
    ways = mesh.fsdp_outer * mesh.fsdp * mesh.tensor
    layer = weights / max(c.layers, 1)
    rows = config.data.batch_size // config.micro_batches // sharding.batch_ways(mesh)
    tokens = rows * config.data.sequence_length / mesh.sequence
    vocab = sharding.padded_vocab(c) / mesh.tensor

    gradients = 2 if config.micro_batches > 1 else 1
    state = 4 * (weights + (2 + gradients) * trained) / ways
    kept = activation_bytes(config, rows)
    saved = kept["layer_input"] * ("layer_input" not in c.remat_offloaded)
    saved += sum(kept[name] for name in c.remat_saved)
    away = sum(kept[name] for name in c.remat_offloaded)
    working = 2 * tokens * (3 * c.mlp / mesh.tensor + 5 * c.embed)
    fetched = 2 * away / c.layers
    gathered = 2 * (1.5 * layer / mesh.tensor + c.embed * vocab)
    logits = 2 * tokens * vocab
    hbm = state + saved + gathered + max(working + fetched, logits)

    products = flops / where.devices * (1 + _recomputed(config)) / (chip.flops_per_s * PRODUCT_RATE)
    sync, hidden = _collective_seconds(config, where, weights, trained)
    seconds = products * (1 + MEMORY_BOUND) + sync + hidden / 2
    away_all = away * config.micro_batches
    return Candidate(config, hbm, away, seconds, away_all / (FORWARD_SHARE * seconds))


def _recomputed(config: TrainConfig) -> float:
    """FLOPs that the backward pass does again, as a share of the model's."""
    c = config.model
    kept = (*c.remat_saved, *c.remat_offloaded)
    weights = making_weights(c)
    again = sum(size for name, size in weights.items() if name not in kept)
    whole = sum(weights.values()) + c.embed * c.mlp  # the last product is never done again
    return again / whole / 3 * (1 if c.remat != "none" else 0)


def _collective_seconds(
    config: TrainConfig, where: Slice, weights: int, trained: int
) -> tuple[float, float]:
    """Synchronous and asynchronous seconds of a step, between one and three axes of the torus."""
    mesh, chip, c = config.mesh, where.chip, config.model
    axes = 2 if chip.dimensions == 3 else 1.5
    rate = chip.ici_bytes_per_s * axes
    sent = 2 / mesh.tensor * config.micro_batches  # bytes for each weight
    gathers = 2 * sent * weights / rate
    reduces = sent * trained / rate * (1 if config.explicit_gradients else 2)
    tokens = config.data.batch_size * config.data.sequence_length / sharding.batch_ways(mesh)
    sums = 0.0
    if mesh.tensor > 1:  # two sums of activations forward, two back, two again: all-reduces
        around = 2 * (mesh.tensor - 1) / mesh.tensor
        sums = 6 * c.layers * tokens * c.embed * 2 * around / chip.ici_bytes_per_s
    if mesh.data > 1 or mesh.dcn_data > 1:
        part = 4 * trained / (mesh.fsdp_outer * mesh.fsdp * mesh.tensor)
        sums += 2 * part / (chip.dcn_bytes_per_s if mesh.dcn_data > 1 else rate)
    return reduces + sums, gathers
