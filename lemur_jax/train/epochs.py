"""Epochs to steps: so that nobody has to divide rows by batches by hand."""

import dataclasses

from lemur_jax.config import ConfigError, TrainConfig
from lemur_jax.data.pipeline import read_manifest


def with_steps(config: TrainConfig) -> TrainConfig:
    """The config with `steps` in place of `epochs`: epochs x training rows / batch_size.

    Each row is then read exactly `epochs` times: an epoch of a source is a permutation of its rows
    (data/order.py), and the run ends where the last one does.

    Raises:
      ConfigError: the data set has several sources, whose epochs their rates decide; or the batches
        would not come out even, so that some rows would be read more often than others.
    """
    if config.epochs is None:
        return config
    sources = read_manifest(config.data.path)["sources"]
    where = f"TrainConfig.epochs={config.epochs}"
    if len(sources) > 1:
        raise ConfigError(
            [
                f"{where}: {config.data.path!r} has {len(sources)} sources ({', '.join(sources)}), "
                "which their rates repeat unequally: set TrainConfig.steps instead"
            ]
        )
    rows = next(iter(sources.values()))["splits"]["train"]["rows"]
    batch = config.data.batch_size
    steps, over = divmod(config.epochs * rows, batch)
    if over:
        raise ConfigError(
            [
                f"{where}: {config.epochs} x {rows} training rows do not divide by "
                f"DataConfig.batch_size={batch}, so {batch - over} rows would be read once more: "
                f"build the data set with ChatBuildConfig.rows_multiple={batch}, which adds "
                f"{-rows % batch} empty rows, or set TrainConfig.steps={steps + 1} and epochs=None"
            ]
        )
    return dataclasses.replace(config, steps=steps, epochs=None)
