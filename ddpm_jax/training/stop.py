"""SIGTERM and Ctrl-C as requests: the loop saves first."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator

import jax

EXIT_SIGTERM = 75  # EX_TEMPFAIL: the same command continues the run
EXIT_SIGINT = 130


@dataclasses.dataclass
class Stop:
    """Which signal asked the run to stop."""

    exit_code: int = 0

    def is_set(self) -> bool:
        """Whether one came."""
        return self.exit_code != 0


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Turns the first SIGTERM or Ctrl-C into a request; a second Ctrl-C interrupts at once.

    Not beside ``jax.distributed``, whose own notifier a handler would replace, nor outside the main thread.
    """
    stop = Stop()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, _: object) -> None:
        stop.exit_code = EXIT_SIGTERM if number == signal.SIGTERM else EXIT_SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
