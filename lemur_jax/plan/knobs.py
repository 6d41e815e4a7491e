"""What one changed setting would do to HBM and to the step: a model, from a compiled program's
owners and rows. It ranks what to try; only compiling says what fits."""

import dataclasses

from lemur_jax.config import TrainConfig
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
    rows = config.data.batch_size // count // (mesh.data * mesh.fsdp * mesh.dcn_data)
    if count % 2 == 0:
        found.append(_micro_batches(count, count // 2, memory, cost))
    if rows % 2 == 0:
        found.append(_micro_batches(count, count * 2, memory, cost))
    found += _remat(config, rows, memory, cost)
    chunk = min(config.loss.chunk_tokens, config.data.sequence_length)
    if chunk % 2 == 0:
        found.append(_loss_chunk(config, rows, chunk, memory))
    if mesh.fsdp % 2 == 0 and config.model.heads % (2 * mesh.tensor) == 0 and count % 2 == 0:
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


def saved_bytes(config: TrainConfig, rows: int) -> float:
    """Bytes that remat "named" keeps beyond the layer inputs, on one device."""
    c, t = config.model, config.mesh.tensor
    tokens = rows * config.data.sequence_length / config.mesh.sequence
    width = 2 if c.dtype != "float32" else 4
    kv_heads = max(c.kv_heads // t, 1)
    features = 2 * c.heads // t * c.head_dim + 2 * kv_heads * c.head_dim + c.embed
    return tokens * c.layers * (width * features + 4 * c.heads // t)


def _remat(config: TrainConfig, rows: int, memory: Memory, cost: Cost) -> list[Knob]:
    """full <-> named <-> offload: what the named activations take, and what they save."""
    c = config.model
    if c.remat not in ("full", "named", "offload"):
        return []
    kept = saved_bytes(config, rows)
    saved = _recomputed_seconds(config, cost)
    # HBM bytes, host bytes, seconds of recomputation relative to "full"
    states = {"full": (0.0, 0.0, 0.0), "named": (kept, 0.0, -saved), "offload": (0.0, kept, -saved)}
    here = states[c.remat]
    found = []
    for policy, there in states.items():
        if policy == c.remat:
            continue
        hbm, host, seconds = (b - a for a, b in zip(here, there, strict=True))
        why = f"{kept / GIB:.1f} GiB of q, k, v, attention output and MLP input are kept"
        if policy == "offload":
            traffic = 2 * kept * config.micro_batches
            step = cost.step_seconds(3, True)
            why += f" on the host at {traffic / GIB / step:.1f} GiB/s a device, both ways together"
        why += "; counts the recomputation, not what the schedule makes of it"
        change = f"{c.remat} -> {policy}"
        found.append(Knob("ModelConfig.remat", change, hbm, host, (seconds, seconds), why))
    return found


def _recomputed_seconds(config: TrainConfig, cost: Cost) -> float:
    """Seconds in which "full" recomputes what "named" keeps: the attention kernel, the products of
    q, k, v and of the output projection; "named" recomputes the gate and the up product still."""
    c = config.model
    again = [r for r in cost.rows if cost_model.is_recomputed(r.op_name) and r.recomputed]
    kernel = sum(r.times * r.seconds for r in again if r.kind == cost_model.KERNEL)
    products = sum(
        r.times * r.seconds * r.recomputed / r.flops
        for r in cost.rows
        if r.recomputed and r.kind != cost_model.KERNEL
    )
    heads = c.embed * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    share = heads / (heads + 2 * c.embed * c.mlp)
    if c.remat == "full":
        return kernel + share * products
    # Only gate and up are recomputed now: scale them to what full would add.
    forward = sum(
        r.times * r.seconds
        for r in cost.rows
        if r.kind == cost_model.KERNEL and "attention_forward" in r.op_name
    )
    return forward + products * share / (1 - share)


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
