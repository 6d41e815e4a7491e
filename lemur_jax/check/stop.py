"""Whether the model can learn to stop: the stop token is a target, and its row can change."""

from typing import Any

import numpy as np

from lemur_jax.check.certificate import Result, judge
from lemur_jax.check.evidence import CHATML, Evidence
from lemur_jax.config import TrainConfig

STOP = CHATML[1]


def stop_token(evidence: Evidence) -> tuple[str, int | None]:
    """Name and id of what ends an answer (<|im_end|>, or EOS of other formats) or a document."""
    tokenizer = evidence.tokenizer
    if evidence.is_chatml:
        return STOP, tokenizer.id_of(STOP)
    index = tokenizer.eos_id
    return ("EOS", None) if index is None else (tokenizer.piece(index), index)


def check_stop(evidence: Evidence, config: TrainConfig) -> Result:
    """The stop token among the learnt targets of the run's first rows, and its rows of weights."""
    name, index = stop_token(evidence)
    if index is None:
        return judge(
            "stop", f"the tokenizer has no {name}", {}, [f"add {name} to the tokenizer's files"]
        )
    targets, weights = evidence.batch.targets, evidence.batch.weights
    real = evidence.batch.segment_ids != 0
    there, learnt = (targets == index) & real, (targets == index) & (weights > 0)
    figures: dict[str, Any] = {
        "token": name,
        "id": index,
        "targets": int(there.sum()),
        "learnt": int(learnt.sum()),
        "share of learnt tokens": round(float(learnt.sum() / max(1.0, weights.sum())), 6),
    }
    fixes = []
    if not there.any():
        fixes.append(
            f"{name} is no target in the run's first {len(targets)} rows: "
            + (
                "build the data set so that answers end with it"
                if evidence.chat_format
                else "build the data set with EOS behind each document"
            )
        )
    elif not learnt.any():
        fixes.append(
            f"{name} is a target {int(there.sum())} times and never has a weight: a model that "
            "never learns it never stops; mend the loss mask"
        )
    summary = (
        f"{name} (id {index}) is learnt {int(learnt.sum())} times of {int(there.sum())} in the "
        f"first {len(targets)} rows"
    )
    if config.init_from is not None:
        rows, problems = _rows(config, name, index)
        figures |= rows
        fixes += problems
        summary += f"; its rows in {config.init_from}: {rows['rows']}"
    return judge("stop", summary, figures, fixes)


def _rows(config: TrainConfig, name: str, index: int) -> tuple[dict[str, Any], list[str]]:
    """What `init_from` holds for the token. A head row that is frozen must differ from others:
    tokens with equal rows always have equal logits. (New rows are all the mean of the old.)"""
    from lemur_jax.convert.model import open_source

    source = open_source(config.init_from)
    if index >= source.config.vocab_size:
        fix = "`lemur convert --add_tokens` first"
        return {"rows": "absent"}, [f"{config.init_from} has no row for {name} ({index}): {fix}"]
    tied = source.config.tie_embeddings
    head = source.read("table") if tied else source.read("head").T
    head = head[: source.config.vocab_size].astype(np.float32)
    same = np.flatnonzero((head == head[index]).all(axis=1))
    same = [int(other) for other in same if other != index]
    zero = not head[index].any()
    frozen = config.lora is not None and not config.lora.embeddings
    said = "all zero" if zero else f"equal to those of {same[:6]}" if same else "its own"
    figures = {"rows": f"{said}, {'frozen' if frozen else 'trained'}"}
    if frozen and (zero or same):
        return figures, [
            f"the head's row of {name} is {said} and LoRA freezes it, so it can never be told from "
            "them: LoraConfig.embeddings=True trains it"
        ]
    return figures, []
