"""Functions in processes of their own: libtpu compiles one program at a time in a process, and may
end it (a failed check in the compiler is no exception)."""

import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

from lemur_jax.errors import LemurError


class ProcessDied(LemurError):
    """The process ended without an answer."""


def apart(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` in a fresh process; its result or its exception.

    Args:
      function: importable by name; arguments and result are pickled.

    Raises:
      ProcessDied: with the signal or exit status.
    """
    context = multiprocessing.get_context("spawn")  # libtpu's state does not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        worked, value = receiver.recv()
    except EOFError:
        process.join()
        raise ProcessDied(f"the compiler's process died: {_ending(process.exitcode)}") from None
    process.join()
    if not worked:
        raise value
    return value


def _answer(sender, function: Callable, arguments: tuple) -> None:
    try:
        answer = True, function(*arguments)
    except Exception as error:  # handed over, whatever it is
        answer = False, error
    sender.send(answer)
    sender.close()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit status {code}"
