"""Comparing data positions: what a checkpoint holds with what a pipeline would go on with."""

from collections.abc import Mapping

from lemur_jax.data import events

# What a position must share with the checkpoint it goes on from, and how to mend it.
_FIXES = {
    "seed": "set DataConfig.seed back",
    "batch_size": "set DataConfig.batch_size back: a step is batch_size rows",
    "sequence_length": "set DataConfig.sequence_length back",
    "rates": "build the mixture with the old rates; DataConfig.weight_changes is for new ones",
    "manifest": "give the data set that the run began with (DataConfig.path)",
    "order": "the order differs: restore the data set, or the version of grain",
    "weight_changes": "what lies before the checkpoint's step cannot change: set "
    "DataConfig.weight_changes back up to there",
    "exclusions": "what lies before the checkpoint's step cannot change: restore the run's "
    "data_ledger.jsonl",
    "rows_used": "the rows read so far differ: set DataConfig.weight_changes back",
}
# What may change at a later step. The first checkpoints had none of these fields.
EVENT_FIELDS = ("weight_changes", "exclusions", "rows_used")


def problems_of(now: Mapping, saved: Mapping, where: str = "the checkpoint") -> list[str]:
    """What differs between two positions of the same step, as far as it lies behind it.

    Args:
      now: of the pipeline.
      saved: what `where` holds.
      where: for the messages.
    """
    step, problems = int(saved["step"]), []
    for field, fix in _FIXES.items():
        ours, theirs = now[field], saved.get(field)
        if field in ("weight_changes", "exclusions"):
            ours, theirs = events.before(ours, step), events.before(theirs or "", step)
        if field == "rows_used" and (theirs is None or problems):
            continue  # what differs above is the reason
        if ours != theirs:
            problems.append(f"data position: {field}={ours!r} but {where} has {theirs!r}: {fix}")
    return problems
