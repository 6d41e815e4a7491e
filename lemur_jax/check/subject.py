"""What is run by the checks that run something: the run's own model, mesh and functions.

Weights are random, or the run's shapes would have to be read; layers are as many as memory allows.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lemur_jax import sharding
from lemur_jax.config import ConfigError, MeshConfig, TrainConfig
from lemur_jax.data.pipeline import Batch
from lemur_jax.model import lora, param
from lemur_jax.model.decoder import Decoder, abstract
from lemur_jax.train import programs

AUTO_BYTES = 4 << 30  # of weights, gradients and a copy of them, over all devices
COPIES = 4


class Weights(NamedTuple):
    """Of the run's shapes: the model, and adapters or None."""

    model: Decoder
    adapters: lora.Adapters | None

    @property
    def adapted(self) -> Decoder:
        """The model as it computes."""
        return self.model if self.adapters is None else lora.attach(self.model, self.adapters)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run, resolved for the devices that are here.

    Attributes:
      config: with resolved mesh, attention and loss, perhaps fewer layers.
      mesh: of the devices.
      attention: as the run's start says it.
      reduced: where this is less than the run, one line each.
    """

    config: TrainConfig
    mesh: Mesh
    attention: str
    reduced: tuple[str, ...]

    @property
    def ways(self) -> int:
        """Rows of a batch come in multiples of this."""
        return sharding.batch_ways(self.config.mesh)

    def weights(self) -> Weights:
        """Random weights where the run has them. B of adapters is not zero: A has a gradient."""
        model, adapt, key = self.config.model, self.config.lora, jax.random.key(self.config.seed)

        def make(key):
            if adapt is None:
                return Weights(Decoder(model, key), None)
            decoder = Decoder(model, key)
            adapters = lora.beside(decoder, adapt, key)
            keys = iter(jax.random.split(key, len(jax.tree.leaves(adapters))))
            drawn = jax.tree.map(
                lambda w: w + 0.02 * jax.random.normal(next(keys), w.shape, w.dtype), adapters
            )
            return Weights(decoder, drawn)

        where = param.shardings(jax.eval_shape(make, key), self.mesh)
        return jax.jit(make, out_shardings=where)(key)

    def place(self, batch: Batch, micro_batches: int) -> Batch:
        """[N,T] arrays on the mesh as [M,R,T]; N divides by M times `ways`."""
        rows = len(batch.inputs) // micro_batches
        split = (x.reshape(micro_batches, rows, -1) for x in batch)
        return Batch(*(sharding.place(np.ascontiguousarray(x), 0, rows, self.mesh) for x in split))


def subject(config: TrainConfig, layers: int | None) -> Subject:
    """The run on the devices that are here.

    Args:
      config: the run.
      layers: of the model that is run; None: as many as AUTO_BYTES allow.

    Raises:
      ConfigError: `layers` are more than the model has, or the model does not divide over the mesh.
    """
    reduced = []
    config, mesh = _on_devices(config, reduced)
    config = _on_kernels(config, reduced)
    has = config.model.layers
    if layers is not None and not 1 <= layers <= has:
        raise ConfigError([f"--layers={layers}: the model has {has}; give 1 to {has}"])
    fewer = layers or _affordable(config)
    if fewer < has:
        reduced.append(f"{fewer} of {has} layers (--layers={has} runs all)")
        model = dataclasses.replace(config.model, layers=fewer)
        config = dataclasses.replace(config, model=model)
    ways = sharding.batch_ways(config.mesh)
    sharding.check(
        config.model, config.mesh, rows=ways, sequence_length=config.data.sequence_length
    )
    device = jax.devices()[0]
    attention = programs.describe_attention(config, device)
    return Subject(programs.resolve(config, device), mesh, attention, tuple(reduced))


def _on_devices(config: TrainConfig, reduced: list[str]) -> tuple[TrainConfig, Mesh]:
    try:
        mesh = sharding.make_mesh(config.mesh)
    except ConfigError as error:
        reduced.append(f"one device in place of the run's mesh ({error})")
        config = dataclasses.replace(config, mesh=MeshConfig(fsdp=1))
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    sizes = sharding.resolve_mesh(config.mesh, mesh.size)
    return dataclasses.replace(config, mesh=sizes), mesh


def _on_kernels(config: TrainConfig, reduced: list[str]) -> TrainConfig:
    """The config with kernels that this device has."""
    try:
        programs.resolve(config, jax.devices()[0])
        return config
    except ConfigError as error:
        reduced.append(f"kernels of this device in place of the run's ({error})")
    model = dataclasses.replace(config.model, attention="auto")
    loss = dataclasses.replace(config.loss, implementation="auto")
    return dataclasses.replace(config, model=model, loss=loss)


def _affordable(config: TrainConfig) -> int:
    """Layers whose weights, gradients and copies take AUTO_BYTES; at least one."""
    flat = param.flatten(abstract(config.model))
    sizes = {name: leaf.size * leaf.dtype.itemsize for name, leaf in flat.items()}
    layer = sum(n for name, n in sizes.items() if name.startswith("layers/")) / config.model.layers
    rest = sum(n for name, n in sizes.items() if not name.startswith("layers/"))
    return int(min(config.model.layers, max(1, (AUTO_BYTES / COPIES - rest) // layer)))
