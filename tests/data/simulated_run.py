"""Runs without a model: what the training loop reads and writes down, for any number of hosts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lemur_jax.config import DataConfig
from lemur_jax.data.pipeline import Pipeline
from lemur_jax.train.data_record import NO_STEP_YET, DataRecord


class Session(NamedTuple):
    """One start of a run.

    Attributes:
      start: the step it goes on from.
      saves: steps of its checkpoints, ascending.
      cuts: host i reads rows [cuts[i], cuts[i + 1]) of each micro-batch.
      micro_batches: of a step.
    """

    start: int
    saves: Sequence[int]
    cuts: Sequence[int]
    micro_batches: int = 1


class _Host(DataRecord):
    """A process that hands its words to the others through a list."""

    def __init__(self, run_dir, config, words: list[str], last: bool):
        super().__init__(run_dir, config)
        self.words, self.last = words, last

    def _gather(self, text):
        self.words.append(text)
        if not self.last:
            return None
        said = list(self.words)
        self.words.clear()
        return said


def simulate(run_dir: Path, config: DataConfig, sessions: Sequence[Session]) -> Mapping[int, dict]:
    """Runs the sessions one after another; returns the data position of each checkpoint."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    positions: dict[int, dict] = {}
    for session in sessions:
        words: list[str] = []
        parts = list(zip(session.cuts, session.cuts[1:]))
        hosts = [_Host(run_dir, config, words, part is parts[-1]) for part in parts]
        pipeline = Pipeline(config, hosts[0].exclusions(NO_STEP_YET))
        if session.start in positions:
            pipeline.check_position(positions[session.start])
        positions = {step: at for step, at in positions.items() if step <= session.start}
        pipeline = pipeline.excluding(hosts[0].exclusions(session.start))
        rows = session.cuts[-1]
        for host, part in zip(hosts, parts):
            host.start(session.start, pipeline, part, rows, session.micro_batches)
        at = session.start
        for save in session.saves:
            for step in range(at, save):
                for host, (start, stop) in zip(hosts, parts):
                    for micro in range(session.micro_batches):
                        first = micro * rows + start
                        host.add(step, first, pipeline.rows(step, first, micro * rows + stop))
            for host in hosts:
                host.saved(save)
            positions[save], at = pipeline.position(save), save
    return positions
