"""What training measured, on its way out: `metrics.jsonl` for programs, TensorBoard for people."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from absl import logging
from etils import epath
from numpy.typing import ArrayLike

from ddpm_jax.images import PathLike, write_atomically

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

_FLUSH_SECONDS = 20  # so that TensorBoard follows a run; metrics.jsonl is flushed line by line


def summarize(steps: Sequence[Mapping[str, ArrayLike]], images_per_second: float) -> dict[str, float]:
    """Reduce the metrics of consecutive steps to the scalars of one line of `metrics.jsonl`.

    Args:
        steps: one mapping a step, of host values, in order:
            `loss` (mean over the batch), `grad_norm`, `learning_rate`: scalars;
            `loss_sums`, `loss_counts` [4]: the summed loss and the number of the examples whose t lies in each quarter
            of the chain, the least noisy first;
            `skipped`: 1 where the step was not finite and changed nothing, else 0; `skipped_steps`: their total so far.
        images_per_second: as measured by the caller over these steps.

    Returns:
        `loss` and `grad_norm`, means over the steps that were not skipped; `loss_q1` ... `loss_q4`, means over the
        examples of those steps in each quarter; `learning_rate` and `skipped_steps` of the last step;
        `images_per_second`. A mean of nothing is NaN.

    Raises:
        ValueError: there is no step.
    """
    if not steps:
        raise ValueError("no step to summarize")
    kept = [step for step in steps if not np.asarray(step["skipped"])]
    quarters = _quarter_means(kept)
    return {
        "loss": _finite_mean([step["loss"] for step in kept]),
        **{f"loss_q{i}": float(mean) for i, mean in enumerate(quarters, start=1)},
        "grad_norm": _finite_mean([step["grad_norm"] for step in kept]),
        "learning_rate": float(np.asarray(steps[-1]["learning_rate"])),
        "images_per_second": float(images_per_second),
        "skipped_steps": int(np.asarray(steps[-1]["skipped_steps"])),
    }


class MetricsWriter:
    """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard/`; a context manager, for process 0.

    Opening it takes back what an earlier run wrote after the step from which this one goes on, so that each step stands
    in `metrics.jsonl` once; TensorBoard is told to hide it.

    A line has left the process when `write` returns. An object store (`gs://`) cannot append: there each `write` sends
    the whole file, some 250 bytes a line. TensorBoard files on `gs://` need the package `google-cloud-storage`; without
    it a warning says so, and there are none.
    """

    def __init__(self, workdir: PathLike, first_step: int, enabled: bool = True):
        """Open the files of a run.

        Args:
            workdir: the run's folder, made if need be.
            first_step: the step of the restored state, 0 for a fresh run; the first one written is greater.
            enabled: False writes nothing and touches no file: for every process but the first.
        """
        self._path: epath.Path | None = None
        self._board: SummaryWriter | None = None
        if enabled:
            folder = epath.Path(workdir)
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / "metrics.jsonl"
            _trim(self._path, first_step)
            self._board = _open_board(folder / "tensorboard", first_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the line of a step; NaN and infinity become null in it and are left out of TensorBoard."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        if self._path is not None:
            # `default=float` takes the scalars of numpy too; strict JSON has no NaN, so none may slip through.
            line = json.dumps({"step": step, **finite}, allow_nan=False, default=float)
            _append(self._path, line.encode() + b"\n")
        if self._board is not None:
            for name, value in finite.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Show a picture, uint8 [H W C] with C 1 or 3, in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what TensorBoard still waits for; nothing is written afterwards. May be called twice."""
        if self._board is not None:
            self._board.close()
        self._board = self._path = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _trim(path: epath.Path, first_step: int) -> None:
    """Leave one line for each step up to `first_step`, the latest; a torn line goes, so that appending is safe."""
    if not path.exists():
        return
    before = path.read_bytes()
    *lines, _torn = before.split(b"\n")  # what follows the last newline: nothing, or half a line
    latest = {step: line for line in lines if (step := _step_of(line)) is not None and step <= first_step}
    after = b"".join(line + b"\n" for line in latest.values())
    if after != before:
        write_atomically(path, after)


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):  # no JSON (or no UTF-8), no object, no step
        return None
    return step if isinstance(step, int) else None


def _append(path: epath.Path, line: bytes) -> None:
    if "://" in os.fspath(path):
        write_atomically(path, (path.read_bytes() if path.exists() else b"") + line)
    else:
        with open(path, "ab") as file:
            file.write(line)


def _open_board(folder: epath.Path, first_step: int) -> "SummaryWriter | None":
    from tensorboardX import SummaryWriter

    try:
        # A file's name is the second it was opened in; the suffix keeps a quick resume from overwriting an older file.
        return SummaryWriter(
            os.fspath(folder),
            purge_step=first_step + 1,
            flush_secs=_FLUSH_SECONDS,
            filename_suffix=f".{first_step}",
        )
    except ImportError as error:
        logging.warning("No TensorBoard files in %s: %s", folder, error)
        return None


def _finite_mean(values: Sequence[ArrayLike]) -> float:
    numbers = np.asarray(values, np.float64)
    finite = numbers[np.isfinite(numbers)]
    return float(finite.mean()) if finite.size else math.nan


def _quarter_means(steps: Sequence[Mapping[str, ArrayLike]]) -> np.ndarray:
    # Steps are weighted by their examples: chance puts more of one batch than of another into a quarter.
    sums = sum((np.asarray(step["loss_sums"], np.float64) for step in steps), np.zeros(4))
    counts = sum((np.asarray(step["loss_counts"], np.float64) for step in steps), np.zeros(4))
    return np.divide(sums, counts, out=np.full(4, math.nan), where=counts > 0)
