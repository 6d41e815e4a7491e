"""What a run writes down about its data: RUN/data_ledger.jsonl, for `lemur data audit`."""

import itertools
from pathlib import Path

import jax

from lemur_jax.checkpoint import CheckpointError
from lemur_jax.checkpoint.agreement import Agreement
from lemur_jax.config import ConfigError, DataConfig
from lemur_jax.data import ledger, location
from lemur_jax.data.batch import Batch
from lemur_jax.data.events import Exclusion, exclusions_text
from lemur_jax.data.pipeline import Pipeline
from lemur_jax.data.reads import Reads, add

TIMEOUT_SECONDS = 600.0
NO_STEP_YET = 2**62  # later than any step
_serial_numbers = itertools.count()  # of gatherings: the same in every process


class DataRecord:
    """The ledger of a run that is about to start, and the sum of what this process feeds.

    Args:
      run_dir: of the run.
      config: of its data.
    """

    def __init__(self, run_dir: str | Path, config: DataConfig):
        self._path, self._config = Path(run_dir) / ledger.LEDGER, config
        found = ledger.read(self._path)
        self.problems = found.problems
        self._first_start = not found.starts
        # Exclusions of the data set hold for runs that start after them: taken over here, once.
        of_data_set = ledger.read_exclusions(config.path).entries
        self._adopted = ledger.adopted(found.entries, of_data_set)
        self._entries = [*found.entries, *self._adopted]
        self._process = jax.process_index()
        self._reads, self._since = Reads(), 0
        self._mine: range | list[int] = range(0)  # rows of its part that this process counts

    def exclusions(self, next_step: int) -> tuple[Exclusion, ...]:
        """What is left out; what no start has seen yet is from `next_step` on."""
        return ledger.exclusions(self._entries, next_step)

    def start(
        self, step: int, pipeline: Pipeline, part: tuple[int, int], rows: int, micro_batches: int
    ) -> None:
        """Writes that the run begins or goes on at `step`.

        Args:
          step: steps done before.
          pipeline: with its exclusions.
          part: [start, stop) of the rows of each micro-batch that this process reads.
          rows: of a micro-batch, over all processes.
          micro_batches: of a step.

        Raises ConfigError when processes found other exclusions: they do not share the run_dir.
        """
        self._agree(exclusions_text(pipeline.exclusions))
        texts = self._texts_of("{} {}".format(*part), readers="all")
        parts = [tuple(map(int, text.split())) for text in texts]
        # Parts may overlap (a mesh that splits the model over hosts, or interleaves them): each
        # row is counted by the first process that reads it.
        earlier = parts[: self._process]
        self._mine = [
            row - part[0]
            for row in range(*part)
            if not any(start <= row < stop for start, stop in earlier)
        ]
        self._since = step
        if self._process != 0:
            return
        path = self._config.path
        for entry in self._adopted:
            facts = {name: fact for name, fact in entry.facts.items() if name != "time"}
            ledger.append(
                self._path, "exclude", **facts | {"from_data_set": ledger.entry_id(entry)}
            )
        ledger.append(
            self._path,
            "begun" if self._first_start and step == 0 else "resumed",
            **pipeline.position(step),
            path=str(location.local(path) if location.is_local(path) else path),
            processes=len(parts),
            ranges=sorted(set(parts)),
            rows=rows,
            micro_batches=micro_batches,
        )

    def add(self, step: int, first_row: int, batch: Batch) -> None:
        """Counts rows of the global batch of `step` that this process is about to feed."""
        self._reads.add(step, first_row, batch, self._mine)

    def saved(self, step: int) -> None:
        """Writes that a checkpoint of `step` is being saved, and what was fed since the last."""
        sums = self._texts_of(str(self._reads.take()), readers="first")
        if self._process == 0:
            facts = {"step": step, "since": self._since, "reads": f"{add(map(int, sums)):016x}"}
            ledger.append(self._path, "saved", **facts)
        self._since = step

    def _agree(self, text: str) -> None:
        agreement = Agreement(TIMEOUT_SECONDS)
        of_first = agreement.reach(value=text)
        wrong = None
        if of_first != text:
            wrong = f"reads exclusions {text!r}, process 0 {of_first!r}"
        try:
            agreement.reach(wrong)
        except CheckpointError as error:
            problem = f"TrainConfig.run_dir: {error}: every process must see the same directory"
            raise ConfigError([problem]) from error

    def _texts_of(self, text: str, readers: str) -> list[str]:
        """What each process says, in their order, for process 0 (readers="first"; [] for the
        others) or for "all". No device takes part."""
        if jax.process_count() == 1:
            return [text]
        from jax._src import distributed  # see checkpoint/agreement.py

        client, key = distributed.global_state.client, f"lemur_data/{next(_serial_numbers)}"
        client.key_value_set(f"{key}/{self._process}", text)
        if readers == "first" and self._process != 0:
            return []
        milliseconds = int(TIMEOUT_SECONDS * 1000)
        return [
            str(client.blocking_key_value_get(f"{key}/{process}", milliseconds))
            for process in range(jax.process_count())
        ]
