"""Captures in a process of its own that ends itself at a chosen step: ``capturer.py PID1 STORE ID STEP``.

STEP is ``phase:NAME`` (as the phase begins), ``after:NAME`` (as the next one begins) or ``answer:NAME``
(CRIU's notification, before it is answered). ``SIGNAL`` in the environment names another signal than
SIGKILL; empty STEP ends nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

from chrek.criu.messages import Answer, Notification, Request
from chrek.criu.rpc import Client
from chrek.engine import capture
from chrek.engine.progress import Progress
from chrek.errors import ChrekError
from chrek.store.layout import Store
from chrek.system.ids import HostPid


def end() -> None:
    """Send this process its signal; with SIGKILL this is the last thing it does."""
    os.kill(os.getpid(), getattr(signal, os.environ.get("SIGNAL", "SIGKILL")))


def main(pid1: str, store: str, checkpoint_id: str, step: str) -> int:
    """Capture; return the exit code of the program."""
    kind, _, name = step.partition(":")
    before = [""]
    cancel = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: cancel.set())

    def listener(phase: str, done: int, total: int) -> None:
        if (kind == "phase" and phase == name and not done) or (kind == "after" and before[0] == name != phase):
            end()
        before[0] = phase

    if kind == "answer":
        call = Client.call

        def watched(self: Client, request: Request, on_notification: Callable[[Notification], None]) -> Answer:
            def serve(notification: Notification) -> None:
                if notification.script == name:
                    end()
                on_notification(notification)

            return call(self, request, serve)

        Client.call = watched  # type: ignore[method-assign]
    with Store.open(store) as opened:
        request = capture.Request(pid1=HostPid(int(pid1)), store=opened, checkpoint_id=checkpoint_id)
        try:
            capture.capture(request, Progress(cancel=cancel, listener=listener))
        except ChrekError as error:
            print(error, file=sys.stderr)  # noqa: T201 - a program
            return int(error.exit_code.value)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
