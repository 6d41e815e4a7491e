"""The directories of one run's checkpoints: which stay, which step aside, which go."""

import re
import time
from collections.abc import Callable

from etils import epath

from lemur_jax.checkpoint.manifest import (
    MANIFEST,
    absolute,
    complete_steps,
    list_directory,
    step_of,
)


def set_aside(directory: epath.PathLike, after: int, report: Callable[[str], None]) -> None:
    """Renames the complete checkpoints of steps beyond `after`, which a resume has passed over.

    They were found damaged. Under their own names they would count into the keep policy and push
    out sound ones; nothing of them is deleted. Call it in one process only.
    """
    directory = absolute(directory)
    for step in complete_steps(directory):
        if step > after:
            aside = directory / f"{step}.damaged"
            if "://" in str(directory) or aside.exists():
                report(f"checkpoint {directory / str(step)} is damaged: remove it by hand")
                continue
            (directory / str(step)).rename(aside)
            report(f"damaged checkpoint {step} now lies in {aside}; it counts no more")


class Keeper:
    """Removes and sets aside, in process 0 only.

    A crash at any point leaves directories that are either whole or not taken for checkpoints.
    """

    def __init__(
        self,
        directory: epath.Path,
        keep_latest: int,
        keep_every_steps: int | None,
        report: Callable[[str], None],
    ):
        self._directory = directory
        self._keep_latest = keep_latest
        self._keep_every_steps = keep_every_steps
        self._report = report

    def make_room(self, step: int) -> None:
        """Frees the name of `step`: leftovers of a crash go, a complete checkpoint steps aside."""
        step_dir = self._directory / str(step)
        if (step_dir / MANIFEST).exists():
            if self._aside(step).exists():
                self._remove(self._aside(step))
            step_dir.rename(self._aside(step))
        self._remove_half_written(step)

    def prune(self, step: int) -> None:
        """The keep policy, after `step` is complete.

        Steps after `step` are not counted and not touched: they belong to a future that a resume
        from an older checkpoint has left, and counting them could delete what was just saved.
        """
        past = [s for s in complete_steps(self._directory) if s <= step]
        every = self._keep_every_steps
        for old in past[: -self._keep_latest]:
            if every is None or old % every:
                self._remove(self._directory / str(old))
        if self._aside(step).exists():
            self._remove(self._aside(step))

    def undo(self, step: int) -> None:
        """After a failed save of `step`: half-written goes, what was set aside returns."""
        self._remove_half_written(step)
        step_dir = self._directory / str(step)
        if self._aside(step).exists() and not step_dir.exists():
            self._aside(step).rename(step_dir)

    def _aside(self, step: int) -> epath.Path:
        return self._directory / f"{step}.superseded"

    def _remove_half_written(self, step: int) -> None:
        """What a failed or killed save left: temporary directories, and `step` if not whole."""
        for path in list_directory(self._directory):
            temporary = re.fullmatch(r"\d+\.(removed|orbax-checkpoint-tmp.*)", path.name)
            if temporary or (path.name == str(step) and not (path / MANIFEST).exists()):
                self._remove(path)

    def _remove(self, path: epath.Path) -> None:
        """Deletes a directory; a crash leaves nothing that looks whole, nor that nobody deletes."""
        try:
            if step_of(path) is not None and "://" not in str(path):
                path = path.rename(path.with_name(f"{path.name}.removed"))
            (path / MANIFEST).unlink(missing_ok=True)  # object stores cannot rename: this first
            # After a failed write, others of the same save may still be creating files.
            for seconds in (0.1, 0.4, 1.6, None):
                try:
                    path.rmtree(missing_ok=True)
                    break
                except OSError:
                    if seconds is None:
                        raise
                    time.sleep(seconds)
        except OSError as error:
            self._report(f"cannot remove {path}: {error}. Remove it by hand")
