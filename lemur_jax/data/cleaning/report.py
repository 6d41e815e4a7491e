"""The report of a cleaning run: what every step removed and changed, as data and as a table."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lemur_jax.data.cleaning import decontaminate
from lemur_jax.data.cleaning.duplicates import CorpusStep
from lemur_jax.data.cleaning.stages import StepCounts
from lemur_jax.data.cleaning.steps import DocumentStep
from lemur_jax.data.sources import Shard, SourceConfig


def compose(
    parts: Sequence[tuple[tuple[DocumentStep, ...], CorpusStep | None]],
    inputs: Sequence[tuple[SourceConfig, Shard]],
    counts: Sequence[Sequence[dict]],
    work: Path,
) -> dict[str, Any]:
    """The report of a run.

    Args:
      parts: (document steps, corpus step) of each stage.
      inputs: (source, shard) in the run's order.
      counts: of each stage, for each shard: what `stages.run` returned.
      work: directory of the run's intermediate files.

    Returns {"sources": {name: counts}, "steps": [settings, counts, reasons, sample],
    "contaminated": [{"document", "item", "ngram"}]}.
    """
    steps, contaminated = [], []
    for stage, (document_steps, corpus_step) in enumerate(parts):
        for place, step in enumerate(document_steps):
            whole = StepCounts()
            for result in counts[stage]:
                whole.add(result["steps"][place])
            if isinstance(step, decontaminate.Decontaminate):
                whole.reasons["evaluation texts too short to compare"] = decontaminate.too_short(
                    step
                )
                contaminated += whole.evidence
            steps.append(_told(step, whole))
        if corpus_step is not None:
            whole = StepCounts()
            for result in counts[stage + 1]:
                whole.add(result["before"])
            whole.sample = json.loads((work / f"stage{stage}-pairs.json").read_text())
            steps.append(_told(corpus_step, whole))
    fields = ("records_read", "records_filtered", "records_bad", "documents_out", "bytes_out")
    sources = {source.name: dict.fromkeys(fields, 0) for source, _ in inputs}
    for (source, _), first, last in zip(inputs, counts[0], counts[-1]):
        own, read = sources[source.name], first["read"]
        own["records_read"] += read["documents"]
        own["records_filtered"] += read["filtered"]
        own["records_bad"] += read["bad"]
        own["documents_out"] += last["documents"]
        own["bytes_out"] += last["bytes"]
    return {"sources": sources, "steps": steps, "contaminated": contaminated}


def _told(step: Any, counts: StepCounts) -> dict[str, Any]:
    told = counts.as_json()
    del told["evidence"]
    return {"step": type(step).__name__, "settings": dataclasses.asdict(step), **told}


def show(told: dict[str, Any], console: Console) -> None:
    """Prints the report as a table: a row for each step, a line for each source."""
    table = Table(title="cleaning", title_justify="left")
    for name in ("step", "documents", "removed", "MB removed", "changed", "why (first three)"):
        table.add_column(name, justify="left" if name in ("step", "why (first three)") else "right")
    for step in told["steps"]:
        common = sorted(step["reasons"].items(), key=lambda item: -item[1])[:3]
        table.add_row(
            step["step"],
            f"{step['documents_in']:,}",
            f"{step['documents_removed']:,}",
            f"{step['bytes_removed'] / 1e6:,.3f}",
            f"{step['documents_changed']:,}",
            ", ".join(f"{reason} {n:,}" for reason, n in common),
        )
    console.print(table)
    for name, one in told["sources"].items():
        console.print(
            f"{name}: {one['records_read']:,} documents read, {one['documents_out']:,} kept, "
            f"{one['bytes_out'] / 1e6:,.3f} MB",
            soft_wrap=True,
        )
