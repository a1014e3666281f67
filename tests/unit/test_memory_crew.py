"""Threads that stop together."""

from __future__ import annotations

import threading
import time

import pytest

from chrek.errors import CaptureFailed, Reason
from chrek.memory.crew import Crew, Limits, Stopped


def crew(limits: Limits | None = None) -> Crew:
    """Return a crew whose failures are a capture's."""
    return Crew(limits or Limits(), failure=CaptureFailed, interrupted=Reason.CAPTURE_INTERRUPTED)


def test_one_error_stops_all() -> None:
    """The first error ends every thread at its next block, and is the one that is raised."""
    team = crew()
    turn = threading.Lock()
    taken: list[int] = []

    def body() -> None:
        with turn:
            taken.append(1)
            mine = len(taken)
        if mine == 1:
            raise ValueError("first")
        while True:
            team.check()

    with pytest.raises(ValueError, match="first"):
        team.run(8, body)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("chrek-")]


def test_cancel_and_deadline_have_their_reasons() -> None:
    """A request and a deadline that passed end the work with their own codes."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(CaptureFailed) as cancelled:
        crew(Limits(cancel=stop)).check()
    assert cancelled.value.reason is Reason.CAPTURE_INTERRUPTED
    with pytest.raises(CaptureFailed) as late:
        crew(Limits(deadline=time.monotonic() - 1)).check()
    assert late.value.reason is Reason.TIMEOUT


def test_progress_counts_up_to_all() -> None:
    """Progress rises, is reported by one thread at a time, and ends at the sum."""
    seen: list[int] = []
    team = crew(Limits(progress=seen.append))

    def body() -> None:
        for _ in range(100):
            team.advance(10)

    team.run(4, body)
    assert seen == list(range(10, 4010, 10))
    assert team.done == 4000


def test_a_progress_that_raises_ends_the_work() -> None:
    """An error in the caller's progress function comes back to the caller."""

    def progress(_done: int) -> None:
        raise RuntimeError("no terminal")

    team = crew(Limits(progress=progress))
    with pytest.raises(RuntimeError, match="no terminal"):
        team.run(3, lambda: team.advance(1))


def test_stopped_says_nothing() -> None:
    """A thread that stopped because of another one adds no error of its own."""

    def body() -> None:
        raise Stopped

    crew().run(2, body)
