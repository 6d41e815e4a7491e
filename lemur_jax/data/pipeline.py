"""What training reads: batch(step), for any step, on any host, in any order.

Dimension key: B batch_size, T sequence_length. A pipeline has no state: `batch(step)` is a pure
function of the data set, the seed, the declared events (`events.py`) and the step, so resuming
needs a few integers (`position`) and any number of hosts read parts of one and the same global
batch (`rows`).

Nothing is read ahead: the loop reads a batch while the devices compute the step before it (it waits
for metrics one step late), so a thread that read earlier would hide nothing more.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lemur_jax.config import ConfigError, DataConfig
from lemur_jax.data import events, location
from lemur_jax.data.batch import Batch, make_batch
from lemur_jax.data.build import FORMAT_VERSION
from lemur_jax.data.events import Exclusion
from lemur_jax.data.position import problems_of
from lemur_jax.data.store import Piece, Rows, RowStore
from lemur_jax.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lemur_jax.data.order import Order, Place


def read_manifest(path: str) -> dict:
    """Manifest of the data set at `path`. Raises ConfigError when there is none that we know."""
    fix = "give the directory that `lemur data build` wrote"
    try:
        stored = location.read(path, "manifest.json")
        manifest = json.loads(stored or b"")
        version = manifest["format_version"]
        complete = "sources" in manifest and "tokenizer_fingerprint" in manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        if location.read(path, "journal/build.json") is not None:
            fix = "its build is unfinished; run the same `lemur data build` again"
        raise ConfigError(
            [f"DataConfig.path={path!r} holds no data set ({_fault(error, stored)}): {fix}"]
        ) from error
    if version not in (1, FORMAT_VERSION) or not complete:
        raise ConfigError(
            [
                f"DataConfig.path={path!r} has format_version={version}, not a data set of version "
                f"1 or {FORMAT_VERSION}: {fix}, or build it again with this version of lemur_jax"
            ]
        )
    return manifest


def _fault(error: Exception, stored: bytes | None) -> str:
    """What is wrong with a manifest.json that gave this error; None when there is none."""
    if isinstance(error, OSError):
        return f"its manifest.json cannot be read: {error}"
    if stored is None:
        return "its manifest.json is missing"
    if isinstance(error, ValueError):
        return f"its manifest.json is not JSON: {error}"
    return "its manifest.json has no format_version"


class Pipeline:
    """The data set of a DataConfig, as a function from step to batch.

    Attributes:
      config: the DataConfig.
      manifest: what `lemur data build` wrote about the data set.
      sources: names of the sources, in the manifest's order.
      tokenizer_dir: the data set's copy of its tokenizer.
      tokenizer_fingerprint: of that tokenizer.
      vocab_size: ids are below this.
      rates: share of each source, not normalised, as built.
      exclusions: documents that are left out, and from which step on.
    """

    def __init__(self, config: DataConfig, exclusions: Sequence[Exclusion] = ()):
        self.config = config
        self.manifest = read_manifest(config.path)
        self.sources: tuple[str, ...] = tuple(self.manifest["sources"])
        self.tokenizer_dir = location.fetch(location.join(config.path, "tokenizer"))
        self.tokenizer_fingerprint: str = self.manifest["tokenizer_fingerprint"]
        self.vocab_size: int = self.manifest["vocab_size"]
        built = self.manifest["sequence_length"]
        if config.sequence_length != built:
            raise ConfigError(
                [
                    f"DataConfig.sequence_length={config.sequence_length} but {config.path!r} was "
                    f"built with {built}: set it to {built}, or build the data set again"
                ]
            )
        copied = Tokenizer.load(self.tokenizer_dir).fingerprint
        if copied != self.tokenizer_fingerprint:
            raise ConfigError(
                [
                    f"tokenizer {str(self.tokenizer_dir)!r} has fingerprint {copied[:12]}, but the "
                    f"rows were made with {self.tokenizer_fingerprint[:12]}: the tokenizer does "
                    "not match; restore its files or build the data set again"
                ]
            )
        self._stores = {
            (source, split): self._open(source, split, counts)
            for source, about in self.manifest["sources"].items()
            for split, counts in about["splits"].items()
        }
        self.rates: dict[str, float] = {n: s["rate"] for n, s in self.manifest["sources"].items()}
        events.check_weight_changes(config.weight_changes, self.rates)
        self._lazy_order = None
        self._set_exclusions(exclusions)

    def excluding(self, exclusions: Sequence[Exclusion]) -> "Pipeline":
        """The same pipeline with other exclusions. Raises ConfigError as opening one does."""
        other = copy.copy(self)
        other._set_exclusions(exclusions)
        return other

    def _set_exclusions(self, exclusions: Sequence[Exclusion]) -> None:
        problems = [
            f"exclusion at step {exclusion.step}: source {source!r} has no document "
            f"{max(numbers)}: the list was made for another data set than {self.config.path!r}"
            for exclusion in exclusions
            for source, numbers in exclusion.documents.items()
            if source not in self.sources or max(numbers) >= self._stores[source, "train"].documents
        ]
        if problems:
            raise ConfigError(problems)
        self.exclusions = tuple(exclusions)
        self._excluded_from: dict[str, dict[int, int]] = {}  # source -> document -> step
        for exclusion in exclusions:
            for source, numbers in exclusion.documents.items():
                steps = self._excluded_from.setdefault(source, {})
                for number in numbers:
                    steps[number] = min(exclusion.step, steps.get(number, exclusion.step))

    def _open(self, source: str, split: str, counts: Mapping) -> RowStore:
        where = location.join(self.config.path, source, split)
        store = RowStore(where, counts.get("parts"))  # none in format 1
        expected = counts["rows"], self.config.sequence_length + 1
        if (store.rows, store.columns) != expected:
            raise ConfigError(
                [
                    f"row store {source}/{split} has shape {(store.rows, store.columns)}, the "
                    f"manifest says {expected}: the data set is damaged; build it again"
                ]
            )
        return store

    @property
    def order(self) -> "Order":
        """The order of the data set's rows, with the changes of its rates."""
        if self._lazy_order is None:
            from lemur_jax.data.order import Order

            rows = {name: self._stores[name, "train"].rows for name in self.sources}
            size = self.config.batch_size
            changes = [(step * size, *rest) for step, *rest in self.config.weight_changes]
            self._lazy_order = Order(self.config.seed, rows, self.rates, changes)
        return self._lazy_order

    def store(self, source: str, split: str = "train") -> RowStore:
        """The row store of a source's split."""
        return self._stores[source, split]

    def check_tokenizer(self, fingerprint: str, where: str) -> None:
        """Raises ConfigError when a model's tokenizer (found at `where`) is not the data's."""
        if fingerprint != self.tokenizer_fingerprint:
            raise ConfigError(
                [
                    f"tokenizer fingerprint={fingerprint[:12]} of {where} does not match "
                    f"{self.tokenizer_fingerprint[:12]} of DataConfig.path={self.config.path!r}: "
                    "build the data set with that tokenizer (BuildConfig.tokenizer)"
                ]
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ConfigError when a model with `vocab_size` tokens lacks some of the data's."""
        if self.vocab_size > vocab_size:
            raise ConfigError(
                [
                    f"ModelConfig.vocab_size={vocab_size} is smaller than the {self.vocab_size} "
                    f"tokens of the data set {self.config.path}: set it to at least "
                    f"{self.vocab_size}"
                ]
            )

    def batch(self, step: int) -> Batch:
        """The global batch of `step`: B rows."""
        return self.rows(step, 0, self.config.batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the global batch of `step`: what one host loads."""
        if step < 0 or not 0 <= start <= stop <= self.config.batch_size:
            raise ValueError(
                f"step={step}, rows [{start}, {stop}): must be step >= 0 and rows within "
                f"[0, batch_size={self.config.batch_size}]"
            )
        return make_batch(*self.stored_rows(step, self.places(step, start, stop)))

    def stored_rows(self, step: int, places: Sequence["Place"]) -> Rows:
        """Rows as stored, [len(places), T+1], without the documents excluded at `step`."""
        shape = len(places), self.config.sequence_length + 1
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        loss = np.ones(shape, np.uint8)
        for source in self.sources:
            here = [i for i, place in enumerate(places) if place.source == source]
            if not here:
                continue
            numbers = [places[i].row for i in here]
            found = self._stores[source, "train"].read(numbers)
            tokens[here], segments[here] = found.tokens, found.segments
            if found.loss is not None:
                loss[here] = found.loss
            if source in self._excluded_from:
                for i, number in zip(here, numbers):
                    for piece in self.excluded_pieces(step, source, number):
                        # Padding: the rest of the row keeps its tokens, segments and positions.
                        where = slice(piece.start_in_row, piece.start_in_row + piece.length)
                        tokens[i, where], segments[i, where], loss[i, where] = 0, 0, 0
        return Rows(tokens, segments, loss)

    def excluded_pieces(self, step: int, source: str, row: int) -> list[Piece]:
        """What of a row is padding at `step` because its document is excluded."""
        steps = self._excluded_from.get(source, {})
        store = self._stores[source, "train"]
        if not any(steps.get(number, step + 1) <= step for number in store.documents_of(row)):
            return []
        return [p for p in store.pieces(row) if steps.get(p.document, step + 1) <= step]

    def places(self, step: int, start: int = 0, stop: int | None = None) -> list["Place"]:
        """(source, row, epoch) of rows [start, stop) of the global batch of `step`; 0.1 ms each."""
        first = step * self.config.batch_size
        stop = self.config.batch_size if stop is None else stop
        return [self.order[first + row] for row in range(start, stop)]

    def provenance(self, step: int) -> list[tuple[str, int, list[str]]]:
        """(source, row, paths of the documents in it) of every row of the global batch."""
        found = []
        for place in self.places(step):
            store = self._stores[place.source, "train"]
            paths = [store.path(number) for number in store.documents_of(place.row)]
            found.append((place.source, place.row, paths))
        return found

    def position(self, step: int) -> dict[str, int | str]:
        """What a checkpoint saves so that `batch(step)` is read again after a restart."""
        manifest = json.dumps(self.manifest, sort_keys=True)
        used = self.order.used(step * self.config.batch_size)
        return {
            "step": step,
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "sequence_length": self.config.sequence_length,
            "rates": ",".join(f"{name}={rate:g}" for name, rate in sorted(self.rates.items())),
            "manifest": hashlib.sha256(manifest.encode()).hexdigest(),
            "order": self.order.digest(),
            "weight_changes": events.weights_text(self.config.weight_changes),
            "exclusions": events.exclusions_text(self.exclusions),
            "rows_used": ",".join(f"{name}={count}" for name, count in used.items()),
        }

    def check_position(self, saved: Mapping[str, int | str]) -> int:
        """The step to go on with. Raises ConfigError if `saved` comes from other data or order."""
        if "step" not in saved:
            raise ConfigError([f"data position {dict(saved)} has no step: it is not a position"])
        step = int(saved["step"])
        problems = problems_of(self.position(step), saved)
        if problems:
            end = ", or start a new run with TrainConfig.init_from"
            raise ConfigError([problem + end for problem in problems])
        return step

    def evaluation_batches(self, source: str) -> int:
        """Number of batches of a source's held-out split, the last one perhaps padded."""
        return -(-self._held_out(source).rows // self.config.batch_size)

    def evaluation(self, source: str, index: int) -> Batch:
        """Batch `index` of a source's held-out split, in stored order; missing rows are padding."""
        store, size = self._held_out(source), self.config.batch_size
        batches = self.evaluation_batches(source)
        if not 0 <= index < batches:
            raise IndexError(f"evaluation batch {index} of {source!r}: there are {batches}")
        numbers = np.arange(index * size, min((index + 1) * size, store.rows))
        padding = ((0, size - len(numbers)), (0, 0))
        found = [None if x is None else np.pad(x, padding) for x in store.read(numbers)]
        return make_batch(*found)

    def unigram_entropy(self, source: str) -> float:
        """Nats per held-out target under its own unigram distribution: the line to get below."""
        self._held_out(source)
        return self.manifest["sources"][source]["splits"]["validation"]["unigram_entropy"]

    def _held_out(self, source: str) -> RowStore:
        if source not in self.sources:
            raise ConfigError(
                [f"source={source!r} is not in {self.config.path!r}; legal: {self.sources}"]
            )
        return self._stores[source, "validation"]
