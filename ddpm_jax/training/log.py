"""A run's progress, read off the device one step late."""

import contextlib
import time
from collections.abc import Iterator
from typing import Self

import jax
import numpy as np

from ddpm_jax.progress import progress
from ddpm_jax.training.metrics import MetricsWriter, summarize


class Log:
    """Fetches each step's metrics while the next one computes, and writes a line an interval."""

    def __init__(self, writer: MetricsWriter, *, first_step: int, num_steps: int, log_every: int, batch_size: int):
        self._writer = writer
        self._num_steps, self._log_every, self._batch_size = num_steps, log_every, batch_size
        self.skipped_in_a_row = 0
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._steps: list[dict[str, np.ndarray]] = []
        self._since, self._pause = time.monotonic(), 0.0
        self._bar = progress(num_steps, "training", "step", initial=first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self._collect()
        self._bar.close()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that has just been dispatched; fetches those of the one before."""
        if self._pending is None and not self._steps:
            self._since, self._pause = time.monotonic(), 0.0  # the first step has been compiled by now
        self._collect()
        self._pending = (step, metrics)
        if step == self._num_steps:
            self._collect()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here does not count as training."""
        self._collect()
        start = time.monotonic()
        yield
        self._pause += time.monotonic() - start

    def _collect(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        self._steps.append(jax.device_get(metrics))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self._steps[-1]["skipped"] else 0
        if step % self._log_every == 0 or step == self._num_steps:
            self._write(step)
        self._bar.update(1)

    def _write(self, step: int) -> None:
        seconds = time.monotonic() - self._since - self._pause
        rate = len(self._steps) * self._batch_size / seconds
        line = summarize(self._steps, rate)
        self._writer.write(step, line)
        self._bar.set_postfix_str(f"loss {line['loss']:.4f}, {rate:.0f} images/s", refresh=False)
        self._steps, self._since, self._pause = [], time.monotonic(), 0.0
