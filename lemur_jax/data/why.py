"""`lemur data why RUN STEP`: the documents of a step, to look into a spike of the loss."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lemur_jax.config import ConfigError
from lemur_jax.data import recorded
from lemur_jax.data.ledger import Ledger
from lemur_jax.data.order import Place
from lemur_jax.data.pipeline import Pipeline
from lemur_jax.data.tokenizer import Tokenizer

TEXT_TOKENS = 48  # of each document, with --text


def why(
    run_dir: str | Path,
    step: int,
    data: str | None = None,
    text: bool = False,
    console: Console | None = None,
) -> None:
    """Prints rows, sources, documents and token offsets of a step.

    Args:
      run_dir: of the run; nothing else of it but the ledger is read.
      step: as in metrics.jsonl and the loss curve: step 1 is the first, and checkpoint N comes
        after step N.
      data: where the data set is now; None: where the run had it.
      text: also the beginning of each document's part.
      console: where to.

    Raises ConfigError for a step that no start of the run can have read.
    """
    console = console or Console()
    ledger, pipeline = recorded.open_run(run_dir, data)
    if step < 1:
        raise ConfigError([f"STEP={step} must be at least 1: step 1 is the first, as in metrics"])
    batch = step - 1  # the number of steps done before it
    print_ = functools.partial(console.print, soft_wrap=True, markup=False, highlight=False)
    print_(f"step {step} of {run_dir}: {_status(ledger, batch)}")
    first, size = batch * pipeline.config.batch_size, pipeline.config.batch_size
    shares = pipeline.order.share(first)
    mixture = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    print_(f"{size} rows, positions {first} to {first + size - 1} of the order; mixture: {mixture}")
    tokenizer = Tokenizer.load(pipeline.tokenizer_dir) if text else None
    for number, place in enumerate(pipeline.places(batch)):
        print_(f"row {number}: {place.source} row {place.row}, epoch {place.epoch + 1}")
        _print_pieces(print_, pipeline, batch, place, tokenizer)


def _print_pieces(
    print_: Callable, pipeline: Pipeline, batch: int, place: Place, tokenizer: Tokenizer | None
) -> None:
    store = pipeline.store(place.source)
    excluded = {p.document for p in pipeline.excluded_pieces(batch, place.source, place.row)}
    tokens = store.read([place.row]).tokens[0]
    for piece in store.pieces(place.row):
        end = piece.start_in_document + piece.length
        note = "  [excluded: padding]" if piece.document in excluded else ""
        print_(
            f"  {piece.path}  tokens {piece.start_in_document} to {end - 1}, "
            f"columns {piece.start_in_row} to {piece.start_in_row + piece.length - 1}"
            f" (document {piece.document}){note}"
        )
        if tokenizer is not None:
            stop = piece.start_in_row + min(piece.length, TEXT_TOKENS)
            shown = tokenizer.decode([int(i) for i in tokens[piece.start_in_row : stop]])
            print_(Text(f"    {shown!r}", style="dim"))


def _status(ledger: Ledger, batch: int) -> str:
    """Which start of the run read a batch last, or that none has yet."""
    reading = [e for e in ledger.starts if e["step"] <= batch]
    if not reading:
        return f"before the ledger begins (step {ledger.starts[0]['step']}); as the order gives it"
    start = reading[-1]
    if batch >= ledger.reached:
        return (
            f"not saved in any checkpoint yet (the last is {ledger.reached}); as it is or will be "
            "read"
        )
    return (
        f"read by {start['processes']} process(es), {start.event} at step {start['step']}, "
        f"{start['time']}"
    )


def list_steps(run_dir: str | Path, file: str | Path, data: str | None = None) -> int:
    """Writes what each step up to the newest checkpoint was fed, one line of JSON a step.

    {"step": N, "rows": [[source, row, epoch, [[path, first token, last token], ...]], ...]},
    without excluded documents. Reads the documents of every row. Returns the number of steps.
    """
    ledger, pipeline = recorded.open_run(run_dir, data)
    steps = ledger.reached
    with open(file, "w", encoding="utf-8") as out:
        for batch in range(steps):
            rows = []
            for source, row, epoch in pipeline.places(batch):
                gone = {p.document for p in pipeline.excluded_pieces(batch, source, row)}
                pieces = [
                    [p.path, p.start_in_document, p.start_in_document + p.length - 1]
                    for p in pipeline.store(source).pieces(row)
                    if p.document not in gone
                ]
                rows.append([source, row, epoch, pieces])
            out.write(json.dumps({"step": batch + 1, "rows": rows}) + "\n")
    return steps
