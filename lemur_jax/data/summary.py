"""What a finished build says: the manifest and its report."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from lemur_jax.config import ConfigError
from lemur_jax.data import location, manifest
from lemur_jax.data.reading.records import ReadReport
from lemur_jax.data.sources import SPLITS, SourceConfig
from lemur_jax.data.store import RowStore
from lemur_jax.data.tokenizer import Tokenizer
from lemur_jax.data.worker import COUNTS

if TYPE_CHECKING:
    from lemur_jax.data.build import BuildConfig

FILL = 0.98  # below it rows waste too much; said aloud
ROWS_PER_READ = 1024


def finish(
    config: "BuildConfig", about: Mapping, entries: Mapping[str, list[dict]], tokenizer: Tokenizer
) -> dict:
    """Writes the tokenizer and, last of all, the manifest."""
    sources = {}
    for source in config.sources:
        splits = {}
        first = _bad_records(source, entries[source.name])
        counts = {name: sum(e["counts"][name] for e in entries[source.name]) for name in COUNTS}
        for split in SPLITS:
            parts = [e["splits"][split] for e in entries[source.name] if split in e["splits"]]
            if not parts:
                raise _empty(source, split, counts, first)
            splits[split] = manifest.split_of(parts)
        store = RowStore(
            location.join(config.path, source.name, "validation"), splits["validation"]["parts"]
        )
        splits["validation"]["unigram_entropy"] = _entropy(_target_counts(store, tokenizer))
        sources[source.name] = {
            "rate": source.rate,
            "splits": splits,
            "counts": counts,
            "bad_records": first,
        }
    for name, data in tokenizer.files().items():
        location.write(config.path, f"tokenizer/{name}", data)
    result = json.loads(json.dumps({**about, "sources": sources}))
    location.write(config.path, manifest.MANIFEST, (json.dumps(result, indent=1) + "\n").encode())
    return result


def _bad_records(source: SourceConfig, entries: list[dict]) -> list[str]:
    """Messages of the first bad records; ConfigError when all parts together have too many."""
    total = ReadReport()
    for entry in entries:
        total.add(ReadReport(bad=entry["counts"]["bad"], first=entry["bad"]))
    total.check(source.max_bad_records)
    return total.first


def _empty(
    source: SourceConfig, split: str, counts: Mapping[str, int], first: list[str]
) -> ConfigError:
    """The error of a source without documents, and what became of its records."""
    what = (
        f"task={source.task!r} gives" if source.task else f"train_files={source.train_files!r} give"
    )
    left = _left_out(counts)
    left = f" (of this source: {left})" if left else ""
    mend = "mend what is named below, " if first else ""
    return ConfigError(
        [
            f"SourceConfig({source.name!r}).{what} no document for split {split!r}: the corpus is "
            f"empty or the split is{left}; {mend}add documents, or change validation_fraction, "
            "validation_files or split_key",
            *first,
        ]
    )


def _left_out(counts: Mapping[str, int]) -> str:
    """What was left out or changed, in words; "" when nothing was."""
    return ", ".join(f"{what} {n:,}" for what, n in counts.items() if n)


def _target_counts(store: RowStore, tokenizer: Tokenizer) -> np.ndarray:
    """How often each id is a target."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for first in range(0, store.rows, ROWS_PER_READ):
        tokens, segments, _ = store.read(range(first, min(first + ROWS_PER_READ, store.rows)))
        targets = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
        counts += np.bincount(tokens[:, 1:][targets], minlength=len(counts))
    return counts


def _entropy(counts: np.ndarray) -> float:
    """Entropy, in nats, of the distribution proportional to `counts`."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def report(result: Mapping, console: Console) -> None:
    for name, source in result["sources"].items():
        for split, counts in source["splits"].items():
            console.print(
                f"built {name}/{split}: {counts['documents']:,} documents, "
                f"{counts['tokens']:,} tokens, {counts['rows']:,} rows, "
                f"packing fill {counts['fill']:.2%}",
                soft_wrap=True,
            )
        if left := _left_out(source["counts"]):
            console.print(f"      {name}: {left}", soft_wrap=True)
        for message in source["bad_records"]:
            console.print(f"      {name}: {message}", soft_wrap=True, markup=False)
        if source["splits"]["train"]["fill"] < FILL:
            console.print(
                f"      {name}/train: packing fill is below {FILL:.0%}: only the last row of a "
                "part can be short, so raise BuildConfig.part_bytes or shorten sequence_length",
                soft_wrap=True,
            )
