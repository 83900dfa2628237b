import fcntl
import os
import pty
import select
import struct
import sys
import termios

import pytest

from ddpm_jax import distributed
from ddpm_jax import progress as progress_module
from ddpm_jax.progress import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def no_notebook(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)


def test_a_log_gets_whole_lines_at_the_start_every_20_seconds_and_at_the_end(clock, capsys):
    with progress(1000, "training", unit="step") as bar:
        for _ in range(1000):
            clock[0] += 0.1  # 100 seconds in all
            bar.update(1)
            bar.set_postfix(loss=0.5)  # which redraws every time
    text = capsys.readouterr().err
    assert "\r" not in text
    assert text.endswith("\n")
    lines = text.splitlines()
    assert 6 <= len(lines) <= 7  # 0, 20, 40, 60, 80 and 100 s, and the end
    assert lines[0].startswith("training:   0% 0/1000")
    assert lines[-1].startswith("training: 100% 1000/1000")
    assert "loss=0.5" in lines[-1]


def test_nothing_is_drawn_within_the_20_seconds(clock, capsys):
    bar = progress(10, "sampling")
    first = capsys.readouterr().err
    bar.update(5)
    bar.set_postfix_str("x")
    clock[0] += 19.9
    bar.refresh()
    assert first
    assert capsys.readouterr().err == ""
    clock[0] += 0.2
    bar.refresh()
    assert "5/10" in capsys.readouterr().err
    bar.close()


def test_an_exception_leaves_the_last_state_in_the_log(clock, capsys):
    def fail() -> None:
        with progress(10, "sampling") as bar:
            bar.update(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "3/10" in capsys.readouterr().err.splitlines()[-1]


def test_nested_bars_move_no_cursor(clock, capsys):
    with progress(2, "outer") as outer:
        for _ in range(2):
            with progress(3, "inner") as inner:
                inner.update(3)
            outer.update(1)
    text = capsys.readouterr().err
    assert "\x1b" not in text
    assert "" not in text.splitlines()
    assert text.splitlines()[-1].startswith("outer: 100%")


def test_an_unknown_total_counts_up(clock, capsys):
    with progress(None, "decoding", unit="img") as bar:
        bar.update(7)
    assert "decoding: 7img" in capsys.readouterr().err.splitlines()[-1]


def test_a_resumed_job_starts_where_it_stopped(clock, capsys):
    with progress(10, "training", initial=6):
        pass
    assert "60% 6/10" in capsys.readouterr().err


def test_all_processes_but_the_first_show_nothing(capsys, monkeypatch):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    with progress(10, "training") as bar:
        bar.update(1)
        bar.set_postfix(loss=1.0)
        bar.set_postfix_str("x")
    assert capsys.readouterr().err == ""


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes stderr a terminal of so many columns, and one that reads what was written there."""
    ours, theirs = pty.openpty()

    def open_terminal(columns: int) -> None:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40 if columns else 0, columns, 0, 0))
        monkeypatch.setattr(sys, "stderr", os.fdopen(theirs, "w", closefd=False))

    def read() -> str:
        sys.stderr.flush()
        written = b""
        while select.select([ours], [], [], 0.3)[0]:  # the kernel hands over a write at a time, and late
            written += os.read(ours, 100_000)
        return written.decode().replace("\r\n", "\n")

    yield open_terminal, read
    os.close(ours)
    os.close(theirs)


def test_a_terminal_gets_a_bar(terminal):
    open_terminal, read = terminal
    open_terminal(100)
    with progress(10, "training") as bar:
        bar.update(10)
    text = read()
    assert text.count("\r") >= 2
    assert text.count("\n") == 1
    assert "| 10/10" in text


def test_a_terminal_of_no_width_gets_lines(terminal):
    open_terminal, read = terminal
    open_terminal(0)
    with progress(10, "training") as bar:
        bar.update(10)
    text = read()
    assert "\r" not in text
    assert "training: 100% 10/10" in text
