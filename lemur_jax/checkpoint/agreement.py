"""Agreement between processes, on the host: nothing here touches a device."""

import contextlib
import itertools
import time

import jax

from lemur_jax.checkpoint.manifest import CheckpointError

serial_numbers = itertools.count()  # of agreements: the same in every process


class Agreement:
    """Stages that all processes pass together or fail together, with a deadline for each stage.

    A plain barrier leaves the healthy processes waiting for one that failed, until the deadline.
    Here a process votes "ok" or says what went wrong; process 0 collects all votes and publishes
    the verdict, so every process learns at once who failed and why, and after a failure no
    process is still at work. Votes go through jax.distributed's coordination service, never
    through device collectives, so they are safe beside a running step and in any thread.
    With one process every stage passes.

    Every process must create its agreements, and pass their stages, in the same order.
    """

    def __init__(self, timeout_seconds: float):
        self._prefix = f"lemur_checkpoint/{next(serial_numbers)}"
        self._stages = itertools.count()
        self._timeout_seconds = timeout_seconds
        self._failed = False

    def reach(self, error: str | None = None, *, value: str = "ok") -> str:
        """Votes; returns process 0's `value` if all are well.

        Raises:
          CheckpointError: some process failed or did not answer in time; names all of those.
        """
        if jax.process_count() == 1:
            if error is not None:
                raise CheckpointError(error)
            return value
        # JAX exports no other handle on its coordination service; Orbax takes the same one.
        from jax._src import distributed

        client = distributed.global_state.client
        stage = f"{self._prefix}/{next(self._stages)}"
        me = jax.process_index()
        client.key_value_set(f"{stage}/{me}", "ok" if error is None else f"failed {error}")
        if me == 0:
            verdict = self._collect(client, stage)
            client.key_value_set(f"{stage}/verdict", verdict or f"ok {value}")
        else:
            # Process 0 may itself wait for the whole deadline before it can answer.
            verdict = self._get(client, f"{stage}/verdict", self._timeout_seconds + 30)
            if verdict is None:
                verdict = f"process 0 gave no verdict within {self._timeout_seconds + 30:.0f} s"
            elif verdict.startswith("ok "):
                return verdict.removeprefix("ok ")
        if verdict:
            self._failed = True
            raise CheckpointError(verdict)
        return value

    def fail(self, error: BaseException) -> None:
        """Votes no at the stage where the others are or will be; returns when all have voted."""
        if not self._failed and jax.process_count() > 1:
            with contextlib.suppress(CheckpointError):  # that is the point
                self.reach(f"{type(error).__name__}: {error}")

    def forget(self) -> None:
        """Frees the coordination service's memory, once every process is past the last stage."""
        if jax.process_count() > 1 and jax.process_index() == 0:
            from jax._src import distributed

            distributed.global_state.client.key_value_delete(self._prefix)

    def _collect(self, client, stage: str) -> str:
        """All votes; "" if each is "ok", else one line on every process that failed."""
        deadline = time.monotonic() + self._timeout_seconds
        problems = []
        for process in range(jax.process_count()):
            left = max(deadline - time.monotonic(), 0.001)
            vote = self._get(client, f"{stage}/{process}", left)
            if vote is None:
                problems.append(
                    f"process {process} did not answer within {self._timeout_seconds:.0f} s"
                )
            elif vote != "ok":
                problems.append(f"process {process} {vote}")
        return "; ".join(problems)

    @staticmethod
    def _get(client, key: str, seconds: float) -> str | None:
        try:
            return str(client.blocking_key_value_get(key, int(seconds * 1000)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise
