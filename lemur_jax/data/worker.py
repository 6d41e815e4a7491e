"""What one worker process of `lemur data build` does: a group of input shards to a part.

The part's directories are written first and its journal entry last; whoever finds no entry, or
one with another key, writes the part again from the start. The rows depend on the group alone.
"""

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator
from multiprocessing import connection, parent_process
from typing import TYPE_CHECKING, Any

import numpy as np

from lemur_jax.config import ConfigError
from lemur_jax.data import location
from lemur_jax.data.files import Document
from lemur_jax.data.fim import FillInTheMiddle, draw
from lemur_jax.data.manifest import JOURNAL, Group
from lemur_jax.data.pack import StreamPacker
from lemur_jax.data.reading.records import ReadReport
from lemur_jax.data.sources import SPLITS, SourceConfig, read_shard
from lemur_jax.data.store import RowsWriter, part_name
from lemur_jax.data.tokenizer import SPACE, Tokenizer

if TYPE_CHECKING:
    from lemur_jax.data.build import BuildConfig

CHARACTERS_PER_BATCH = 2_000_000
COUNTS = (
    "filtered",
    "bad",
    "empty",
    "no_tokens",
    "only_unknown",
    "truncated",
    "truncated_tokens",
    "fim",
)


@dataclasses.dataclass(frozen=True)
class Work:
    """One group of shards to be built: everything a worker needs, and small enough to send."""

    config: "BuildConfig"
    source: SourceConfig
    group: Group
    fingerprint: str  # of the tokenizer that the build began with
    threads: int = 1

    @property
    def journal(self) -> tuple[str, str]:
        """Directory and name of the journal entry."""
        directory = location.join(self.config.path, JOURNAL, self.source.name)
        return directory, f"{part_name(self.group.number)}.json"


_done: Any = None  # the shared counter of input bytes, in a worker process


def start(done: Any, threads: int) -> None:
    """Prepares a worker process: it ends when its parent does, however that died."""
    global _done
    _done = done
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # of the `tokenizers` library

    def watch() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(work: Work) -> dict[str, Any]:
    """`build_group` in a worker process, reporting to the shared counter."""

    def advance(read: int) -> None:
        with _done.get_lock():
            _done.value += read

    return build_group(work, advance)


def finished(work: Work) -> dict[str, Any] | None:
    """The journal entry of a group that was built before from the same inputs, or None."""
    data = location.read(*work.journal)
    entry = json.loads(data) if data else {}
    return entry if entry.get("key") == work.group.key else None


def build_group(work: Work, advance: Callable[[int], None]) -> dict[str, Any]:
    """Writes the parts of a group and its journal entry, which is returned.

    Args:
      work: what to build.
      advance: told how many bytes of input have been read.

    Returns: {"key", "splits": {split: part.json}, "counts": {what: how many}, "bad": messages of
      the first records that are no documents}.

    Raises ConfigError for bad input, StorageError for what cannot be written.
    """
    config, name = work.config, part_name(work.group.number)
    encoder = _Encoder(work)
    packers: dict[str, StreamPacker] = {}
    directory, entry_name = work.journal
    for split in SPLITS:
        location.remove(location.join(config.path, work.source.name, split, name))
    report = ReadReport()
    for batch in _batches(_documents(work, report, advance), encoder.counts):
        for document, ids in zip(batch, encoder.encode(batch)):
            if not len(ids):
                continue
            if document.split not in packers:
                where = location.join(config.path, work.source.name, document.split, name)
                writer = RowsWriter(where, config.sequence_length, encoder.tokenizer.vocab_size)
                packers[document.split] = StreamPacker(writer)
            packers[document.split].append(document.path, ids)
    # So that a part can be recognised when it has got among others.
    extra = {"tokenizer": encoder.tokenizer.fingerprint, "key": work.group.key}
    splits = {split: {"name": name} | packer.close(extra) for split, packer in packers.items()}
    counts = encoder.counts | {"filtered": report.filtered, "bad": report.bad}
    entry = {"key": work.group.key, "splits": splits, "counts": counts, "bad": report.first}
    location.write(directory, entry_name, json.dumps(entry, indent=1).encode())
    return entry


def _documents(
    work: Work, report: ReadReport, advance: Callable[[int], None]
) -> Iterator[Document]:
    for shard in work.group.shards:
        told = 0
        for document in read_shard(work.source, shard, work.config.seed, report):
            # Text is no larger than its file, unless that is compressed: never tell too much.
            size = min(len(document.text), shard.bytes - told)
            told += size
            advance(size)
            yield document
        advance(shard.bytes - told)


def _batches(documents: Iterator[Document], counts: dict[str, int]) -> Iterator[list[Document]]:
    """Lists of documents of about CHARACTERS_PER_BATCH: what bounds the memory of a build."""
    batch, size = [], 0
    for document in documents:
        if not document.text:
            counts["empty"] += 1  # it would teach that EOS follows BOS
            continue
        batch.append(document)
        size += len(document.text)
        if size >= CHARACTERS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _tokenizer(directory: str, fingerprint: str) -> Tokenizer:
    """One tokenizer for all groups of a process: it remembers words."""
    tokenizer = Tokenizer.load(directory)
    if tokenizer.fingerprint != fingerprint:
        raise ConfigError(
            [
                f"BuildConfig.tokenizer={directory!r} changed while the data set was built: "
                "restore its files, or build with the new ones in a new directory"
            ]
        )
    return tokenizer


class _Encoder:
    """Documents to the ids that are packed, as the BuildConfig wants them, and counts."""

    def __init__(self, work: Work):
        config = work.config
        self.tokenizer = _tokenizer(config.tokenizer, work.fingerprint)
        self.counts = dict.fromkeys(COUNTS, 0)
        self._config, self._threads = config, work.threads
        self._bos, self._eos = config.bos_eos in ("both", "bos"), config.bos_eos in ("both", "eos")
        t = self.tokenizer
        void = (t.unk_id, t.bos_id, t.eos_id, t.id_of(SPACE))  # a text of these says nothing
        self._void = [index for index in void if index is not None]
        self._fim = FillInTheMiddle(self.tokenizer, config.fim_tokens) if config.fim_rate else None

    def encode(self, batch: list[Document]) -> list[np.ndarray]:
        texts = [document.text for document in batch]
        found = self.tokenizer.encode_arrays(texts, self._bos, self._eos, self._threads)
        return [self._finish(document, ids) for document, ids in zip(batch, found)]

    def _finish(self, document: Document, ids: np.ndarray) -> np.ndarray:
        config, counts = self._config, self.counts
        if not len(ids):
            counts["no_tokens"] += 1
            return ids
        if (ids == self.tokenizer.unk_id).any() and np.isin(ids, self._void).all():
            counts["only_unknown"] += 1
            return ids[:0]
        # Held-out documents stay as they are: their loss is compared between data sets.
        if self._fim is not None and document.split == "train":
            cut = draw(document.text, config.seed, config.fim_rate, config.fim_spm_rate)
            if cut is not None:
                counts["fim"] += 1
                inside = self._fim.encode(document.text, cut)
                ids = np.concatenate([ids[: self._bos], inside, ids[-1:]])
        most = config.sequence_length + 1
        if config.split_documents == "truncate" and len(ids) > most:
            counts["truncated"] += 1
            counts["truncated_tokens"] += len(ids) - most
            ids = ids[:most]
        return ids
