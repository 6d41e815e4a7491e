"""The state as a checkpoint holds it, and how a run gets its first state.

Flat names on disk: params/layers/wq, opt/..., step, guard/..., and of a run with LoRA
adapters/layers/wq_a. The item `params` can be read without opening a file of the item `opt`; with
LoRA it is the frozen base, and whoever reads the model adds the adapters (convert/adapted.py).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from lemur_jax import checkpoint
from lemur_jax.config import (
    COMPUTATION_FIELDS,
    ConfigError,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    lora_config,
    model_config,
)
from lemur_jax.convert import hf, small_files
from lemur_jax.convert.adapted import ADAPTERS
from lemur_jax.convert.load import load_model
from lemur_jax.data.pipeline import Pipeline
from lemur_jax.data.tokenizer import Tokenizer
from lemur_jax.model import lora, param
from lemur_jax.train.state import TrainState, abstract_state, random_state, state_from_model


def to_items(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """{"params": {...}, "opt": {...}} by flat names."""
    params = {f"params/{name}": leaf for name, leaf in param.flatten(state.model).items()}
    rest = {"step": state.step, "opt": state.opt_state, "guard": state.guard}
    items = {"params": params, "opt": param.flatten(rest)}
    if state.adapters is not None:
        items[ADAPTERS] = param.flatten({ADAPTERS: state.adapters})
    return items


def from_items(like: TrainState, flat: dict[str, jax.Array]) -> TrainState:
    """The state whose structure is `like`, from all arrays of both items."""
    params = {
        name.removeprefix("params/"): leaf
        for name, leaf in flat.items()
        if name.startswith("params/")
    }
    rest = {name: leaf for name, leaf in flat.items() if not name.startswith("params/")}
    shape = {"step": like.step, "opt": like.opt_state, "guard": like.guard}
    shape[ADAPTERS] = like.adapters  # None: no leaves
    rest = param.unflatten(shape, rest)
    model = param.unflatten(like.model, params)
    return TrainState(rest["step"], model, rest["opt"], rest["guard"], rest[ADAPTERS])


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins or goes on.

    Attributes:
      state: on the mesh.
      hf_extras: what the Hugging Face model at the origin of the weights said beside them, or None.
      files: small files that came with it (generation_config.json, licence).
    """

    state: TrainState
    hf_extras: dict[str, Any] | None
    files: dict[str, bytes]


def about(config: TrainConfig, pipeline: Pipeline, start: Start, step: int) -> dict[str, Any]:
    """What makes a checkpoint self-describing, beside its arrays."""
    return (
        {
            "kind": "train_state",
            "model": dataclasses.asdict(config.model),
            "data": pipeline.position(step),
            "tokenizer_fingerprint": pipeline.tokenizer_fingerprint,
            "optimizer": config.optimizer.name,
        }
        | ({"hf_extras": start.hf_extras} if start.hf_extras else {})
        | _about_lora(config)
    )


def _about_lora(config: TrainConfig) -> dict[str, Any]:
    """What a reader needs to add the adapters, and what PEFT calls the base."""
    if config.lora is None:
        return {}
    return {"lora": dataclasses.asdict(config.lora), "lora_base": str(config.init_from)}


def files(operative_config: str, pipeline: Pipeline, start: Start) -> dict[str, bytes]:
    """Small files that every checkpoint carries: the operative config and the tokenizer."""
    found = start.files | {"config.gin": operative_config.encode()}
    for path in sorted(Path(pipeline.tokenizer_dir).iterdir()):
        found[f"{small_files.TOKENIZER_DIR}/{path.name}"] = path.read_bytes()
    return found


def starting_state(
    config: TrainConfig,
    transform: optax.GradientTransformation,
    mesh: Mesh,
    pipeline: Pipeline,
    report: Callable[[str], None],
) -> Start:
    """The state to begin or go on with.

    Raises:
      ConfigError: the run's checkpoint is of another model or other data.
      CheckpointError: there are checkpoints, but none is sound.
      ConversionError: `init_from` holds no model, or another one.
    """
    like = abstract_state(config.model, transform, mesh, config.lora)
    directory = Path(config.run_dir).absolute() / checkpoint.CHECKPOINTS
    # Where the weights come from, in order of precedence:
    # 1. The run's own latest verified checkpoint, with optimizer state and data position.
    if checkpoint.complete_steps(directory):
        newest = checkpoint.describe(checkpoint.resolve(directory))
        _check_same_model(model_config(newest.about["model"]), config.model, config.run_dir)
        _check_same_lora(lora_config(newest.about.get("lora")), config.lora, config.run_dir)
        optimizer = newest.about["optimizer"]
        if optimizer != config.optimizer.name:
            raise ConfigError(
                [
                    f"OptimizerConfig.name={config.optimizer.name!r}, but the checkpoints in "
                    f"{config.run_dir} have the state of {optimizer!r}: set it back, or start a "
                    "new run with TrainConfig.init_from"
                ]
            )
        items = to_items(like)
        targets = {name: leaf for item in items.values() for name, leaf in item.items()}
        step_dir, arrays = checkpoint.restore_latest(
            directory, tuple(items), targets, report=report
        )
        found = checkpoint.describe(step_dir)
        pipeline.check_position(found.about["data"])
        if jax.process_index() == 0:
            checkpoint.set_aside(directory, found.step, report)
        report(f"resumed from {step_dir} at step {found.step}, all digests verified")
        return Start(from_items(like, arrays), *_carried(step_dir))
    # 2. The parameters of `init_from`; optimizer state and data position start fresh.
    if config.init_from is not None:
        model, source = load_model(config.init_from, mesh=mesh, config=config.model)
        _check_tokenizer(Path(source), pipeline, config.init_from, report)
        report(f"parameters from {source}; optimizer and data position start fresh")
        state = state_from_model(model, transform, mesh, config.lora, config.seed)
        if state.adapters is not None:
            report(_describe_lora(state, config))
        return Start(state, *_carried(source))
    # 3. Random weights.
    report(f"random weights, seed {config.seed}")
    return Start(random_state(config.model, transform, mesh, config.seed), None, {})


def _describe_lora(state: TrainState, config: TrainConfig) -> str:
    trained, frozen = (param.size(x).parameters for x in (state.adapters, state.model))
    replaced = lora.whole_leaves(config.lora, config.model)  # trained, so not frozen
    frozen -= sum(getattr(state.model, name)[...].size for name in replaced)
    what = ", ".join(config.lora.targets)
    if config.lora.embeddings:
        what += ", and table and head whole"
    return (
        f"LoRA: rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {what}: {trained:,} "
        f"parameters are trained, {frozen:,} frozen"
    )


def _carried(path: Any) -> tuple[dict[str, Any] | None, dict[str, bytes]]:
    """hf_extras and files of a source, without its tokenizer: the run has the data set's."""
    extras, found = hf.carried(path)
    prefix = f"{small_files.HF_DIR}/"
    return extras, {name: data for name, data in found.items() if name.startswith(prefix)}


def _check_tokenizer(
    source: Path, pipeline: Pipeline, name: str, report: Callable[[str], None]
) -> None:
    """The data must be tokenised as the weights were: ids mean nothing else."""
    of_ours = source / small_files.TOKENIZER_DIR
    directory = of_ours if of_ours.is_dir() else source
    if any((directory / file).is_file() for file in ("tokenizer.model", "tokenizer.json")):
        fingerprint = Tokenizer.load(directory).fingerprint
        pipeline.check_tokenizer(fingerprint, f"TrainConfig.init_from={name!r}")
    else:
        report(f"WARNING: {source} has no tokenizer, so that of the data could not be checked")


def _check_same_model(stored: ModelConfig, asked: ModelConfig, run_dir: str) -> None:
    """How it computes may change between resumes; what the model is may not."""
    different = [
        f"ModelConfig.{field.name}={getattr(asked, field.name)!r}, but the checkpoints in "
        f"{run_dir} have {getattr(stored, field.name)!r}: set it back, or use another run_dir"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in COMPUTATION_FIELDS
        and getattr(asked, field.name) != getattr(stored, field.name)
    ]
    if different:
        raise ConfigError(different)


def _check_same_lora(stored: LoraConfig | None, asked: LoraConfig | None, run_dir: str) -> None:
    """Adapters and their optimizer state belong together; a full run has neither."""
    if stored != asked:
        raise ConfigError(
            [
                f"TrainConfig.lora={asked}, but the checkpoints in {run_dir} have {stored}: set it "
                "back, or start a new run with TrainConfig.init_from"
            ]
        )
