"""What a chat build prints: nothing is left out without a line here."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table


def show(
    manifest: Mapping, first_refused: Sequence[str], path: str, seconds: float, console: Console
) -> None:
    """Tables of what was read, refused, removed and packed."""
    chat = manifest["chat"]
    table = Table("source", "read", "refused", "left after cleaning", title="conversations")
    for name in manifest["inputs"]:
        refused = chat["refused"].get(name, {})
        table.add_row(
            name,
            f"{chat['read'].get(name, 0):,}",
            f"{sum(refused.values()):,}",
            f"{chat['left'].get(name, 0):,}",
        )
    console.print(table)
    show_left_out(chat["refused"], first_refused, chat["removed"], console)
    table = Table("split", "conversations", "tokens", "learnt", "rows", "fill", title="rows")
    for split, counts in chat["splits"].items():
        empty = f" + {counts['empty_rows']} empty" if counts["empty_rows"] else ""
        table.add_row(
            split,
            f"{counts['conversations']:,}",
            f"{counts['tokens']:,}",
            f"{counts['learnt_tokens'] / max(1, counts['tokens']):.1%}",
            f"{counts['rows']:,}{empty}",
            f"{counts['fill']:.2%}",
        )
    console.print(table)
    for split, counts in chat["splits"].items():
        console.print(
            f"{split}: {counts['truncated']:,} conversations lost their end to the row's length "
            f"({counts['emptied']:,} of them had nothing learnt left and are out), "
            f"{counts['dropped']:,} too long were left out",
            soft_wrap=True,
        )
    rows = manifest["sources"]["chat"]["splits"]["train"]["rows"]
    console.print(
        f"an epoch is {rows:,} rows; TrainConfig.epochs makes steps of it "
        f"(epochs x rows / DataConfig.batch_size)",
        soft_wrap=True,
    )
    console.print(f"data set {path} built in {seconds:.1f} s", soft_wrap=True)


def show_left_out(
    refused: Mapping[str, Mapping[str, int]],
    first_refused: Sequence[str],
    removed: Sequence[Mapping],
    console: Console,
) -> None:
    """Lines of what was refused, by source and reason, and of what each cleaning step removed."""
    for name, reasons in refused.items():
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
            console.print(f"refused, {name}: {count:,} x {reason}", soft_wrap=True, markup=False)
    for place in first_refused:
        console.print(f"  {place}", soft_wrap=True, markup=False)
    for step in removed:
        named = f", for example {', '.join(step['first'][:3])}" if step["first"] else ""
        console.print(
            f"cleaning, {step['step']}: {step['conversations']:,} of {step['seen']:,} removed, "
            f"{step['bytes']:,} bytes{named}",
            soft_wrap=True,
            markup=False,
        )
