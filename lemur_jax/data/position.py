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
# Events came later than the first checkpoints, which had none.
_WITHOUT_EVENTS = {"weight_changes": "", "exclusions": ""}


def problems_of(now: Mapping, saved: Mapping) -> list[str]:
    """What differs between two positions of the same step, as far as it lies behind it."""
    step, problems = int(saved["step"]), []
    for field, fix in _FIXES.items():
        ours, theirs = now[field], saved.get(field, _WITHOUT_EVENTS.get(field))
        if field in _WITHOUT_EVENTS:
            ours, theirs = events.before(ours, step), events.before(str(theirs), step)
        if field == "rows_used" and (theirs is None or problems):
            continue  # an older checkpoint has none; and what differs above is the reason
        if ours != theirs:
            problems.append(
                f"data position: {field}={ours!r} but the checkpoint has {theirs!r}: {fix}"
            )
    return problems
