"""A training run from config to final checkpoint. Mathematics is elsewhere; this only schedules.

mesh -> data -> state -> step -> (evaluate, save) -> report
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lemur_jax import checkpoint, sharding
from lemur_jax.config import TrainConfig
from lemur_jax.data import epochs
from lemur_jax.data.pipeline import Batch, Pipeline
from lemur_jax.errors import LemurError
from lemur_jax.train import ahead, programs, saved
from lemur_jax.train import metrics as run_metrics
from lemur_jax.train.data_record import NO_STEP_YET, DataRecord
from lemur_jax.train.epochs import with_steps
from lemur_jax.train.optimizer import optimizer
from lemur_jax.train.progress import StepProgress, StopRequest
from lemur_jax.train.step import Metrics

SKIP_REASONS = {1: "loss or gradient is not finite", 2: "gradient norm is a spike"}


class TrainingStoppedError(LemurError):
    """Training cannot usefully go on; says at which step, why, and on which documents."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
      step: steps done in all.
      finished: False when a signal ended it early; the state is saved either way.
      held_out_loss: nats per token of each source, of the last evaluation.
      unigram_entropy: of the same held-out text.
    """

    step: int
    finished: bool
    held_out_loss: dict[str, float]
    unigram_entropy: dict[str, float]


def train(config: TrainConfig, operative_config: str, compiled: Path | None = None) -> RunResult:
    """Runs or resumes `config.run_dir` until `config.steps`, or until SIGTERM.

    Args:
      config: the run.
      operative_config: gin text that builds `config` again; saved with every checkpoint.
      compiled: directory of `lemur plan --save`, whose programs are run instead of compiling.

    Raises:
      ConfigError: before anything is traced or written.
      CompiledError: what lies in `compiled` is for another run, machine or version.
      CheckpointError: a save or restore failed.
      TrainingStoppedError: too many skipped steps in a row.
    """
    primary = jax.process_index() == 0
    console = Console(quiet=not primary)
    report = functools.partial(console.print, soft_wrap=True, markup=False, highlight=False)
    run_dir = Path(config.run_dir)
    if config.epochs is not None:
        asked, config = config.epochs, with_steps(config)
        report(f"epochs: {asked}, which is {config.steps} steps of {config.data.batch_size} rows")

    # ----- mesh ------------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh)
    config = dataclasses.replace(config, mesh=sharding.resolve_mesh(config.mesh, mesh.size))
    rows = config.data.batch_size // config.micro_batches
    sharding.check(
        config.model, config.mesh, rows=rows, sequence_length=config.data.sequence_length
    )
    attention = programs.describe_attention(config, jax.devices()[0])
    config = programs.resolve(config, jax.devices()[0])
    shown = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    report(f"mesh: {mesh.size} x {jax.devices()[0].device_kind} ({shown}); attention: {attention}")
    report(f"loss: {config.loss.implementation}")

    # ----- data ------------------------------------------------------------------------------
    record = DataRecord(run_dir, config.data)
    for problem in record.problems:
        report(f"WARNING: data ledger: {problem}; see `lemur data audit {run_dir}`")
    pipeline = Pipeline(config.data, record.exclusions(NO_STEP_YET))
    pipeline.check_vocabulary(config.model.vocab_size)
    tokens_per_step = config.data.batch_size * config.data.sequence_length
    used = pipeline.order.used(config.steps * config.data.batch_size)
    epochs.report_run(pipeline.manifest, used, report)

    # ----- state -----------------------------------------------------------------------------
    transform = optimizer(config.optimizer)
    begun = saved.starting_state(config, transform, mesh, pipeline, report)
    state = begun.state
    first_step = int(state.step)
    pipeline = pipeline.excluding(record.exclusions(first_step))
    if first_step >= config.steps:
        report(f"nothing to do: step {first_step} of TrainConfig.steps={config.steps} is done")
    if primary:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.gin").write_text(operative_config)
    log = run_metrics.RunLog(run_dir, first_step, enabled=primary)
    writer = checkpoint.CheckpointWriter(
        run_dir / checkpoint.CHECKPOINTS,
        keep_latest=config.checkpoint.keep_latest,
        keep_every_steps=config.checkpoint.keep_every_steps,
        report=report,
    )
    small_files = saved.files(operative_config, pipeline, begun)

    def save(step: int) -> None:
        # First: a checkpoint that a kill left without its line would look like skipped steps.
        record.saved(step)
        writer.save(
            step,
            saved.to_items(state),
            about=saved.about(config, pipeline, begun, step),
            files=small_files,
        )

    # ----- step ------------------------------------------------------------------------------
    if first_step < config.steps:
        step_fn = _program("train", config, mesh, compiled, report)
        eval_fn = _program("evaluate", config, mesh, compiled, report)
        part = sharding.local_row_range(rows, mesh)
        record.start(first_step, pipeline, part, rows, config.micro_batches)
    peak, peak_source = run_metrics.peak_flops(jax.devices()[0])
    products = "6 N" if config.lora is None else "4 N + 6 A"
    report(f"MFU = ({products} + 6 L H D T) x tokens/s / peak; {peak_source}")
    progress = StepProgress(
        console,
        first_step=first_step,
        steps=config.steps,
        steps_per_log=config.steps_per_log,
        tokens_per_step=tokens_per_step,
        flops_per_step=tokens_per_step
        * run_metrics.flops_per_token(config.model, config.data.sequence_length, config.lora),
        peak_flops=peak * mesh.size,
    )
    stop = StopRequest()
    step, saved_step, held_out = first_step, first_step, {}
    unread: tuple[int, Metrics] | None = None  # metrics lag one step: the device never waits

    def read_metrics() -> None:
        if unread is not None:
            _account(*unread, config, pipeline, log, progress, report)

    # transfer_guard: an implicit copy between host and device in this loop is a bug.
    with jax.set_mesh(mesh), log, writer, stop, progress, jax.transfer_guard("disallow"):
        if first_step:
            log.write(first_step, {"resumed": 1.0})
        while step < config.steps and not stop.before(step):
            batch = device_batch(pipeline, step, config.micro_batches, rows, mesh, record)
            state, metrics = step_fn(state, batch)
            read_metrics()
            step += 1
            unread = (step, metrics)
            last = step == config.steps

            # ----- evaluate ------------------------------------------------------------------
            every = config.evaluation.steps_per_evaluation
            if last or (every and step % every == 0):
                read_metrics()
                unread = None
                with progress.paused():
                    held_out = evaluate(eval_fn, state.adapted, pipeline, config, mesh)
                log.write(step, {f"evaluation/{s}/loss": loss for s, loss in held_out.items()})
                report(f"step {step}: held-out {_beside_unigram(held_out, pipeline)}")

            # ----- save ----------------------------------------------------------------------
            if last or step % config.checkpoint.steps_per_save == 0:
                with progress.paused():
                    save(step)
                saved_step = step

        read_metrics()
        if step < config.steps and saved_step != step:
            report(f"asked to stop: saving step {step}")
            save(step)
        writer.wait()

    # ----- report ----------------------------------------------------------------------------
    entropy = {source: pipeline.unigram_entropy(source) for source in pipeline.sources}
    if primary:
        report(f"loss curve: {run_metrics.plot_losses(run_dir, entropy)}")
    return RunResult(step, step >= config.steps, held_out, entropy)


def _program(
    name: str, config: TrainConfig, mesh: Mesh, saved_in: Path | None, report: Callable
) -> jax.stages.Compiled:
    """A program of the run, compiled here or ahead of time. The step must be in `saved_in`."""
    program = {"train": programs.step, "evaluate": programs.evaluation}[name](config, mesh)
    if saved_in is not None:
        if name == "train" or (saved_in / name).exists():
            loaded = ahead.load(saved_in / name, ahead.facts(name, config, mesh, program))
            report(f"{name}: compiled ahead of time, {saved_in / name}")
            return loaded
        report(f"{name}: not in {saved_in}, compiled here")
    return programs.compiled(program, mesh, programs.options(config))


def device_batch(
    pipeline: Pipeline,
    step: int,
    micro_batches: int,
    rows: int,
    mesh: Mesh,
    record: DataRecord,
) -> Batch:
    """The global batch of a step on the mesh, [M,R,T]; each process reads only its own rows."""
    start, stop = sharding.local_row_range(rows, mesh)
    parts = []
    for micro in range(micro_batches):
        parts.append(pipeline.rows(step, micro * rows + start, micro * rows + stop))
        record.add(step, micro * rows + start, parts[-1])
    return Batch(*(sharding.place(np.stack(field), start, rows, mesh) for field in zip(*parts)))


def evaluate(
    eval_fn: Callable, model, pipeline: Pipeline, config: TrainConfig, mesh: Mesh
) -> dict[str, float]:
    """Held-out loss of each source, nats per token; the same batches every time."""
    losses, parts = {}, config.micro_batches
    rows = config.data.batch_size // parts
    start, stop = sharding.local_row_range(rows, mesh)
    for source in pipeline.sources:
        sums = []
        for index in range(min(config.evaluation.batches, pipeline.evaluation_batches(source))):
            batch = (x.reshape(parts, rows, -1) for x in pipeline.evaluation(source, index))
            placed = (sharding.place(x[:, start:stop], start, rows, mesh) for x in batch)
            sums.append(eval_fn(model, Batch(*placed)))
        nll, _, tokens = (sum(column) for column in zip(*jax.device_get(sums)))
        losses[source] = float(nll / tokens)
    return losses


def _beside_unigram(held_out: dict[str, float], pipeline: Pipeline) -> str:
    return ", ".join(
        f"{source} {loss:.3f} nats/token (unigram entropy {pipeline.unigram_entropy(source):.3f})"
        for source, loss in held_out.items()
    )


def _account(
    step: int,
    metrics: Metrics,
    config: TrainConfig,
    pipeline: Pipeline,
    log: run_metrics.RunLog,
    progress: StepProgress,
    report: Callable[[str], None],
) -> None:
    """Fetches the metrics of a finished step, logs them, and stops a run that only skips."""
    values = Metrics(*(float(x) for x in jax.device_get(metrics)))
    progress.advance(step, values.loss)
    if step % config.steps_per_log == 0 or step == config.steps or values.skipped:
        line = {f"train/{name}": value for name, value in values._asdict().items()}
        line["train/tokens_per_second"] = progress.tokens_per_second
        line["train/mfu"] = progress.mfu
        log.write(step, {name: value for name, value in line.items() if math.isfinite(value)})
    if not values.skipped:
        return
    documents = pipeline.provenance(step - 1)  # step 1 is made by batch 0
    what = (
        f"{SKIP_REASONS[int(values.skipped)]} (loss {values.loss:.4g}, gradient norm "
        f"{values.grad_norm:.4g})"
    )
    report(f"step {step} skipped: {what}; its rows: {documents}")
    if values.skipped_in_a_row >= config.optimizer.max_skipped_in_a_row:
        raise TrainingStoppedError(
            f"stopped at step {step}: {values.skipped_in_a_row:.0f} steps in a row were skipped, "
            f"OptimizerConfig.max_skipped_in_a_row={config.optimizer.max_skipped_in_a_row}. Last: "
            f"{what}. Look at the learning rate, the data ({documents}) and the weights"
        )
