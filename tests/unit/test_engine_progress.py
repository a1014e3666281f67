"""Phases, deadlines and stop switches."""

from __future__ import annotations

import threading
import time

import pytest

from chrek.engine.progress import Progress
from chrek.errors import CaptureFailed, Reason


def test_phases_are_timed_in_order() -> None:
    """Each phase is told when it begins, and has its time when it ends; phases of one name add up."""
    told: list[tuple[str, int, int]] = []
    progress = Progress(listener=lambda *words: told.append(words))
    pause = threading.Event()
    for name in ("dump", "memory", "dump"):
        with progress.phase(name):
            pause.wait(0.01)
    assert told == [("dump", 0, 0), ("memory", 0, 0), ("dump", 0, 0)]
    assert list(progress.seconds) == ["dump", "memory"]
    assert progress.seconds["dump"] >= 0.02
    assert progress.seconds["memory"] >= 0.01


def test_a_phase_that_fails_has_its_time() -> None:
    """A phase that ends with an exception is timed all the same, and the exception comes out."""
    progress = Progress()
    with pytest.raises(KeyError), progress.phase("dump"):
        raise KeyError
    assert list(progress.seconds) == ["dump"]


def test_nested_phases() -> None:
    """A phase within another one is timed for itself; the order is that of the ends."""
    progress = Progress()
    with progress.phase("outer"), progress.phase("inner"):
        pass
    assert set(progress.seconds) == {"outer", "inner"}
    assert progress.seconds["outer"] >= progress.seconds["inner"]


def test_check() -> None:
    """Without a deadline or a switch nothing stops; the switch counts before the deadline."""
    progress = Progress()
    progress.check()
    progress.deadline = time.monotonic() + 1000
    progress.check()
    progress.deadline = time.monotonic() - 1
    with pytest.raises(CaptureFailed) as caught:
        progress.check()
    assert caught.value.reason is Reason.TIMEOUT
    progress.cancel.set()
    with pytest.raises(CaptureFailed) as caught:
        progress.check()
    assert caught.value.reason is Reason.CAPTURE_INTERRUPTED


def test_limits() -> None:
    """A step has the sequence's deadline, its workers, and tells what is done of what there is."""
    told: list[tuple[str, int, int]] = []
    progress = Progress(deadline=5.0, listener=lambda *words: told.append(words))
    limits = progress.limits("memory", 3, total=10)
    assert (limits.workers, limits.deadline) == (3, 5.0)
    assert limits.cancel is progress.cancel
    assert limits.progress is not None
    limits.progress(7)
    assert told == [("memory", 7, 10)]


@pytest.mark.parametrize("which", ["cancel", "stop", "both", "none"])
def test_either_switch(which: str) -> None:
    """A step with a second switch stops when one of the two is set, also later."""
    progress, stop = Progress(), threading.Event()
    limits = progress.limits("memory", stop=stop)
    assert limits.cancel is not None
    assert not limits.cancel.is_set()
    if which in {"cancel", "both"}:
        progress.cancel.set()
    if which in {"stop", "both"}:
        stop.set()
    assert limits.cancel.is_set() is (which != "none")
