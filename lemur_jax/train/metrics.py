"""What a run tells people: FLOPs and MFU, metrics.jsonl, TensorBoard events, the loss curve."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lemur_jax.config import LoraConfig, ModelConfig
from lemur_jax.model import decoder, lora, param

# Dense bf16 peak of one device, FLOP/s, as the vendors state it. Keys begin `device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153e12,  # one of a chip's two devices
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}


def flops_per_token(
    config: ModelConfig, sequence_length: int, adapters: LoraConfig | None = None
) -> float:
    """FLOPs that one token of a training step needs: 6 N + 6 L H D T.

    N are the weights that a token is multiplied by (the embedding table is only looked up). The
    second term is causal attention, half of the 12 L H D T of the PaLM convention
    (arXiv:2204.02311 appendix B). Recomputation does not count.

    With adapters it is 4 N + 6 A + 6 L H D T: N are the frozen weights, whose gradient is not
    taken, and A those that are trained.
    """
    weights = _multiplied(decoder.abstract(config), config)
    if adapters is None:
        products = 6.0 * sum(weights.values())
    else:
        trained = _multiplied(lora.abstract(adapters, config), config)
        replaced = lora.whole_leaves(adapters, config)
        frozen = sum(size for name, size in weights.items() if name not in replaced)
        products = 4.0 * frozen + 6.0 * sum(trained.values())
    return products + 6.0 * config.layers * config.heads * config.head_dim * sequence_length


def _multiplied(tree: Any, config: ModelConfig) -> dict[str, int]:
    """The leaves of a model or its adapters that a token is multiplied by, with their sizes."""
    return {
        name: leaf.size
        for name, leaf in param.flatten(tree).items()
        if name != "table" or config.tie_embeddings
    }


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """Peak FLOP/s of one device and how it was obtained. NaN where it is not known.

    A CPU's peak is measured: the best of twenty 2048^3 float32 products, over the simulated
    devices that share the machine; too low on a machine that is busy at that moment.
    """
    for kind, peak in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return peak, f"{device.device_kind}: {peak / 1e12:.0f} TFLOP/s bf16, vendor's figure"
    if device.platform == "cpu":
        size = 2048
        x = jnp.ones((size, size), jnp.float32)
        product = jax.jit(jnp.matmul)
        product(x, x).block_until_ready()
        best = math.inf
        for _ in range(20):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            best = min(best, time.perf_counter() - start)
        peak = 2 * size**3 / best
        return (
            peak / jax.local_device_count(),
            f"CPU: {peak / 1e9:.0f} GFLOP/s, the best of twenty 2048^3 float32 products",
        )
    return math.nan, f"{device.device_kind}: peak not known, no MFU"


@dataclasses.dataclass
class RunLog:
    """metrics.jsonl and TensorBoard events of a run; only the first process writes.

    A context. A resumed run continues the files: lines of steps that the restored checkpoint has
    not seen are dropped, so that the curve has each step once.
    """

    run_dir: Path
    first_step: int
    enabled: bool

    def __enter__(self) -> "RunLog":
        if not self.enabled:
            return self
        # The record writer alone: TensorBoard's EventFileWriter would import TensorFlow.
        from tensorboard.summary.writer.record_writer import RecordWriter

        path = self.run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(self.run_dir) if line["step"] <= self.first_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        events = self.run_dir / "events"
        events.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{self.first_step}"
        self._events = RecordWriter((events / name).open("ab"))
        self._write_event(file_version="brain.Event:2")
        return self

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one event for each value; step 1 is the first."""
        if not self.enabled:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._write_event(step=step, summary=summary)

    def _write_event(self, **fields) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._events.flush()

    def __exit__(self, *_) -> None:
        if self.enabled:
            self._file.close()
            self._events.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; a last line cut off by a kill is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    values = []
    for number, line in enumerate(lines):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise
    return values


def plot_losses(run_dir: Path, unigram_entropy: dict[str, float]) -> Path:
    """Writes loss.png: training loss, held-out loss of each source and its unigram entropy, and
    the steps at which the run was resumed.

    Args:
      run_dir: of the run, with metrics.jsonl.
      unigram_entropy: nats per token of each source's held-out text.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(run_dir)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    train = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    if train:
        axes.plot(*zip(*train), color="0.6", linewidth=1, label="training")
    for index, (source, entropy) in enumerate(unigram_entropy.items()):
        tag, color = f"evaluation/{source}/loss", f"C{index}"
        held_out = [(line["step"], line[tag]) for line in lines if tag in line]
        if held_out:
            axes.plot(*zip(*held_out), "o-", color=color, label=f"held-out {source}")
        axes.axhline(
            entropy, color=color, linestyle=":", label=f"unigram entropy of {source}: {entropy:.2f}"
        )
    resumed = [line["step"] for line in lines if "resumed" in line]
    for index, step in enumerate(resumed):
        label = "resumed" if index == 0 else None
        axes.axvline(step, color="k", linestyle="--", linewidth=0.8, label=label)
    axes.set(xlabel="step", ylabel="nats per token", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
