"""What one changed setting would do to HBM and to the step: a model, from a compiled program's
owners and rows. It ranks what to try; only compiling says what fits."""

import dataclasses

import jax.numpy as jnp

from lemur_jax import sharding
from lemur_jax.config import ACTIVATION_NAMES, ModelConfig, TrainConfig
from lemur_jax.plan import cost as cost_model
from lemur_jax.plan import memory as owners
from lemur_jax.plan.cost import Cost, Row
from lemur_jax.plan.memory import Memory
from lemur_jax.sharding import padded_vocab

GIB = 2**30
_PER_MICRO_BATCH = (owners.SAVED, owners.WORKING, owners.LOGITS, owners.FETCHED)


@dataclasses.dataclass(frozen=True)
class Knob:
    """One setting changed.

    Attributes:
      setting: e.g. "TrainConfig.micro_batches". change: "4 -> 2".
      hbm_bytes: added to the peak (negative: saved). host_bytes: added to the host's memory.
      seconds: added to a step, at the best and the worst corner of the interval.
      why: where the numbers come from.
    """

    setting: str
    change: str
    hbm_bytes: float
    host_bytes: float
    seconds: tuple[float, float]
    why: str

    def __str__(self) -> str:
        low, high = sorted(self.seconds)
        host = f", {self.host_bytes / GIB:+.1f} GiB of the host" if self.host_bytes else ""
        return (
            f"{self.setting} {self.change}: {self.hbm_bytes / GIB:+.1f} GiB{host}, "
            f"{low:+.1f} .. {high:+.1f} s ({self.why})"
        )


def knobs(config: TrainConfig, memory: Memory, cost: Cost) -> list[Knob]:
    """The neighbours of a configuration that its own fields allow.

    Args:
      config: what was compiled: with the mesh's sizes resolved.
      memory, cost: of its train step.
    """
    found = []
    count, mesh = config.micro_batches, config.mesh
    rows = config.data.batch_size // count // sharding.batch_ways(mesh)
    if count % 2 == 0:
        found.append(_micro_batches(count, count // 2, memory, cost))
    if rows % 2 == 0:
        found.append(_micro_batches(count, count * 2, memory, cost))
    found += _remat(config, rows, memory, cost)
    chunk = min(config.loss.chunk_tokens, config.data.sequence_length)
    if chunk % 2 == 0:
        found.append(_loss_chunk(config, rows, chunk, memory))
    heads_divide = config.model.heads % (2 * mesh.tensor) == 0 and not config.explicit_gradients
    if mesh.fsdp % 2 == 0 and heads_divide and count % 2 == 0:
        found.append(_tensor(config, rows, memory, cost))
    return found


def _owned(memory: Memory, prefixes: tuple[str, ...]) -> float:
    return sum(n for owner, n in memory.owners.items() if owner.startswith(prefixes))


def _waiting(cost: Cost, rows: list[Row]) -> tuple[float, float]:
    """Seconds of the rows' collectives: synchronous ones at 3 axes, all at 1 axis."""
    sync = [r for r in rows if r.kind == cost_model.SYNC]
    every = [r for r in rows if r.kind in (cost_model.SYNC, cost_model.ASYNC)]
    low = sum(r.times * r.transfer.seconds(cost.chip, 3) for r in sync)
    return low, sum(r.times * r.transfer.seconds(cost.chip, 1) for r in every)


def _micro_batches(now: int, then: int, memory: Memory, cost: Cost) -> Knob:
    """Activations grow with the rows of a micro-batch; weights are gathered, and their gradients
    reduced and added up, once in each. What is outside of the micro-batches' loop stays."""
    ratio = now / then
    hbm = (ratio - 1) * _owned(memory, _PER_MICRO_BATCH)
    if then == 1:
        hbm -= memory.owners.get(owners.GRADIENT_SUM, 0)
    if now == 1:
        hbm += memory.owners.get(owners.GRADIENTS, 0)
    inside = [r for r in cost.rows if r.path and (now > 1 or len(r.path) == 1)]
    low, high = _waiting(cost, inside)
    factor = then / now - 1
    return Knob(
        "TrainConfig.micro_batches",
        f"{now} -> {then}",
        hbm,
        0.0,
        (factor * low, factor * high),
        "activations grow with the rows; weights are gathered and reduced once a micro-batch; "
        "products at their present rate",
    )


def activation_bytes(config: TrainConfig, rows: int) -> dict[str, float]:
    """Bytes of each of config.ACTIVATION_NAMES over all layers, on one device."""
    c, t = config.model, config.mesh.tensor
    tokens = c.layers * rows * config.data.sequence_length / config.mesh.sequence
    width = jnp.dtype(c.dtype).itemsize
    heads, kv_heads = c.heads / t, max(c.kv_heads / t, 1)
    return {
        "layer_input": tokens * width * c.embed,
        "q": tokens * width * heads * c.head_dim,
        "kv": tokens * width * 2 * kv_heads * c.head_dim,
        "attention": tokens * (width * heads * c.head_dim + 4 * heads),
        "mlp_residual": tokens * width * c.embed,
        "gate": tokens * width * c.mlp / t,
        "up": tokens * width * c.mlp / t,
    }


def making_weights(c: ModelConfig) -> dict[str, int]:
    """Weights of a layer whose product makes each activation; the attention has none."""
    heads = c.embed * c.heads * c.head_dim
    mlp = c.embed * c.mlp
    kv = c.embed * 2 * c.kv_heads * c.head_dim
    return {"q": heads, "kv": kv, "mlp_residual": heads, "gate": mlp, "up": mlp}


def _recomputation_seconds(config: TrainConfig, rows: int, cost: Cost) -> dict[str, float]:
    """Seconds of a step in which the backward pass makes each activation again, when it is not
    kept but what it is made of is: at the present rate of the products and of the kernel."""
    c = config.model
    products = [r for r in cost.rows if r.flops and r.kind != cost_model.KERNEL]
    rate = sum(r.times * r.seconds for r in products) / sum(r.times * r.flops for r in products)
    kernels = [r for r in cost.rows if r.kind == cost_model.KERNEL]
    kernels = [r for r in kernels if "attention_forward" in r.name]
    kept = "attention" in c.remat_saved + c.remat_offloaded
    forward = sum(r.times * r.seconds for r in kernels) / (1 if kept else 2)
    tokens = config.micro_batches * rows * config.data.sequence_length / config.mesh.sequence
    per_weight = 2 * tokens * c.layers * rate / config.mesh.tensor
    products = {name: per_weight * weights for name, weights in making_weights(c).items()}
    return products | {"attention": forward}


def _remat(config: TrainConfig, rows: int, memory: Memory, cost: Cost) -> list[Knob]:
    """Each activation's next place: recomputed -> saved, saved -> offloaded, and back."""
    c = config.model
    if c.remat not in ("full", "named"):
        return []
    sizes, seconds = activation_bytes(config, rows), _recomputation_seconds(config, rows, cost)
    found = []
    for name in ACTIVATION_NAMES:
        size, again = sizes[name], seconds.get(name, 0.0)
        lists = {"saved": c.remat_saved, "offloaded": c.remat_offloaded}
        now = next((place for place, names in lists.items() if name in names), "recomputed")
        if name == "layer_input" and now != "offloaded":
            now = "saved"
        traffic = size * config.micro_batches / cost.step_seconds(3, True) / GIB
        why = f"{size / GIB:.1f} GiB"
        if now == "recomputed":
            found.append(_place(name, now, "saved", size, 0.0, -again, why))
        elif now == "saved":
            offload = f"{why}, {traffic:.1f} GiB/s each way and device"
            found.append(_place(name, now, "offloaded", -size, size, 0.0, offload))
            if again:
                found.append(_place(name, now, "recomputed", -size, 0.0, again, why))
        else:
            found.append(_place(name, now, "saved", size, -size, 0.0, why))
    return found


def _place(name, now, then, hbm, host, seconds, why) -> Knob:
    change = f"{name}: {now} -> {then}"
    return Knob("ModelConfig.remat_saved, remat_offloaded", change, hbm, host, (seconds,) * 2, why)


def _loss_chunk(config: TrainConfig, rows: int, chunk: int, memory: Memory) -> Knob:
    """The chunk's logits lie in HBM only during the loss, which need not be the peak."""
    width = 2 if config.loss.implementation == "pallas_tpu" else 8
    vocab = padded_vocab(config.model) / config.mesh.tensor
    nbytes = width * rows * chunk * vocab
    at_peak = bool(memory.owners.get(owners.LOGITS, 0))
    why = "at the peak" if at_peak else f"the loss, {nbytes / GIB:.1f} GiB, is not at the peak"
    return Knob(
        "LossConfig.chunk_tokens",
        f"{chunk} -> {chunk // 2}",
        -nbytes / 2 if at_peak else 0.0,
        0.0,
        (0.0, 0.0),
        why,
    )


def _tensor(config: TrainConfig, rows: int, memory: Memory, cost: Cost) -> Knob:
    """Half the fsdp, twice the tensor axis: a device sees twice the rows and half the features.
    Gathered weights halve; activations of the embedding's width double; every layer sums its
    outputs over the tensor axis, of which one ring is assumed."""
    c, mesh = config.model, config.mesh
    gathered = memory.owners.get(owners.GATHERED, 0)
    full_size = memory.owners.get(owners.GRADIENT_LAYER, 0)
    wide = _owned(memory, (owners.SAVED + "layer input", owners.SAVED + "MLP input"))
    hbm = wide - (gathered + full_size) / 2
    low, high = _waiting(cost, [r for r in cost.rows if len(r.path) > 0])
    tokens = 2 * rows * config.data.sequence_length * config.micro_batches
    passes = 6 if c.remat == "full" else 4
    ways = 2 * mesh.tensor
    moved = passes * c.layers * tokens * c.embed * 2 * 2 * (ways - 1) / ways
    before = passes * c.layers * tokens / 2 * c.embed * 2 * 2 * (mesh.tensor - 1) / mesh.tensor
    sums = (moved - before) / cost.chip.ici_bytes_per_s
    return Knob(
        "MeshConfig.fsdp, tensor",
        f"{mesh.fsdp} x {mesh.tensor} -> {mesh.fsdp // 2} x {ways}",
        hbm,
        0.0,
        (sums - low / 2, sums - high / 2),
        "half of each gathered weight, twice the rows, four to six sums of activations a layer",
    )
