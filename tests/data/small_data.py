"""Data sets from token ids, made in milliseconds: what the property tests of the order read."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lemur_jax.config import DataConfig
from lemur_jax.data.build import FORMAT_VERSION
from lemur_jax.data.pack import StreamPacker
from lemur_jax.data.store import RowsWriter, part_name
from lemur_jax.data.tokenizer import Tokenizer

T = 16


def make(
    root: Path,
    documents: Mapping[str, Sequence[Sequence[int]]],
    tokenizer: Tokenizer,
    rates: Mapping[str, float],
) -> str:
    """Writes a data set whose sources hold `documents`, packed, and returns its path."""
    sources = {}
    for source, texts in documents.items():
        directory = root / "data" / source / "train" / part_name(0)
        packer = StreamPacker(RowsWriter(directory, T, tokenizer.vocab_size))
        for number, ids in enumerate(texts):
            packer.append(f"{source}/{number}.py", ids)
        part = packer.close() | {"name": part_name(0)}
        split = {name: part[name] for name in ("rows", "tokens", "documents")} | {"parts": [part]}
        sources[source] = {"rate": rates[source], "splits": {"train": split}}
    shutil.copytree(tokenizer.directory, root / "data" / "tokenizer")
    manifest = {
        "format_version": FORMAT_VERSION,
        "sequence_length": T,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "sources": sources,
    }
    (root / "data" / "manifest.json").write_text(json.dumps(manifest))
    return str(root / "data")


def config(path: str, batch_size: int = 4, **fields) -> DataConfig:
    return DataConfig(path=path, batch_size=batch_size, sequence_length=T, **fields)


def texts(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of these lengths, every id different from its neighbours, none of them 0."""
    count = iter(range(10**9))
    return [[1 + next(count) % 997 for _ in range(length)] for length in lengths]
