"""The rows that are judged: those that the run itself will read first.

Dimension key: N rows, T tokens of a row.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np

from lemur_jax.data.pipeline import Batch
from lemur_jax.data.tokenizer import Tokenizer

CHATML = ("<|im_start|>", "<|im_end|>")
COMPAT = "lemur_compat"

SEARCHED_TOKENS = 2**18  # of documents longer than rows


class Rows(Protocol):
    """What of a Pipeline is asked."""

    manifest: dict[str, Any]

    def rows(self, step: int, start: int, stop: int) -> Batch: ...

    def provenance(self, step: int) -> list[tuple[str, int, list[str]]]: ...


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The first rows of a run, and what the data set says of itself.

    Attributes:
      batch: [N,T] arrays.
      sources: of each row.
      documents: how many documents each row has a part of, by the store's own record.
      tokenizer: the data set's.
      chat_format: by name; None: not chat data.
      packing: of chat data: "segmented", COMPAT.
    """

    batch: Batch
    sources: tuple[str, ...]
    documents: tuple[int, ...]
    tokenizer: Tokenizer
    chat_format: str | None
    packing: str | None

    @property
    def is_chatml(self) -> bool:
        """Whether turns are spelled with <|im_start|> and <|im_end|>."""
        return (self.chat_format or "").startswith("chatml")

    @property
    def mixed_on_purpose(self) -> bool:
        """Whether documents of a row see each other as the original packing had it."""
        return self.packing == COMPAT

    @property
    def rounds_begin_with_bos(self) -> bool:
        """Whether a BOS in the middle of a conversation is legal."""
        return self.chat_format == "llama2"


def collect(pipeline: Rows, tokenizer: Tokenizer, batch_size: int, rows: int) -> Evidence:
    """The rows of the first steps, at least `rows` of them, and as many more as it takes until one
    holds two documents, within SEARCHED_TOKENS."""
    parts, sources, documents, step, read = [], [], [], 0, 0
    while step == 0 or len(sources) < rows or (max(documents) < 2 and read < SEARCHED_TOKENS):
        parts.append(pipeline.rows(step, 0, batch_size))
        for source, _, paths in pipeline.provenance(step):
            sources.append(source)
            documents.append(len(paths))
        step, read = step + 1, read + parts[-1].inputs.size
    chat = pipeline.manifest.get("chat") or {}
    return Evidence(
        batch=Batch(*(np.concatenate(field) for field in zip(*parts))),
        sources=tuple(sources),
        documents=tuple(documents),
        tokenizer=tokenizer,
        chat_format=chat.get("format"),
        packing=chat.get("packing"),
    )


def begins(evidence: Evidence) -> np.ndarray:
    """[N,T]: where a document begins by what is written in the row, not by its segment ids: at a
    BOS, or, without one, behind an EOS."""
    inputs, tokenizer = evidence.batch.inputs, evidence.tokenizer
    real = evidence.batch.segment_ids != 0
    if tokenizer.bos_id is not None and (inputs == tokenizer.bos_id).any():
        return (inputs == tokenizer.bos_id) & real
    found = np.zeros(inputs.shape, bool)
    if tokenizer.eos_id is not None:
        found[:, 1:] = (inputs[:, :-1] == tokenizer.eos_id) & real[:, 1:]
    return found
