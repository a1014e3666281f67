"""One driver call for many processes at once, with a deadline.

A driver call may hang: it waits for a thread inside the other process. Each call therefore runs on a
daemon thread of its own and the caller waits for all of them until the deadline. ctypes lets go of
Python's lock during the call, so threads are enough.

A call that is still out at the deadline cannot be taken back, and the process it acts on must not be
touched meanwhile. The caller gets the outcome "not back" and may leave an action that the call's own
thread does if the call returns after all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from chrek.system.ids import HostPid

Action = Callable[[HostPid], int]


@dataclass(frozen=True)
class Outcome:
    """What became of one call: the driver's code, or None if it was not back at the deadline."""

    pid: HostPid
    code: int | None
    seconds: float


@dataclass
class _Job:
    """A call under way; `guard` decides between "in time" and "late"."""

    pid: HostPid
    guard: threading.Lock = field(default_factory=threading.Lock)
    done: threading.Event = field(default_factory=threading.Event)
    abandoned: bool = False
    code: int | None = None
    error: BaseException | None = None
    seconds: float = 0.0


def everywhere(
    action: Action,
    pids: Iterable[HostPid],
    *,
    seconds: float,
    late: Callable[[HostPid], None] | None = None,
) -> tuple[Outcome, ...]:
    """Run `action` for every process at once; wait at most `seconds` for all of them.

    `late` runs on the call's own thread if the call returns after the deadline. What `action` itself
    raises is raised here, once all calls are back or given up.
    """
    jobs = [_Job(pid) for pid in pids]
    for job in jobs:
        threading.Thread(target=_run, args=(job, action, late), name=f"chrek-cuda-{job.pid}", daemon=True).start()
    end = time.monotonic() + seconds
    for job in jobs:
        job.done.wait(max(0.0, end - time.monotonic()))
    outcomes = tuple(_settle(job, seconds) for job in jobs)
    for job in jobs:
        if job.error is not None and not job.abandoned:
            raise job.error
    return outcomes


def _run(job: _Job, action: Action, late: Callable[[HostPid], None] | None) -> None:
    start = time.monotonic()
    code: int | None = None
    error: BaseException | None = None
    try:
        code = action(job.pid)
    except BaseException as caught:  # noqa: BLE001 - handed to the waiting thread
        error = caught
    with job.guard:
        job.code, job.error, job.seconds = code, error, time.monotonic() - start
        abandoned = job.abandoned
        job.done.set()
    if abandoned and late is not None:
        late(job.pid)


def _settle(job: _Job, seconds: float) -> Outcome:
    with job.guard:
        if not job.done.is_set():
            job.abandoned = True
            return Outcome(job.pid, None, seconds)
        return Outcome(job.pid, job.code, job.seconds)
