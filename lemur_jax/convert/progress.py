"""A progress line of a conversion: tensors and bytes. Quiet when nobody watches."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(what: str, total_bytes: int) -> Iterator[Callable[[str, int], None]]:
    """Yields a function to call after each tensor with its name and bytes.

    Shows a line on stderr if that is a terminal, and prints nothing otherwise.
    """
    if not sys.stderr.isatty():
        yield lambda name, nbytes: None
        return
    # Importing rich takes 0.1 s: only for those who see it.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensors]} tensors, {task.fields[name]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total_bytes, tensors=0, name="")
        count = 0

        def advance(name: str, nbytes: int) -> None:
            nonlocal count
            count += 1
            bar.update(task, advance=nbytes, tensors=count, name=name)

        yield advance
