"""Whether ids are the tokenizer's: documents decoded and encoded again by another path."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lemur_jax.check.certificate import Result, judge
from lemur_jax.check.evidence import CHATML, Evidence
from lemur_jax.data.tokenizer import JSON, MODEL


class Reference(NamedTuple):
    """A tokenizer as its own library has it, without our code.

    Attributes:
      decode, encode: ids to text and back; text is never parsed for special tokens.
      known: id of a token's name, or None.
      size: ids are below this, added tokens aside.
    """

    decode: Callable[[list[int]], str]
    encode: Callable[[str], list[int]]
    known: Callable[[str], int | None]
    size: int


MOST_TEXTS = 2000
EDGE = 12  # ids at a cut that may be others when the text is cut there


def check_ids(evidence: Evidence, vocab_size: int) -> Result:
    """Every text between special tokens of the run's first rows has the same ids when it is decoded
    and encoded by sentencepiece (or `tokenizers`) itself, and so has the inside of what the end of
    a row cuts; specials are one id.

    Args:
      vocab_size: of the model.
    """
    tokenizer, fixes = evidence.tokenizer, []
    library = reference(tokenizer.directory)
    specials = _specials(evidence)
    fixes += _check_specials(evidence, specials, library.known, vocab_size)
    counts = {"whole texts": 0, "parts": 0, "different": 0, "not judged": 0}
    first = ""
    for ids, is_whole in itertools.islice(texts(evidence, set(specials.values())), MOST_TEXTS):
        if not _judgeable(evidence, ids, is_whole):
            counts["not judged"] += 1
            continue
        counts["whole texts" if is_whole else "parts"] += 1
        again = library.encode(library.decode(ids)) if max(ids) < library.size else []
        if not (ids == again if is_whole else _contains(again, ids[EDGE:-EDGE])):
            counts["different"] += 1
            first = first or f"ids {ids[:8]} became {again[:8]}"
    if counts["different"]:
        fixes.append(
            f"{counts['different']} texts have other ids than {tokenizer.directory} gives them "
            f"({first}): the rows were made with another tokenizer; build the data set again"
        )
    judged = counts["whole texts"] + counts["parts"]
    summary = (
        f"{counts['whole texts']} whole texts and {counts['parts']} parts of longer ones, encoded "
        f"again: {judged - counts['different']} with the same ids"
    )
    return judge("ids", summary, counts, fixes, noted=not judged)


def _judgeable(evidence: Evidence, ids: list[int], is_whole: bool) -> bool:
    """Not: <unk>, whose text is not in the row; parts too short to lose both ends; text that spells
    a special token."""
    tokenizer = evidence.tokenizer
    if tokenizer.unk_id is not None and tokenizer.unk_id in ids:
        return False
    if not is_whole and len(ids) <= 3 * EDGE:
        return False
    text = tokenizer.decode(index for index in ids if index < tokenizer.vocab_size)
    return not any(token in text for token in tokenizer.added_tokens)


def _contains(ids: list[int], part: list[int]) -> bool:
    return f" {' '.join(map(str, part))} " in f" {' '.join(map(str, ids))} "


def reference(directory: Path) -> Reference:
    """The tokenizer of a directory through sentencepiece, or `tokenizers`, itself."""
    if (directory / MODEL).is_file():
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / MODEL))

        def known(token: str) -> int | None:
            index = processor.piece_to_id(token)
            return index if processor.id_to_piece(index) == token else None

        return Reference(processor.decode, processor.encode, known, processor.vocab_size())
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(directory / JSON))
    return Reference(
        lambda ids: library.decode(ids, skip_special_tokens=False),
        lambda text: library.encode(text, add_special_tokens=False).ids,
        library.token_to_id,
        library.get_vocab_size(with_added_tokens=True),
    )


def _specials(evidence: Evidence) -> dict[str, int]:
    """Name -> id of every token that is spliced in as an id."""
    tokenizer = evidence.tokenizer
    found = dict(tokenizer.added_tokens)
    for role in ("bos", "eos", "pad"):
        index = getattr(tokenizer, f"{role}_id")
        if index is not None:
            found[tokenizer.piece(index)] = index
    return found


def _check_specials(
    evidence: Evidence, specials: dict[str, int], known: Callable, vocab_size: int
) -> list[str]:
    where, problems = evidence.tokenizer.directory, []
    for token, index in specials.items():
        other = known(token)
        if other is not None and other != index:
            problems.append(f"{token} is id {index} here and {other} in {where}: mend its files")
        if index >= vocab_size:
            problems.append(
                f"{token} is id {index}, ModelConfig.vocab_size={vocab_size} has no such row: "
                "`lemur convert --add_tokens` adds rows to the model"
            )
    if evidence.is_chatml:
        problems += [
            f"{token} is not one id of {where}: `lemur convert --add_tokens=chatml` adds it"
            for token in CHATML
            if evidence.tokenizer.id_of(token) is None
        ]
    return problems


def texts(evidence: Evidence, special: set[int]) -> Iterator[tuple[list[int], bool]]:
    """The ids of every stretch without special tokens, and whether it is whole: between two
    special tokens, not cut by the end of the row."""
    batch = evidence.batch
    for row, segments in zip(batch.inputs, batch.segment_ids):
        real = int((segments != 0).sum())
        if not real:
            continue  # ChatBuildConfig.rows_multiple adds empty rows
        marks = np.isin(row[:real], sorted(special))
        new = np.flatnonzero(segments[1:real] != segments[: real - 1]) + 1
        cuts = sorted({-1, real, *np.flatnonzero(marks).tolist(), *(int(at) - 0.5 for at in new)})
        for low, high in itertools.pairwise(cuts):
            ids = [int(index) for index in row[int(np.floor(low)) + 1 : int(np.ceil(high))]]
            bounded = all(0 <= at < real and at == int(at) for at in (low, high))
            if ids:
                yield ids, bounded
