"""Phases of a sequence: how long each took, when to stop, and who wants to know."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from chrek.errors import CaptureFailed, Reason
from chrek.memory.crew import Limits

Listener = Callable[[str, int, int], None]
"""Called with a phase's name, bytes done and bytes in all (0 and 0 when a phase begins)."""


def _silent(phase: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass
class Progress:
    """Times the phases of one sequence and carries its deadline and its stop switch.

    Attributes:
        deadline: `time.monotonic` value after which steps give up, or None.
        cancel: set it, from a signal handler for instance, to make the sequence undo itself.
        seconds: what each finished phase took, in the order they began.
    """

    deadline: float | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    listener: Listener = _silent
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; phases of one name add up."""
        self.listener(name, 0, 0)
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def limits(
        self, phase: str, workers: int | None = None, stop: threading.Event | None = None, *, total: int = 0
    ) -> Limits:
        """Return these limits for a step that moves memory; *stop* is a second switch beside `cancel`."""
        return Limits(
            workers=workers,
            deadline=self.deadline,
            cancel=self.cancel if stop is None else _Either(self.cancel, stop),
            progress=lambda done: self.listener(phase, done, total),
        )

    def check(self) -> None:
        """Stop here if somebody wants that.

        Raises:
            CaptureFailed: ``CAPTURE_INTERRUPTED`` or ``TIMEOUT``.
        """
        if self.cancel.is_set():
            raise CaptureFailed(Reason.CAPTURE_INTERRUPTED, "The capture was told to stop.")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise CaptureFailed(Reason.TIMEOUT, "The capture took longer than its deadline.")


class _Either(threading.Event):
    """Counts as set when one of several events is; nobody waits on it."""

    def __init__(self, *events: threading.Event) -> None:
        super().__init__()
        self._events = events

    def is_set(self) -> bool:
        return any(event.is_set() for event in self._events)
