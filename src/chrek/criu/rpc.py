"""Speak to one CRIU process over its RPC socket.

CRIU started as ``criu swrk FD`` serves one request on a SOCK_SEQPACKET socket. While it works it sends
notifications and waits for the answer to each: these are the moments at which ChReK does its own part,
with the process tree frozen.

Odd facts, all from real runs of 4.1.1 and 4.2.1:

- A false answer, or a client that dies, at ``post-dump`` makes CRIU roll back: the tree runs on. At
  ``post-restore`` it makes CRIU kill the half-restored tree. At ``pre-resume`` it is only logged.
- ``cr_errmsg`` is the first error that was logged, not the one that ended the run: read the log's tail.
- ``images_dir_fd`` is looked up in the client's /proc entry as CRIU sees it, where a client outside
  the PID namespace does not exist: pass ``images_dir`` as ``/proc/self/fd/N`` and -1 instead.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from chrek.criu.messages import Answer, Notification, Request, RequestType
from chrek.system.protobuf import WireError

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_MESSAGE = 1 << 16
_CHECK_SECONDS = 0.2


class CriuGone(Exception):
    """CRIU closed the socket or said something that is no answer."""


class Client:
    """One request to one CRIU process.

    Args:
        channel: our end of the socket pair, owned by the client from now on.
        deadline: `time.monotonic` value after which waiting ends, or None.
        check: called a few times a second while waiting; what it raises ends the call.
    """

    def __init__(
        self, channel: socket.socket, *, deadline: float | None = None, check: Callable[[], None] | None = None
    ) -> None:
        self._channel = channel
        self._deadline = deadline
        self._check = check
        channel.settimeout(_CHECK_SECONDS)

    def close(self) -> None:
        """Hang up; CRIU takes that as the client's death."""
        self._channel.close()

    def call(self, request: Request, on_notification: Callable[[Notification], None]) -> Answer:
        """Send *request*, hand every notification on, and return the final answer.

        *on_notification* says no by raising: CRIU is told so, and once it has undone its part the
        exception is raised here.

        Raises:
            CriuGone: it died or hung up.
            TimeoutError: the deadline passed; hang up to make CRIU roll back.
        """
        self._send(request)
        refusal: BaseException | None = None
        try:
            while True:
                answer = self._receive()
                if answer.type != RequestType.NOTIFY:
                    break
                if refusal is None:
                    try:
                        on_notification(answer.notify or Notification())
                    except BaseException as error:  # noqa: BLE001 - raised again once CRIU has rolled back
                        refusal = error
                self._send(Request(type=RequestType.NOTIFY, notify_success=refusal is None))
        except (CriuGone, TimeoutError) as error:
            if refusal is not None:
                raise refusal from error
            raise
        if refusal is not None:
            raise refusal
        return answer

    def _send(self, request: Request) -> None:
        try:
            self._channel.send(request.encode())
        except OSError as error:
            raise CriuGone(f"CRIU no longer listens: {error}") from error

    def _receive(self) -> Answer:
        data = self._wait()
        if not data:
            raise CriuGone("CRIU ended without an answer")
        try:
            return Answer.decode(data)
        except WireError as error:
            raise CriuGone(f"CRIU's answer makes no sense: {error}") from error

    def _wait(self) -> bytes:
        while True:
            try:
                return self._channel.recv(_MAX_MESSAGE)
            except TimeoutError:
                if self._deadline is not None and time.monotonic() > self._deadline:
                    raise TimeoutError("CRIU took longer than its deadline") from None
                if self._check is not None:
                    self._check()
            except OSError as error:
                raise CriuGone(f"CRIU's socket failed: {error}") from error
