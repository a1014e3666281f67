"""How far a capture, a restore or a verification has come, on standard error.

On a terminal: one bar with rate and time left. Elsewhere (a log, a pipe): a plain line when a phase that moves
bytes has lasted a while, and then one every few seconds, so that short work writes nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

import click

from chrek.cli.output import seconds, size

if TYPE_CHECKING:
    from chrek.engine.progress import Listener

_QUIET_SECONDS = 2.0
_EVERY_SECONDS = 5.0


class Meter(AbstractContextManager["Meter"]):
    """Shows progress while its context lasts; `listen` may be called by any thread."""

    def __init__(self, what: str, *, quiet: bool = False, expected: int = 0) -> None:
        """Show the progress of *what*; *expected* is the number of bytes where the work does not say it itself."""
        self._what = what
        self._expected = expected
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._next = self._began + _QUIET_SECONDS
        self._bar: Any = None
        self._task: Any = None
        self._on = not quiet
        self._terminal = sys.stderr.isatty()

    @property
    def listener(self) -> Listener:
        """What the engine calls."""
        return self.listen

    def listen(self, phase: str, done: int, total: int) -> None:
        """Take bytes done and bytes in all (0: not known) of a phase."""
        if not self._on or not done:
            return
        with self._lock:
            if self._terminal:
                self._draw(phase, done, total or self._expected)
            elif time.monotonic() >= self._next:
                self._next = time.monotonic() + _EVERY_SECONDS
                click.echo(f"chrek: {self._what}: {self._line(phase, done, total or self._expected)}", err=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, phase: str, done: int, total: int) -> str:
        elapsed = max(time.monotonic() - self._began, 1e-3)
        rate = done / elapsed
        text = f"{phase} {size(done)}" + (f" of {size(total)}" if total else "") + f", {size(rate)}/s"
        return text + (f", {seconds(max(total - done, 0) / rate)} left" if total and rate else "")

    def _draw(self, phase: str, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            self._bar = Progress(
                "{task.description}",
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(f"{self._what}: {phase}", total=total or None)
        self._bar.update(self._task, completed=done, total=total or None, description=f"{self._what}: {phase}")
