"""Progress: a bar on a terminal, plain lines elsewhere, nothing when it is not wanted."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from chrek.cli.progress import Meter

MIB = 1 << 20


def test_short_work_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Work that is over soon has no line in a log."""
    with Meter("saving x") as meter:
        for done in range(0, 100 * MIB, MIB):
            meter.listen("memory", done, 100 * MIB)
    assert capsys.readouterr().err == ""


def test_long_work_has_lines_with_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    """In a log, long work has a line with what is done, the rate and the time left, and not one for every block."""
    with Meter("saving x") as meter:
        meter._began -= 10.0
        meter._next = meter._began
        meter.listen("memory", 100 * MIB, 400 * MIB)
        meter.listen("memory", 101 * MIB, 400 * MIB)
    (line,) = capsys.readouterr().err.splitlines()
    found = re.fullmatch(r"chrek: saving x: memory 100\.0 MiB of 400\.0 MiB, ([\d.]+) MiB/s, ([\d.]+) s left", line)
    assert found is not None, line
    rate, left = map(float, found.groups())
    assert 1 < rate <= 10  # in ten seconds, and what this machine took since
    assert left == pytest.approx(300 / rate, rel=0.05)


def test_the_expected_size_stands_in(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the work does not know its size, the expected one is shown."""
    with Meter("saving x", expected=200 * MIB) as meter:
        meter._next = 0.0
        meter.listen("memory", 100 * MIB, 0)
    assert "100.0 MiB of 200.0 MiB" in capsys.readouterr().err


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json there is no progress."""
    with Meter("saving x", quiet=True) as meter:
        meter._next = 0.0
        meter.listen("memory", MIB, 2 * MIB)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar() -> None:
    """On a terminal there is a bar with sizes and rate, which is gone at the end."""
    code = f"""
import time
from chrek.cli.progress import Meter
with Meter("saving x") as meter:
    for done in range(10):
        meter.listen("memory", done * {MIB}, 10 * {MIB})
        time.sleep(0.05)
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment) as process:
        os.close(theirs)
        text = b""
        try:
            while data := os.read(ours, 4096):
                text += data
        except OSError:  # EIO: the other end is closed
            pass
        assert process.wait(60) == 0
    os.close(ours)
    assert b"saving x: memory" in text
    assert b"/10.5 MB" in text or b"/10.0 MiB" in text
    assert b"/s" in text
