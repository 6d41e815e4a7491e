"""A run's data as its directory tells it: nothing but the ledger and the data set is needed."""

from pathlib import Path

from lemur_jax.config import ConfigError, DataConfig
from lemur_jax.data import events, ledger
from lemur_jax.data.pipeline import Pipeline


def open_run(run_dir: str | Path, data: str | None = None) -> tuple[ledger.Ledger, Pipeline]:
    """The ledger of a run and the pipeline that its last start had.

    Args:
      run_dir: of the run.
      data: where the data set is now; None: where it was.

    Raises ConfigError when the run has no ledger or the data set cannot be opened.
    """
    found = ledger.read_run(run_dir)
    if not found.starts:
        raise ConfigError(
            [f"RUN={str(run_dir)!r}: {found.path.name} has no line that says begun or resumed"]
        )
    last = found.starts[-1]
    config = DataConfig(
        path=data or last["path"],
        batch_size=last["batch_size"],
        sequence_length=last["sequence_length"],
        seed=last["seed"],
        weight_changes=events.parse_weights(last["weight_changes"]),
    )
    # Exclusions that no start has seen yet begin where the run goes on: after what was saved.
    try:
        return found, Pipeline(config, ledger.exclusions(found.entries, found.reached))
    except ConfigError as error:
        hint = f"RUN={str(run_dir)!r} read the data set {config.path!r}: give its place with --data"
        raise ConfigError([*error.problems, hint]) from error
