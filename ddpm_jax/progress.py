"""How far a long computation has come: a bar on a terminal, a plain line now and then in a log file."""

import os
import sys
import time
from typing import TextIO

from tqdm import tqdm

from ddpm_jax import distributed

SECONDS_BETWEEN_LINES = 20.0
_LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress(total: int | None, description: str, unit: str = "it", initial: int = 0) -> tqdm:
    """Open a progress bar on stderr; use it in a `with` statement and call `.update(n)`, `.set_postfix(loss=...)`.

    Where stderr is neither a terminal nor a notebook, it prints one line at the start, one about every 20 seconds and
    one at the end, without carriage returns, however often it is updated. Of several processes the first one shows it.

    Args:
        total: the number of units in the whole job, or None where that is unknown.
        description: a word or two that head the line.
        unit: what is counted, for example "step" or "img".
        initial: units already done, as after a resume; they do not count in the rate.
    """
    disable = not distributed.is_first()
    if _can_redraw():
        return tqdm(total=total, desc=description, unit=unit, initial=initial, disable=disable, dynamic_ncols=True)
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=disable,
        file=_Lines(sys.stderr),
        bar_format=None if total is None else _LINE,  # tqdm's own format without a total has no bar in it
        position=0,  # a bar inside a bar would move the cursor
        leave=True,
    )


def _can_redraw() -> bool:
    if "ipykernel" in sys.modules:  # a notebook says that it is no terminal, yet it honours the carriage return
        return True
    # Containers with `tty: true` log from a terminal of width 0, on which tqdm draws nothing at all.
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


class _Lines:
    """A file for tqdm to redraw its bar on, which passes a redrawing on as a line once in a while, and the last one."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._drawn = ""
        self._next_line = 0.0

    def write(self, text: str) -> None:
        self._drawn = text.strip() or self._drawn
        # The limit is here and not in tqdm's `mininterval`, because `set_postfix` redraws whenever it is called.
        if self._drawn and (text.endswith("\n") or time.monotonic() >= self._next_line):
            self._stream.write(self._drawn + "\n")
            self._stream.flush()
            self._drawn = ""
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def flush(self) -> None:
        """Do nothing: every line is flushed as it is written."""
