"""A trace of a few steps, for xprof and TensorBoard's profile tab."""

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import jax


class Profile:
    """Traces the steps first .. first + steps - 1 of the loop that it surrounds, with what the device does in them."""

    def __init__(self, folder: str, *, first: int, steps: int, enabled: bool):
        self._folder = folder
        self._steps = range(first, first + steps) if enabled else range(0)
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._switch(False, None)

    @contextlib.contextmanager
    def step(self, step: int, state: Any) -> Iterator[None]:
        """Surrounds the dispatch of a step; ``state`` is what it starts from, waited for where the trace is cut."""
        self._switch(step in self._steps, state)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _switch(self, running: bool, state: Any) -> None:
        if running == self._running:
            return
        jax.block_until_ready(state)
        if running:
            jax.profiler.start_trace(self._folder)
        else:
            jax.profiler.stop_trace()
        self._running = running
