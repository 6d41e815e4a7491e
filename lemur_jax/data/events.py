"""What may change the data of a run at a step: declared, recorded, and never the past.

There are two kinds: rates of the mixture (`DataConfig.weight_changes`) and documents taken out
(`lemur data exclude`). An event at step S is in force once S steps are done: checkpoint S and
everything before it stay as they were. A checkpoint holds each kind as one line of text,
"STEP:WHAT;STEP:WHAT", so that what lies behind it can be compared.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

from lemur_jax.config import ConfigError
from lemur_jax.data.nearest import nearest


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """Documents of the training split that are not learnt once `step` steps are done.

    Attributes:
      step: the first step without them, as a checkpoint counts.
      documents: {source: numbers of its documents, ascending}.
    """

    step: int
    documents: Mapping[str, tuple[int, ...]]


def check_weight_changes(
    changes: Sequence[tuple[int, str, float]], rates: Mapping[str, float]
) -> None:
    """Raises ConfigError listing sources that the data set lacks and steps that leave no source."""
    problems, now = [], dict(rates)
    for index, (step, source, rate) in enumerate(changes):
        name = f"DataConfig.weight_changes[{index}]={(step, source, rate)!r}"
        if source not in rates:
            problems.append(f"{name}: no source {source!r}{nearest(source, rates)}")
            continue
        now[source] = rate
        last_of_step = index + 1 == len(changes) or changes[index + 1][0] != step
        if last_of_step and not any(now.values()):
            problems.append(f"{name} leaves every source at rate 0: give one of them a rate")
    if problems:
        raise ConfigError(problems)


def weights_text(changes: Sequence[tuple[int, str, float]]) -> str:
    """'2000:code=8,text=2;9000:text=0': what a checkpoint holds."""
    steps = sorted({change[0] for change in changes})
    parts = (
        (step, sorted((name, rate) for at, name, rate in changes if at == step)) for step in steps
    )
    return ";".join(
        f"{step}:{','.join(f'{name}={float(rate)!r}' for name, rate in rates)}"
        for step, rates in parts
    )


def parse_weights(text: str) -> tuple[tuple[int, str, float], ...]:
    """The weight changes of which `text` is the `weights_text`."""
    changes = []
    for part in filter(None, text.split(";")):
        step, rates = part.split(":", 1)
        for rate in rates.split(","):
            source, value = rate.rsplit("=", 1)
            changes.append((int(step), source, float(value)))
    return tuple(changes)


def exclusions_text(exclusions: Sequence[Exclusion]) -> str:
    """'8:3 documents 0a1b...;20:...': what a checkpoint holds; the lists are in the ledger."""
    texts = []
    for step in sorted({exclusion.step for exclusion in exclusions}):
        found: dict[str, set[int]] = {}
        for exclusion in exclusions:
            if exclusion.step == step:
                for source, numbers in exclusion.documents.items():
                    found.setdefault(source, set()).update(numbers)
        listed = {source: sorted(numbers) for source, numbers in sorted(found.items())}
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
        texts.append(f"{step}:{sum(map(len, listed.values()))} documents {digest}")
    return ";".join(texts)


def before(text: str, step: int) -> str:
    """The part of such a line that was in force for a batch before `step`."""
    return ";".join(part for part in text.split(";") if part and int(part.split(":")[0]) < step)
