"""What a person sees of a running step loop, and the request to stop it."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SMOOTHING = 0.9  # of the step time: about the last ten steps


class StepProgress:
    """A live line on a terminal; elsewhere a printed line every `steps_per_log` steps.

    Shows step, loss, tokens/s, MFU and the time left. The first step (compilation) and what happens
    inside `paused` (evaluation, saving) do not count into the rates.
    """

    def __init__(
        self,
        console: Console,
        *,
        first_step: int,
        steps: int,
        steps_per_log: int,
        tokens_per_step: int,
        flops_per_step: float,
        peak_flops: float,
    ):
        """Nothing is shown before it is entered as a context.

        Args:
          first_step: steps done before.
          steps, steps_per_log: of the run.
          tokens_per_step: B * T.
          flops_per_step: model FLOPs of the global batch.
          peak_flops: FLOP/s of all devices together; NaN when not known.
        """
        self._console, self._steps, self._steps_per_log = console, steps, steps_per_log
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_step, peak_flops
        self._seconds_per_step = math.nan
        self._clock: float | None = None  # when the last step ended; None before the first one
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=steps, completed=first_step)

    def __enter__(self) -> "StepProgress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    @property
    def tokens_per_second(self) -> float:
        """Of the whole mesh; NaN before the second step."""
        return self._tokens / self._seconds_per_step

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the peak of the mesh; NaN when one of them is not known."""
        return self._flops / self._seconds_per_step / self._peak

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        before = time.perf_counter()
        yield
        if self._clock is not None:
            self._clock += time.perf_counter() - before

    def advance(self, step: int, loss: float) -> None:
        """Step number `step` has ended with this loss."""
        now = time.perf_counter()
        if self._clock is not None:
            seconds = now - self._clock
            known = not math.isnan(self._seconds_per_step)
            self._seconds_per_step = (
                SMOOTHING * self._seconds_per_step + (1 - SMOOTHING) * seconds if known else seconds
            )
        self._clock = now
        line = f"step {step}/{self._steps}  loss {loss:.3f}"
        if not math.isnan(self._seconds_per_step):
            mfu = "n/a" if math.isnan(self.mfu) else f"{self.mfu:.1%}"
            line += f"  {self.tokens_per_second:,.0f} tok/s  MFU {mfu}"
        self._bar.update(self._task, completed=step, description=line)
        if not self._console.is_terminal and (
            step % self._steps_per_log == 0 or step == self._steps
        ):
            if not math.isnan(self._seconds_per_step):
                left = int((self._steps - step) * self._seconds_per_step)
                line += f"  ETA {left // 60}:{left % 60:02d}"
            self._console.print(line, highlight=False)


class StopRequest:
    """Turns SIGTERM (a preemption, a scheduler's time limit) into a request to save and stop."""

    def __enter__(self) -> "StopRequest":
        self._asked = False
        self._previous = None
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _ask(self, *_) -> None:
        self._asked = True

    def before(self, step: int) -> bool:
        """Whether to stop before this step.

        With several processes JAX's preemption service, which has its own SIGTERM handler, picks
        one step for all of them.
        """
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
