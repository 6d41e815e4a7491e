"""Runs without a model: what the training loop reads and writes down, for any number of hosts."""

import concurrent.futures
import threading
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
      parts: [start, stop) of the rows of each micro-batch that each host reads.
      rows: of a micro-batch.
      micro_batches: of a step.
    """

    start: int
    saves: Sequence[int]
    parts: Sequence[tuple[int, int]]
    rows: int = 12
    micro_batches: int = 1


class _Host(DataRecord):
    """A process that is a thread: it tells the others its words through a list."""

    def __init__(self, run_dir, config, process: int, said: list[str], barrier: threading.Barrier):
        super().__init__(run_dir, config)
        self._process, self.said, self.barrier = process, said, barrier

    def _texts_of(self, text, readers):
        self.said[self._process] = text
        self.barrier.wait(60)
        heard = list(self.said)
        self.barrier.wait(60)
        return heard if readers == "all" or self._process == 0 else []


def _run(host: _Host, pipeline: Pipeline, session: Session, part: tuple[int, int]) -> None:
    host.start(session.start, pipeline, part, session.rows, session.micro_batches)
    at = session.start
    for save in session.saves:
        for step in range(at, save):
            for micro in range(session.micro_batches):
                first, last = (micro * session.rows + row for row in part)
                host.add(step, first, pipeline.rows(step, first, last))
        host.saved(save)
        at = save


def simulate(run_dir: Path, config: DataConfig, sessions: Sequence[Session]) -> Mapping[int, dict]:
    """Runs the sessions one after another; returns the data position of each checkpoint."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    positions: dict[int, dict] = {}
    for session in sessions:
        n = len(session.parts)
        said, barrier = [""] * n, threading.Barrier(n)
        hosts = [_Host(run_dir, config, process, said, barrier) for process in range(n)]
        pipeline = Pipeline(config, hosts[0].exclusions(NO_STEP_YET))
        if session.start in positions:
            pipeline.check_position(positions[session.start])
        positions = {step: at for step, at in positions.items() if step <= session.start}
        pipeline = pipeline.excluding(hosts[0].exclusions(session.start))
        with concurrent.futures.ThreadPoolExecutor(n) as pool:
            running = [
                pool.submit(_run, host, pipeline, session, part)
                for host, part in zip(hosts, session.parts)
            ]
            for future in running:
                future.result()
        positions |= {save: pipeline.position(save) for save in session.saves}
    return positions
