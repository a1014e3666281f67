"""Waiting for a restore and taking the restored tree over: the init's side of `chrek.system.mailbox`.

One loop over signals, letters and a deadline, in one of the modes ``waiting``, ``claimed``, ``accepted``;
it ends in one of three ways: a tree to supervise, a reason to start cold, or a signal that ends the
container. Signals that end a container (`ENDING`) do so at once while there is no application; all
others are kept and handed to the restored one, which has its handlers in place; a cold start drops
them, as the kernel drops them for a PID 1 without handlers.
"""

from __future__ import annotations

import contextlib
import os
import select
import time

from chrek.entrypoint.letterbox import Letter, Letterbox
from chrek.entrypoint.signals import ENDING, SIGCHLD, Signal, read_signals
from chrek.entrypoint.supervise import WALL, exit_code
from chrek.errors import Reason
from chrek.system.initpublish import HEARTBEAT_LIMIT
from chrek.system.record import record

TYPE_CHECKING = False  # see chrek.system.ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from chrek.entrypoint.report import Report

ADOPTION_LIMIT = 5.0
"""Seconds between ``restored`` and CRIU's end, which makes the tree a child of the init; normally milliseconds."""
_LOG_MAX = 64 << 20


@record
class Restored:
    """The tree's root is a child of this process; `status` is its wait status if it has ended already."""

    root: int
    token: str
    status: int | None
    kept: tuple[Signal, ...]


@record
class Failed:
    """No restore came of it. `touched`: somebody had the claim, so processes and files may be left."""

    reason: Reason
    message: str
    touched: bool


@record
class Ended:
    """A signal ends the container."""

    signal: int
    touched: bool


class Handover:
    """One wait for a restore.

    `show` publishes a mode with the claim's token and the seconds it may last.
    """

    def __init__(
        self, *, signals: int, letters: Letterbox, show: Callable[[str, str, float | None], None], report: Report
    ) -> None:
        self._signals = signals
        self._letters = letters
        self._show = show
        self._report = report
        self._mode = "waiting"
        self._token = ""
        self._root = 0
        self._logged = False
        self._root_status: int | None = None
        self._kept: list[Signal] = []
        self._ended: dict[int, int] = {}
        self._poll = select.poll()
        self._poll.register(signals, select.POLLIN)
        self._poll.register(letters.reading, select.POLLIN)

    def wait(
        self, seconds: float, timed_out: tuple[Reason, str], *, engine: int = 0, until: Callable[[], bool] | None = None
    ) -> Restored | Failed | Ended | None:
        """Wait for a restore to be claimed within `seconds`, and for its end.

        `engine` is a child of ours that is to do it. `until` is asked four times a second while nobody has
        the claim; None is returned once it says yes.
        """
        self._set(self._mode, seconds)
        while True:
            ending = self._take_signals()
            if ending:
                return Ended(signal=ending, touched=self._touched)
            outcome = self._take_letters()
            if outcome is not None:
                return outcome
            if self._mode == "waiting":
                if engine in self._ended:
                    how = exit_code(self._ended[engine])
                    return self._failed(Reason.RESTORE_FAILED, f"The restoring program ended with code {how}.")
                if until is not None and until():
                    return None
            left = self._deadline - time.monotonic()
            if left <= 0:
                return self._too_late(timed_out)
            if until is not None and self._mode == "waiting":
                left = min(left, 0.25)
            self._poll.poll(left * 1000)

    @property
    def _touched(self) -> bool:
        return self._mode != "waiting"

    def _set(self, mode: str, seconds: float) -> None:
        self._mode = mode
        self._deadline = time.monotonic() + seconds
        self._show(mode, self._token, seconds)

    def _failed(self, reason: Reason, message: str) -> Failed:
        return Failed(reason=reason, message=message, touched=self._touched)

    def _too_late(self, timed_out: tuple[Reason, str]) -> Failed:
        if self._mode == "waiting":
            return self._failed(*timed_out)
        return self._failed(Reason.TIMEOUT, f"The restoring program has not been heard of for {HEARTBEAT_LIMIT:g} s.")

    def _take_signals(self) -> int:
        """Reap and keep; return the number of a signal that ends the container, or 0."""
        for signal in read_signals(self._signals):
            if signal.number in ENDING:
                return signal.number
            if not (signal.number == SIGCHLD and signal.of_kernel):
                self._kept.append(signal)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | WALL)
            except ChildProcessError:
                return 0
            if pid == 0:
                return 0
            self._ended[pid] = status
            if pid == self._root:
                self._root_status = status

    def _take_letters(self) -> Restored | Failed | Ended | None:
        letters, ended = self._letters.read()
        for letter in letters:
            outcome = self._take(letter)
            if outcome is not None:
                return outcome
        if ended:
            return self._failed(Reason.RESTORE_FAILED, "The restoring program ended before it was done.")
        return None

    def _take(self, letter: Letter) -> Restored | Failed | Ended | None:
        if letter.kind == "claim" and self._mode == "waiting":
            self._token = letter.token
            self._letters.grant()
            self._set("claimed", HEARTBEAT_LIMIT)
            self._report.debug(f"restore claimed by {letter.by}")
            return None
        if letter.token != self._token or not self._token:
            return None
        self._deadline = time.monotonic() + HEARTBEAT_LIMIT
        if letter.kind == "failed":
            return self._failed(letter.reason, letter.message)
        if letter.kind == "log":
            _append_log(letter.data, fresh=not self._logged)
            self._logged = True
        if letter.kind == "ready" and self._mode == "claimed" and letter.root:
            self._root = letter.root
            self._set("accepted", HEARTBEAT_LIMIT)
        if letter.kind == "restored" and self._mode == "accepted":
            if letter.root != self._root:
                return self._failed(Reason.RESTORE_FAILED, f"Process {letter.root} was restored, not {self._root}.")
            return self._adopt()
        return None

    def _adopt(self) -> Restored | Failed | Ended:
        """Wait until the root is our child, which it becomes when the process that restored it ends."""
        deadline = time.monotonic() + ADOPTION_LIMIT
        while True:
            ending = self._take_signals()
            if ending:
                return Ended(signal=ending, touched=True)
            parent = _parent(self._root)
            if parent == os.getpid() or self._root_status is not None:
                return Restored(root=self._root, token=self._token, status=self._root_status, kept=tuple(self._kept))
            left = deadline - time.monotonic()
            if parent is None or left <= 0:
                state = "is gone" if parent is None else f"is still a child of {parent}"
                return self._failed(Reason.RESTORE_FAILED, f"The restored process {self._root} {state}.")
            self._await_end(parent, left)

    def _await_end(self, pid: int, seconds: float) -> None:
        """Wait until a process has ended, or a signal has come."""
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            # Already gone, or outside this PID namespace, from where nothing can be waited for.
            poll.poll(min(seconds, 0.005) * 1000)
            return
        try:
            poll.register(descriptor, select.POLLIN)
            poll.poll(seconds * 1000)
        finally:
            os.close(descriptor)


def _parent(pid: int) -> int | None:
    """Return the parent of a process as its PID namespace shows it, 0 if outside; None if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return int(file.readall().rpartition(b")")[2].split()[1])
    except OSError:
        return None


def _append_log(data: bytes, *, fresh: bool, path: str = "/tmp/criu-restore.log") -> None:
    """Append to CRIU's log; nothing that another process planted there is followed, and no /tmp costs only the log."""
    if fresh:
        with contextlib.suppress(OSError):
            os.unlink(path)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError:
        return
    try:
        if os.fstat(descriptor).st_size < _LOG_MAX:
            os.write(descriptor, data)
    except OSError:
        return
    finally:
        os.close(descriptor)
