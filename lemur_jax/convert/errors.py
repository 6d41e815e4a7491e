"""The error of everything that reads or writes other people's checkpoints."""

from lemur_jax.errors import LemurError

_SHOWN = 4


def first_few(problems: list[str], of: str) -> list[str]:
    """The first four problems of one kind, and how many more there are: a model has 1000 tensors.

    Args:
      problems: a line for each.
      of: what a line is about, e.g. "tensors".
    """
    if len(problems) <= _SHOWN + 1:
        return problems
    return [*problems[:_SHOWN], f"and {len(problems) - _SHOWN} more {of} like these"]


class ConversionError(LemurError, ValueError):
    """One or more reasons why a checkpoint cannot be converted. `problems` holds one line for each.

    Each line names the field, tensor or file, what was found, and what to do about it. Nothing has
    been written to the destination, and the source is never touched.
    """

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))
