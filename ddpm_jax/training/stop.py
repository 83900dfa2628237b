"""SIGTERM and Ctrl-C as requests: the loop saves first."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

EXIT_SIGTERM = 75  # EX_TEMPFAIL: the same command continues the run
EXIT_SIGINT = 130


class Stopped(Exception):
    """A run that was asked to stop and has saved; the message says where, ``exit_code`` how a program ends."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclasses.dataclass
class Stop:
    """Which signal asked the run to stop."""

    exit_code: int = 0

    def is_set(self, step: int) -> bool:
        """Whether one came: to this process, or to any of several, which then agree on the step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.exit_code = EXIT_SIGTERM
        return self.exit_code != 0


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Turns the first SIGTERM or Ctrl-C into a request; a second Ctrl-C interrupts at once.

    Beside ``jax.distributed`` its own notifier does this, which a handler would replace; outside the main thread Python
    allows none.
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
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python
