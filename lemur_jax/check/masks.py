"""What is learnt of a row: padding never, targets shifted by one, chat only what it should."""

from collections.abc import Callable

import numpy as np

from lemur_jax.check.certificate import Result, judge
from lemur_jax.check.evidence import CHATML, Evidence, begins

SHOWN = 5
UNKNOWN = -1


def check_masks(evidence: Evidence) -> Result:
    """Targets, padding and weights of the run's first rows.

    Plain data: every token is learnt but a document's first. Chat data: some tokens of every
    conversation and not all, and of ChatML exactly the assistant's content and what ends it,
    derived here from the ids alone.
    """
    batch, fixes = evidence.batch, []
    real, weights = batch.segment_ids != 0, batch.weights
    rebuild = "build the data set again with this version, or look at it: lemur data inspect"
    within = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    shifted = batch.targets[:, :-1] == batch.inputs[:, 1:]
    if count := int((~shifted & within & real[:, :-1]).sum()):
        fixes.append(f"{count} targets are not the next input: {rebuild}")
    if count := int((weights[~real] != 0).sum()):
        fixes.append(f"{count} padding tokens have a weight: padding must not be learnt; {rebuild}")
    if odd := int((~np.isin(weights, (0, 1))).sum()):
        fixes.append(f"{odd} weights are neither 0 nor 1: a token is learnt or it is not")
    ends = ~within & (weights[:, :-1] != 0)
    if count := int(ends.sum()):
        fixes.append(f"{count} targets are of another document than their input: {rebuild}")
    fixes += _segments(evidence)
    fixes += _plain(evidence) if evidence.chat_format is None else _chat(evidence)
    figures = {"rows": len(real), "learnt share by source": _shares(evidence)}
    shown = ", ".join(f"{s} {share:.1%}" for s, share in figures["learnt share by source"].items())
    return judge("masks", f"{len(real)} rows; learnt of the real tokens: {shown}", figures, fixes)


def _shares(evidence: Evidence) -> dict[str, float]:
    real, weights = evidence.batch.segment_ids != 0, evidence.batch.weights
    names, shares = np.array(evidence.sources), {}
    for source in sorted(set(evidence.sources)):
        rows = names == source
        shares[source] = round(float(weights[rows].sum() / max(1, real[rows].sum())), 4)
    return shares


def _segments(evidence: Evidence) -> list[str]:
    """Documents that share a segment id, and so see each other, though nobody asked for it."""
    if evidence.mixed_on_purpose:
        return []
    segments = evidence.batch.segment_ids
    inside = begins(evidence)[:, 1:] & (segments[:, 1:] == segments[:, :-1])
    counted = [len(set(row[row != 0])) for row in segments]
    fewer = sum(found < said for found, said in zip(counted, evidence.documents))
    if inside.any() and not evidence.rounds_begin_with_bos:
        where = _rows(inside.any(axis=1))
        return [
            f"{int(inside.sum())} documents begin inside of another's segment ({where}): their "
            "segment ids must differ, or each sees the other; build the data set again"
        ]
    if fewer:
        return [f"{fewer} rows have fewer segments than the store says they have documents"]
    return []


def _rows(flags: np.ndarray) -> str:
    rows = np.flatnonzero(flags)
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"rows {', '.join(map(str, rows[:SHOWN]))}{more} of the run's first"


def _plain(evidence: Evidence) -> list[str]:
    batch, fixes = evidence.batch, []
    within = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (
        batch.segment_ids[:, 1:] > 0
    )
    unlearnt = within & (batch.weights[:, :-1] == 0)
    if unlearnt.any():
        fixes.append(
            f"{int(unlearnt.sum())} tokens of documents have no weight ({_rows(unlearnt.any(1))}), "
            "though the data set has no loss mask: every token but a document's first is learnt"
        )
    return fixes


def _chat(evidence: Evidence) -> list[str]:
    batch, fixes = evidence.batch, []
    real = batch.segment_ids != 0
    learnt, all_ = batch.weights.sum(axis=1), real.sum(axis=1)
    fix = "a conversation teaches some of its tokens and never all; build it again: lemur data chat"
    if (none := (learnt == 0) & (all_ > 0)).any():
        fixes.append(f"0 % of {_rows(none)} is learnt: {fix}")
    # The last token of each conversation has no target of its own.
    most = all_ - np.array([len(set(row[row > 0])) for row in batch.segment_ids])
    if (full := (learnt >= most) & (all_ > 0)).any():
        fixes.append(f"100 % of {_rows(full)} is learnt: {fix}")
    if not evidence.is_chatml:
        return fixes
    wanted = expected_learnt(evidence)
    for value, what in ((0, "are learnt that are no part of an answer"), (1, "of answers are not")):
        wrong = (wanted == value) & (batch.weights != value) & real
        if wrong.any():
            fixes.append(
                f"{int(wrong.sum())} tokens {what} ({_rows(wrong.any(axis=1))}): learnt are an "
                "assistant's content, <|im_end|> and the newline, never a header; build it again"
            )
    return fixes


def expected_learnt(evidence: Evidence) -> np.ndarray:
    """[N,T]: for each target 1: of an answer, 0: not, UNKNOWN: a token holds the end of a header
    and the begin of a content, or is not of a turn that begins in this row."""
    tokenizer, batch = evidence.tokenizer, evidence.batch
    start, end = (tokenizer.id_of(token) for token in CHATML)
    texts: dict[int, str] = {}

    def text(index: int) -> str:
        if index not in texts:
            texts[index] = tokenizer.piece(index).replace("▁", " ").replace("<0x0A>", "\n")
        return texts[index]

    rows = np.concatenate([batch.inputs[:, :1], batch.targets], axis=1)
    between = np.isin(rows, [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None])
    changed = batch.segment_ids[:, 1:] != batch.segment_ids[:, :-1]
    between[:, 1:-1] |= changed & (rows[:, 1:-1] != start)
    return np.stack([_turns(row, start, end, text, cut)[1:] for row, cut in zip(rows, between)])


def _turns(
    row: np.ndarray, start: int, end: int, text: Callable[[int], str], between: np.ndarray
) -> np.ndarray:
    """As `expected_learnt`, for the tokens themselves. A reader of ChatML: outside, header, body,
    and tail, which is the newline behind <|im_end|>; `between` are tokens of no turn."""
    wanted = np.full(len(row), UNKNOWN)
    state, header, role = "unknown", "", ""
    for at, index in enumerate(map(int, row)):
        if between[at]:
            state, wanted[at] = "outside", 0
        elif index == start:
            state, header, wanted[at] = "header", "", 0
        elif state == "header":
            header += text(index)
            name, newline, rest = header.partition("\n")
            wanted[at] = UNKNOWN if rest else 0
            if newline:
                state, role = "body", name.strip()
        elif state == "body":
            wanted[at] = role == "assistant"
            state = "tail" if index == end else "body"
        elif state == "tail":
            wanted[at] = role == "assistant"
            piece = text(index)
            if piece.strip(" ") == "\n":
                state = "outside"
            elif piece.strip(" "):
                state, wanted[at] = "unknown", UNKNOWN
        elif state == "outside":
            wanted[at] = 0
    return wanted
