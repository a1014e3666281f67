"""How a restore is handed over to a container's init: the restoring program's half.

The init answers by publishing states (`chrek.system.initpublish`); the other direction is a pipe of
the init's, the mailbox, opened through its ``/proc/PID/fd``. A letter is one JSON object on one line of
at most PIPE_BUF bytes, so letters of several writers never mix (pipe(7)).

The hand-over has two phases, because each side may give up or die at any moment and exactly one
application must come of it::

    restoring program                      init
                                           waiting                 until its deadline
    claim(token)            ───────────►
                            ◄───────────   claimed, claim=token    its end of the pipe now only reads
    alive, at most 10 s apart ─────────►                           deadline moves on
    (the tree stands, still stopped)
    ready(root)             ───────────►
                            ◄───────────   accepted, claim=token
    (the tree resumes, CRIU exits: the tree falls to the init)
    restored(root)          ───────────►   waits until root is its child
                            ◄───────────   restored, app=root

* Only ``accepted`` with its own token lets the restoring program resume the tree. An init that has
  given up has closed the pipe and published something else, so a late program learns it at the last
  moment before the tree would run, and ends it.
* The init gives up when it is told ``failed``, when the last writer closes the pipe (a program that
  was killed is noticed at once), when no letter comes for `HEARTBEAT_LIMIT` seconds, or when it is told
  to end. It then kills whatever is left of the tree and of CRIU, which are in its PID namespace, and
  that is also what decides after ``accepted``: an application that nobody has reported as
  ``restored`` is not left running half way.
* Whatever enters the container's PID namespace from outside must be waited for by its parent there: the
  kernel lets no PID 1 end while a process of its namespace is still a zombie
  (zap_pid_ns_processes() in kernel/pid_namespace.c).
* The first claim wins; letters with another token are not read. The init closes its own write end
  when it grants the claim, so nobody else can open the mailbox from then on.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import select
import stat
import threading
import time
from typing import TYPE_CHECKING, Self

from chrek.errors import Reason, Refused, RestoreFailed
from chrek.system.initpublish import HEARTBEAT_LIMIT, LETTER_MAX
from chrek.system.initstate import open_foreign, read_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chrek.system.ids import HostPid, NsPid
    from chrek.system.initpublish import InitState

__all__ = ["Mailbox"]

_ANSWER_SECONDS = 10.0
"""An init answers within milliseconds; a busy machine may take longer."""
_MESSAGE_MAX = 2000
_LOG_CHUNK = 2400


class Mailbox:
    """A granted claim on an init that waits for a restore."""

    def __init__(self, pid1: HostPid, pipe: int, token: str) -> None:
        """Use `claim` instead."""
        self._pid1 = pid1
        self._pipe = pipe
        self._token = token

    @classmethod
    def claim(cls, pid1: HostPid, *, by: str) -> Self:
        """Claim the restore that `pid1` waits for; `by` names the claimer in the container's log.

        Raise `Refused`: ``APP_NOT_FOUND`` if it is no init, ``CLAIM_LOST`` if it does not wait (any more)
        or somebody else was first.
        """
        state = read_state(pid1)
        if state.mode != "waiting" or state.mailbox is None:
            raise _lost(pid1, state)
        pipe = open_foreign(pid1, state.mailbox, device=_pipe_device(), kind=stat.S_IFIFO, flags=os.O_WRONLY)
        if pipe is None:
            raise _lost(pid1, state)
        mailbox = cls(pid1, pipe, secrets.token_hex(8))
        try:
            mailbox._send("claim", by=by[:200])
            mailbox._await_state("claimed", lambda found: found.mode == "waiting")
        except RestoreFailed as error:
            mailbox.close()
            raise Refused(error.reason, error.message) from error
        except BaseException:
            mailbox.close()
            raise
        return mailbox

    def alive(self) -> None:
        """Say that the restore goes on; due at least every `HEARTBEAT_LIMIT` seconds.

        Raise `RestoreFailed` with ``CLAIM_LOST`` when the init has given up.
        """
        self._send("alive")

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Send heartbeats from a thread meanwhile; fork before it, and bound the work by a deadline of its own."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_LIMIT / 4):
                try:
                    self.alive()
                except RestoreFailed:
                    return  # the next letter of the restore itself says so

        thread = threading.Thread(target=beat, name="chrek-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def ready(self, root: NsPid) -> None:
        """Ask, at the last moment before the tree resumes, whether the init takes it; return if it does.

        `root` is the tree's root. Raise `RestoreFailed` with ``CLAIM_LOST`` if not: the tree must be killed.
        """
        self._send("ready", root=root)
        self._await_state("accepted", lambda found: found.mode == "claimed" and found.claim == self._token)

    def restored(self, root: NsPid) -> None:
        """Say that the tree runs; return once the init has taken it over as its application.

        Raise `RestoreFailed` with ``CLAIM_LOST`` if it did not: it has killed the tree.
        """
        self._send("restored", root=root)
        self._await_state("restored", lambda found: found.mode == "accepted" and found.claim == self._token)

    def failed(self, reason: Reason, message: str) -> None:
        """Say that the restore failed and what it changed has been undone; an init that is gone is no error."""
        with contextlib.suppress(RestoreFailed):
            self._send("failed", reason=reason.code, message=message[:_MESSAGE_MAX])

    def log(self, text: bytes) -> None:
        """Append to ``/tmp/criu-restore.log``, which the init writes with its own rights in its own files."""
        for start in range(0, len(text), _LOG_CHUNK):
            chunk = base64.b64encode(text[start : start + _LOG_CHUNK]).decode()
            self._send("log", data=chunk)

    def close(self) -> None:
        """Close the mailbox; before ``restored`` the init takes this for the end of the restore."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, kind: str, **fields: object) -> None:
        line = json.dumps({"kind": kind, "token": self._token, **fields}).encode() + b"\n"
        if len(line) > LETTER_MAX:
            raise ValueError(f"letter of {len(line)} bytes, more than {LETTER_MAX}")
        deadline = time.monotonic() + _ANSWER_SECONDS
        while True:
            try:
                os.write(self._pipe, line)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RestoreFailed(
                        Reason.CLAIM_LOST, f"The init {self._pid1} has not read its mailbox for {_ANSWER_SECONDS:g} s."
                    ) from None
                _until_writable(self._pipe)
            except BrokenPipeError as error:
                raise RestoreFailed(
                    Reason.CLAIM_LOST, f"The init {self._pid1} has given the restore up, or has ended."
                ) from error

    def _await_state(self, mode: str, undecided: Callable[[InitState], bool]) -> None:
        """Wait until the init has published `mode` for our token; raise when it can no longer come."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        pause = 0.0005
        while True:
            try:
                state = read_state(self._pid1)
            except Refused as error:
                raise RestoreFailed(Reason.CLAIM_LOST, f"The init {self._pid1} has ended.") from error
            if state.mode == mode and state.claim == self._token:
                return
            if not undecided(state) or time.monotonic() > deadline:
                raise RestoreFailed(
                    Reason.CLAIM_LOST, f"The init {self._pid1} answered {state.mode!r} where {mode!r} was due."
                )
            time.sleep(pause)  # a replaced descriptor of another process gives no event
            pause = min(pause * 1.5, 0.02)


def _until_writable(pipe: int) -> None:
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    poll.poll(1000)


def _pipe_device() -> int:
    """Return the device number of pipefs, on which every pipe of the machine lies."""
    reading, writing = os.pipe()
    try:
        return os.fstat(reading).st_dev
    finally:
        os.close(reading)
        os.close(writing)


def _lost(pid1: HostPid, state: InitState) -> Refused:
    return Refused(Reason.CLAIM_LOST, f"The init {pid1} does not wait for a restore (mode {state.mode}).")
