"""The error of everything that reads or writes other people's checkpoints."""

from lemur_jax.errors import LemurError


class ConversionError(LemurError, ValueError):
    """One or more reasons why a checkpoint cannot be converted. `problems` holds one line for each.

    Each line names the field, tensor or file, what was found, and what to do about it. Nothing has
    been written to the destination, and the source is never touched.
    """

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))
