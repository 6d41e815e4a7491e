"""The state as a checkpoint holds it, and how a run gets its first state.

Flat names on disk: params/layers/wq, opt/..., step, guard/... The item `params` can be read
without opening a file of the item `opt`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from lemur_jax import checkpoint
from lemur_jax.config import ConfigError, ModelConfig, TrainConfig, model_config
from lemur_jax.data.pipeline import Pipeline
from lemur_jax.model import param
from lemur_jax.train.state import TrainState, abstract_state, random_state, state_from_model

ITEMS = ("params", "opt")


def to_items(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """{"params": {...}, "opt": {...}} by flat names."""
    params = {f"params/{name}": leaf for name, leaf in param.flatten(state.model).items()}
    rest = {"step": state.step, "opt": state.opt_state, "guard": state.guard}
    return {"params": params, "opt": param.flatten(rest)}


def from_items(like: TrainState, flat: dict[str, jax.Array]) -> TrainState:
    """The state whose structure is `like`, from all arrays of both items."""
    params = {
        name.removeprefix("params/"): leaf
        for name, leaf in flat.items()
        if name.startswith("params/")
    }
    rest = {name: leaf for name, leaf in flat.items() if not name.startswith("params/")}
    shape = {"step": like.step, "opt": like.opt_state, "guard": like.guard}
    rest = param.unflatten(shape, rest)
    return TrainState(rest["step"], param.unflatten(like.model, params), rest["opt"], rest["guard"])


def about(config: TrainConfig, pipeline: Pipeline, step: int) -> dict[str, Any]:
    """What makes a checkpoint self-describing, beside its arrays."""
    return {
        "kind": "train_state",
        "model": dataclasses.asdict(config.model),
        "data": pipeline.position(step),
        "tokenizer_fingerprint": pipeline.tokenizer_fingerprint,
    }


def files(operative_config: str, pipeline: Pipeline) -> dict[str, bytes]:
    """Small files that every checkpoint carries: the operative config and the tokenizer."""
    found = {"config.gin": operative_config.encode()}
    for path in sorted(Path(pipeline.tokenizer_dir).iterdir()):
        found[f"tokenizer/{path.name}"] = path.read_bytes()
    return found


def starting_state(
    config: TrainConfig,
    transform: optax.GradientTransformation,
    mesh: Mesh,
    pipeline: Pipeline,
    report: Callable[[str], None],
) -> TrainState:
    """The state to begin or go on with.

    Raises:
      ConfigError: the run's checkpoint is of another model or other data.
      CheckpointError: there are checkpoints, but none is sound.
    """
    like = abstract_state(config.model, transform, mesh)
    directory = Path(config.run_dir) / checkpoint.CHECKPOINTS
    # Where the weights come from, in order of precedence:
    # 1. The run's own latest verified checkpoint, with optimizer state and data position.
    if checkpoint.complete_steps(directory):
        newest = checkpoint.describe(checkpoint.resolve(directory))
        _check_same_model(model_config(newest.about["model"]), config.model, config.run_dir)
        items = to_items(like)
        targets = {name: leaf for item in items.values() for name, leaf in item.items()}
        step_dir, arrays = checkpoint.restore_latest(directory, ITEMS, targets, report=report)
        found = checkpoint.describe(step_dir)
        pipeline.check_position(found.about["data"])
        report(f"resumed from {step_dir} at step {found.step}, all digests verified")
        return from_items(like, arrays)
    # 2. The parameters of `init_from`; optimizer state and data position start fresh.
    if config.init_from is not None:
        from lemur_jax.convert.load import load_model

        model, _ = load_model(config.init_from, mesh=mesh, config=config.model)
        report(f"parameters from {config.init_from}; optimizer and data position start fresh")
        return state_from_model(model, transform, mesh)
    # 3. Random weights.
    report(f"random weights, seed {config.seed}")
    return random_state(config.model, transform, mesh, config.seed)


def _check_same_model(stored: ModelConfig, asked: ModelConfig, run_dir: str) -> None:
    """How it computes may change between resumes; what the model is may not."""
    free = {"remat", "attention", "dtype"}
    different = [
        f"ModelConfig.{field.name}={getattr(asked, field.name)!r}, but the checkpoints in "
        f"{run_dir} have {getattr(stored, field.name)!r}: set it back, or use another run_dir"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in free and getattr(asked, field.name) != getattr(stored, field.name)
    ]
    if different:
        raise ConfigError(different)
