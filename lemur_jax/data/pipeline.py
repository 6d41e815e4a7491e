"""What training reads: batch(step), for any step, on any host, in any order.

Dimension key: B batch_size, T sequence_length. A pipeline has no state: `batch(step)` is a pure
function of the data set, the seed and the step, so resuming needs a few integers (`position`) and
any number of hosts read parts of one and the same global batch (`rows`).
"""

import collections
import concurrent.futures
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lemur_jax.config import ConfigError, DataConfig
from lemur_jax.data.build import FORMAT_VERSION
from lemur_jax.data.store import RowStore
from lemur_jax.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lemur_jax.data.order import Order, Place


class Batch(NamedTuple):
    """Rows of tokens. All arrays are [B, T].

    Attributes:
      inputs: int32 token ids.
      targets: int32, the token after each input.
      weights: float32, 1 where input and target are real tokens of one document, else 0.
      positions: int32, 0, 1, 2... restarting where a document (or its next part) begins in the row.
      segment_ids: int32 of the inputs: 1, 2, 3... in each row; 0 = padding.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray


def make_batch(tokens: np.ndarray, segments: np.ndarray) -> Batch:
    """A Batch from stored rows: tokens and segments [B, T+1]."""
    segment_ids = segments[:, :-1].astype(np.int32)
    real = segment_ids != 0
    weights = (segments[:, 1:] == segments[:, :-1]) & real
    index = np.arange(segment_ids.shape[1], dtype=np.int32)
    begins = np.ones(segment_ids.shape, bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return Batch(
        inputs=tokens[:, :-1].astype(np.int32),
        targets=tokens[:, 1:].astype(np.int32),
        weights=weights.astype(np.float32),
        positions=np.where(real, index - start, 0).astype(np.int32),
        segment_ids=segment_ids,
    )


def read_manifest(path: str) -> dict:
    """Manifest of the data set at `path`. Raises ConfigError when there is none that we know."""
    name = Path(path) / "manifest.json"
    fix = "give the directory that `lemur data build` wrote"
    try:
        manifest = json.loads(name.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        complete = "sources" in manifest and "tokenizer_fingerprint" in manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            [f"DataConfig.path={path!r} holds no data set ({type(error).__name__}): {fix}"]
        ) from error
    if version not in (1, FORMAT_VERSION) or not complete:
        raise ConfigError(
            [
                f"DataConfig.path={path!r} has format_version={version}, not a data set of version 1 "
                f"or {FORMAT_VERSION}: {fix}, or build it again with this version of lemur_jax"
            ]
        )
    return manifest


class Pipeline:
    """The data set of a DataConfig, as a function from step to batch.

    Attributes:
      config: the DataConfig.
      manifest: what `lemur data build` wrote about the data set.
      sources: names of the sources, in the manifest's order.
      tokenizer_dir: the data set's copy of its tokenizer.
      tokenizer_fingerprint: of that tokenizer.
      vocab_size: ids are below this.
    """

    def __init__(self, config: DataConfig):
        self.config = config
        self.manifest = read_manifest(config.path)
        root = Path(config.path)
        self.sources: tuple[str, ...] = tuple(self.manifest["sources"])
        self.tokenizer_dir = root / "tokenizer"
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
            (source, split): self._open(root, source, split, counts)
            for source, about in self.manifest["sources"].items()
            for split, counts in about["splits"].items()
        }
        self._rates: dict[str, float] = {n: s["rate"] for n, s in self.manifest["sources"].items()}
        self._lazy_order = None

    def _open(self, root: Path, source: str, split: str, counts: Mapping) -> RowStore:
        store = RowStore(root / source / split)
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
    def _order(self) -> "Order":
        if self._lazy_order is None:
            from lemur_jax.data.order import Order  # only training needs the order, and grain

            rows = {name: self._stores[name, "train"].rows for name in self.sources}
            self._lazy_order = Order(self.config.seed, rows, self._rates)
        return self._lazy_order

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
        places = self.places(step, start, stop)
        columns = self.config.sequence_length + 1
        tokens = np.zeros((len(places), columns), np.int32)
        segments = np.zeros((len(places), columns), np.int32)
        for source in self.sources:
            here = [i for i, place in enumerate(places) if place.source == source]
            if here:
                wanted = [places[i].row for i in here]
                found = self._stores[source, "train"].read(wanted)
                tokens[here], segments[here] = found.tokens, found.segments
        return make_batch(tokens, segments)

    def places(self, step: int, start: int = 0, stop: int | None = None) -> list["Place"]:
        """(source, row, epoch) of rows [start, stop) of the global batch of `step`; 0.1 ms each."""
        first = step * self.config.batch_size
        stop = self.config.batch_size if stop is None else stop
        return [self._order[first + row] for row in range(start, stop)]

    def prefetch(
        self, start_step: int, start: int = 0, stop: int | None = None, depth: int = 2
    ) -> Iterator[tuple[int, Batch]]:
        """(step, rows [start, stop) of it) from `start_step` on, for ever, read ahead by `depth`.

        One worker thread, at most `depth` finished batches; closing the generator ends it.
        """
        stop = self.config.batch_size if stop is None else stop
        with concurrent.futures.ThreadPoolExecutor(1, "lemur-prefetch") as pool:
            waiting = collections.deque()
            step = start_step
            try:
                while True:
                    while len(waiting) < depth:
                        ahead = step + len(waiting)
                        waiting.append(pool.submit(self.rows, ahead, start, stop))
                    yield step, waiting.popleft().result()
                    step += 1
            finally:
                for future in waiting:
                    future.cancel()

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
        return {
            "step": step,
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "sequence_length": self.config.sequence_length,
            "rates": ",".join(f"{name}={rate:g}" for name, rate in sorted(self._rates.items())),
            "manifest": hashlib.sha256(manifest.encode()).hexdigest(),
            "order": self._order.digest(),
        }

    def check_position(self, saved: Mapping[str, int | str]) -> int:
        """The step to go on with. Raises ConfigError if `saved` comes from other data or order."""
        if "step" not in saved:
            raise ConfigError([f"data position {dict(saved)} has no step: it is not a position"])
        fixes = {
            "seed": "set DataConfig.seed back",
            "batch_size": "set DataConfig.batch_size back: a step is batch_size rows",
            "sequence_length": "set DataConfig.sequence_length back",
            "rates": "build the mixture with the old rates",
            "manifest": "give the data set that the run began with (DataConfig.path)",
            "order": "the order differs: restore the data set, or the version of grain",
        }
        now = self.position(int(saved["step"]))
        problems = [
            f"data position: {field}={now[field]!r} but the checkpoint has "
            f"{saved.get(field)!r}: {fix}, or start a new run with TrainConfig.init_from"
            for field, fix in fixes.items()
            if saved.get(field) != now[field]
        ]
        if problems:
            raise ConfigError(problems)
        return int(saved["step"])

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
        tokens = np.zeros((size, store.columns), np.int32)
        segments = np.zeros((size, store.columns), np.int32)
        found = store.read(numbers)
        tokens[: len(numbers)], segments[: len(numbers)] = found.tokens, found.segments
        return make_batch(tokens, segments)

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
