"""manifest.json and the journal: what a data set was built from, and whether it is whole.

manifest.json             identity of the build, sizes and digests of every part; written last
journal/build.json        identity of a build under way
journal/<source>/part-N.json   one finished group of input shards; see worker.py
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lemur_jax.config import ConfigError
from lemur_jax.data import location
from lemur_jax.data.rows_writer import FORMAT_VERSION, PART, digest_of
from lemur_jax.data.sources import SPLITS, Shard, SourceConfig, shards
from lemur_jax.data.store import RowStore, part_digests
from lemur_jax.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lemur_jax.data.build import BuildConfig

MANIFEST = "manifest.json"
JOURNAL = "journal"
WHOLE_BYTES = 16 * 2**20  # larger files are fingerprinted by WINDOWS of WINDOW_BYTES
WINDOWS, WINDOW_BYTES = 16, 2**18
# Of a SourceConfig: these decide no row.
_NOT_CONTENT = {"name", "rate", "max_epochs", "max_bad_records", "root"}
_NOT_CONTENT |= {"train_files", "validation_files"}  # names of this machine; shards have their own


@dataclasses.dataclass(frozen=True)
class Group:
    """Input shards of one source that become one part of each split.

    Attributes:
      number: of the part.
      shards: in reading order.
      key: SHA-256 of all that decides the part's rows: inputs, settings, tokenizer.
    """

    number: int
    shards: tuple[Shard, ...]
    key: str


def identity(config: "BuildConfig", tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the content of a build, inputs aside, without any path of this machine."""
    return {
        "format_version": FORMAT_VERSION,
        "mixture": config.mixture,
        "sequence_length": config.sequence_length,
        "seed": config.seed,
        "part_bytes": config.part_bytes,
        "split_documents": config.split_documents,
        "bos_eos": config.bos_eos,
        "fim_rate": config.fim_rate,
        "fim_spm_rate": config.fim_spm_rate,
        "fim_tokens": list(config.fim_tokens) if config.fim_rate else [],
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }


def settings_of(source: SourceConfig) -> dict[str, Any]:
    """Settings of a source that decide which documents it gives, as JSON has them."""
    fields = dataclasses.asdict(source)
    kept = {name: value for name, value in fields.items() if name not in _NOT_CONTENT}
    return json.loads(json.dumps(kept, default=str))


def fingerprint(path: str) -> str:
    """SHA-256 of a local file: of all of it, or, above 16 MiB, of its size and 4 MiB spread over
    it (a corpus of terabytes must not be read twice); '' for what is not a local file."""
    if not location.is_local(path) or not os.path.isfile(path):
        return ""
    stat = os.stat(path)
    return _hash(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 16)
def _hash(path: str, size: int, modified: int) -> str:
    del modified  # a part of the cache's key: shards of one file share its hash
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        for window in range(WINDOWS):
            file.seek((size - WINDOW_BYTES) * window // (WINDOWS - 1))
            found.update(file.read(WINDOW_BYTES))
    return found.hexdigest()


def inputs(source: SourceConfig, found: Sequence[Shard]) -> dict[str, Any]:
    """Settings of a source, and name -> [bytes, fingerprint] of each of its shards."""
    named = {shard.name: [shard.bytes, fingerprint(shard.path)] for shard in found}
    return {"settings": settings_of(source), "shards": named}


def groups(
    source: SourceConfig, found: Sequence[Shard], about: Mapping, identity: Mapping
) -> list[Group]:
    """Consecutive shards of at least `part_bytes` of input each, the last one aside."""
    made, held, size = [], [], 0
    for shard in found:
        held.append(shard)
        size += shard.bytes
        if size >= identity["part_bytes"]:
            made.append(held)
            held, size = [], 0
    if held:
        made.append(held)
    common = json.dumps([source.name, identity, about["settings"]], sort_keys=True)
    result = []
    for number, members in enumerate(made):
        of_shards = json.dumps(
            [[s.name, s.split, s.units, about["shards"][s.name]] for s in members]
        )
        key = hashlib.sha256(f"{common}\n{of_shards}".encode()).hexdigest()
        result.append(Group(number, tuple(members), key))
    return result


def plan(
    config: "BuildConfig", tokenizer: Tokenizer
) -> tuple[dict[str, Any], dict[str, list[Group]]]:
    """(identity with "inputs", "rates", "max_epochs"; groups of each source) of a build."""
    about = identity(config, tokenizer)
    made, of_sources = {}, {}
    for source in config.sources:
        found = shards(source)
        of_sources[source.name] = inputs(source, found)
        made[source.name] = groups(source, found, of_sources[source.name], about)
    rates = {source.name: float(source.rate) for source in config.sources}
    most = {source.name: float(source.max_epochs) for source in config.sources}
    about |= {"rates": rates, "max_epochs": most, "inputs": of_sources}
    return json.loads(json.dumps(about)), made


def split_of(parts: Sequence[Mapping]) -> dict[str, Any]:
    """Sums of a split over its parts, as the manifest has them."""
    total = {
        name: sum(part[name] for part in parts)
        for name in ("rows", "tokens", "documents", "filled")
    }
    columns = parts[0]["columns"]
    fill = total.pop("filled") / (total["rows"] * columns)
    digest = digest_of([part["digests"] for part in parts])
    return total | {"fill": round(fill, 6), "digest": digest, "parts": list(parts)}


def open_store(path: str, manifest: Mapping, source: str, split: str) -> RowStore:
    """The row store of a source's split. Raises ConfigError naming damaged or missing parts."""
    about = manifest["sources"][source]["splits"][split]
    return RowStore(location.join(path, source, split), about.get("parts"))


def verify(path: str) -> Iterator[tuple[str, str]]:
    """Reads a whole data set and compares digests: yields (part, what is wrong or '')."""
    data = location.read(path, MANIFEST)
    if data is None:
        raise ConfigError(
            [f"DIR={path!r} has no {MANIFEST}: give a data set that `lemur data build` finished"]
        )
    manifest = json.loads(data)
    if manifest["format_version"] != FORMAT_VERSION:
        raise ConfigError(
            [
                f"DIR={path!r} has format_version={manifest['format_version']}: its digests are "
                "not checked by this version; build it again"
            ]
        )
    copied = Tokenizer.load(location.fetch(location.join(path, "tokenizer"))).fingerprint
    same = copied == manifest["tokenizer_fingerprint"]
    yield "tokenizer", "" if same else f"has fingerprint {copied[:12]}, not the manifest's"
    for source, about in manifest["sources"].items():
        for split in SPLITS:
            for part in about["splits"][split]["parts"] if split in about["splits"] else []:
                name = location.join(source, split, part["name"])
                yield name, _difference(location.join(path, name), part)


def _difference(directory: str, part: Mapping) -> str:
    stored = location.read(directory, PART)
    if stored is None:
        return f"{PART} is missing"
    stored = json.loads(stored)
    if stored["tokenizer"] != part["tokenizer"]:
        return f"was built with tokenizer {stored['tokenizer'][:12]}, not {part['tokenizer'][:12]}"
    try:
        found = part_digests(directory)
    except (ConfigError, location.StorageError) as error:
        return str(error)
    wrong = [name for name, digest in part["digests"].items() if found.get(name) != digest]
    return f"digest of {', '.join(wrong)} differs from the manifest's" if wrong else ""
