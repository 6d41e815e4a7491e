"""Epochs: how often a run will read each source, by token, and a warning when that is too often.

Lemur read its Python 2.98 times and its SQL 0.69 times (arXiv:2310.06830, Table 8); repetition up
to four times is close to as good as new data (arXiv:2305.16264), hence SourceConfig.max_epochs.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from lemur_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class SourceEpochs:
    """One source in one run.

    Attributes:
      name: of the source.
      share: of the run's tokens, in [0, 1].
      tokens: that the source has.
      drawn: tokens that the run reads from it.
      max_epochs: repetitions that were asked for.
    """

    name: str
    share: float
    tokens: int
    drawn: float
    max_epochs: float

    @property
    def epochs(self) -> float:
        """How often the run reads the source."""
        return self.drawn / self.tokens if self.tokens else float("inf")

    @property
    def warning(self) -> str | None:
        """What to say when the source is read more often than asked; None when it is not."""
        if self.epochs <= self.max_epochs:
            return None
        return (
            f"source {self.name}: {self.epochs:.2f} epochs, more than SourceConfig.max_epochs="
            f"{self.max_epochs:g}: lower its rate, train fewer steps, add data, or ask for more"
        )


def account(
    tokens: Mapping[str, int],
    rates: Mapping[str, float],
    run_tokens: float,
    max_epochs: Mapping[str, float] | None = None,
) -> tuple[SourceEpochs, ...]:
    """Epochs of every source, in the order of `rates`.

    Args:
      tokens: {source: tokens that it has}.
      rates: {source: share of the tokens}, not normalised.
      run_tokens: steps x batch x sequence length.
      max_epochs: {source: asked repetitions}; absent ones are not limited.

    Raises ConfigError when `tokens` and `rates` name different sources.
    """
    if set(tokens) != set(rates):
        different = sorted(set(tokens) ^ set(rates))
        raise ConfigError(
            [f"tokens and rates must name the same sources; they differ: {different}"]
        )
    total, asked = sum(rates.values()), max_epochs or {}
    return tuple(
        SourceEpochs(
            name,
            rate / total,
            tokens[name],
            run_tokens * rate / total,
            asked.get(name, float("inf")),
        )
        for name, rate in rates.items()
    )


def of_data_set(manifest: Mapping[str, Any], run_tokens: float) -> tuple[SourceEpochs, ...]:
    """`account` of a built data set. Its tokens are those of its rows, as training counts them:
    rows x sequence length, padding included on both sides."""
    length, sources = manifest["sequence_length"], manifest["sources"]
    asked = manifest.get("max_epochs", {})  # none in data sets of format 1
    tokens = {name: source["splits"]["train"]["rows"] * length for name, source in sources.items()}
    rates = {name: source["rate"] for name, source in sources.items()}
    return account(tokens, rates, run_tokens, asked)


def table(accounts: tuple[SourceEpochs, ...]) -> Table:
    """Shares, tokens and epochs of a run, for a terminal."""
    shown = Table(title="epochs per source", title_justify="left")
    for column in ("source", "share %", "tokens", "drawn", "epochs"):
        shown.add_column(column, justify="left" if column == "source" else "right")
    for one in accounts:
        shown.add_row(
            one.name,
            f"{100 * one.share:.2f}",
            f"{one.tokens:,}",
            f"{one.drawn:,.0f}",
            f"{one.epochs:.2f}{' (!)' if one.warning else ''}",
        )
    return shown


def lines(accounts: tuple[SourceEpochs, ...]) -> list[str]:
    """The same for a log: a line of all epochs, and a line for each warning."""
    epochs = ", ".join(f"{one.name} {one.epochs:.2f}" for one in accounts)
    return [f"epochs: {epochs}", *(f"warning: {one.warning}" for one in accounts if one.warning)]


def show(accounts: tuple[SourceEpochs, ...], console: Console | None = None) -> None:
    """Prints the table and the warnings."""
    console = console or Console(stderr=True)
    console.print(table(accounts))
    for line in lines(accounts)[1:]:
        console.print(line, soft_wrap=True)


def longest_run(manifest: Mapping[str, Any]) -> tuple[str, int]:
    """The source that is used up first, and the run's tokens at which its max_epochs are read."""
    accounts = of_data_set(manifest, 1.0)
    reached = {one.name: min(one.max_epochs, 1e9) * one.tokens / one.share for one in accounts}
    name = min(reached, key=lambda name: reached[name])
    return name, math.floor(reached[name])  # or rounding would warn of the limit itself


def show_longest_run(manifest: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the longest run without a warning, and the table of its epochs."""
    name, tokens = longest_run(manifest)
    most = manifest.get("max_epochs", {}).get(name, float("inf"))
    print(
        f"the longest run without a warning has {tokens:,} tokens and reads source {name!r} "
        f"{most:g} times (its SourceConfig.max_epochs):"
    )
    show(of_data_set(manifest, tokens), console)


def report_run(
    manifest: Mapping[str, Any], rows_used: Mapping[str, int], report: Callable[[str], Any]
) -> None:
    """Reports `lines` of a run on a built data set: at the start of `lemur train`.

    Args:
      manifest: of the data set.
      rows_used: {source: rows that the run reads of it}, by its order, changes of rates included.
      report: takes a line.
    """
    length, total = manifest["sequence_length"], sum(rows_used.values())
    accounts = tuple(
        dataclasses.replace(
            one, share=rows_used[one.name] / total, drawn=rows_used[one.name] * length
        )
        for one in of_data_set(manifest, 0.0)
    )
    for line in lines(accounts):
        report(line)
