"""Restores in a process of its own that ends itself at a chosen step: ``restorer.py PID1 STORE ID STEP``.

STEP is ``phase:NAME`` (as the phase begins), ``answer:NAME`` (CRIU's notification, before it is answered) or
``letter:NAME`` (before that letter to the init is sent). ``SIGNAL`` in the environment names another
signal than SIGKILL; an empty STEP ends nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from chrek.criu.messages import Answer, Notification, Request
from chrek.criu.rpc import Client
from chrek.engine import restore
from chrek.engine.progress import Progress
from chrek.errors import ChrekError
from chrek.store.layout import Store
from chrek.system.ids import HostPid
from chrek.system.mailbox import Mailbox


def end() -> None:
    """Send this process its signal; with SIGKILL this is the last thing it does."""
    os.kill(os.getpid(), getattr(signal, os.environ.get("SIGNAL", "SIGKILL")))


def main(pid1: str, store: str, checkpoint_id: str, step: str) -> int:
    """Claim and restore; return the exit code of the program."""
    kind, _, name = step.partition(":")

    def listener(phase: str, done: int, total: int) -> None:
        if kind == "phase" and phase == name and not done:
            end()

    call, send = Client.call, Mailbox._send

    def watched(self: Client, request: Request, on_notification: Callable[[Notification], None]) -> Answer:
        def serve(notification: Notification) -> None:
            if kind == "answer" and notification.script == name:
                end()
            on_notification(notification)

        return call(self, request, serve)

    def sending(self: Mailbox, letter: str, **fields: object) -> None:
        if kind == "letter" and letter == name:
            end()
        send(self, letter, **fields)

    Client.call = watched  # type: ignore[method-assign]
    Mailbox._send = sending  # type: ignore[method-assign,assignment]
    init = HostPid(int(pid1))
    with Store.open(store) as opened, Mailbox.claim(init, by="restorer") as mailbox:
        request = restore.Request(pid1=init, mailbox=mailbox, store=opened, checkpoint_id=checkpoint_id)
        try:
            restore.restore(request, Progress(listener=listener))
        except ChrekError as error:
            mailbox.failed(error.reason, error.message)
            print(error, file=sys.stderr)  # noqa: T201 - a program
            return int(error.exit_code.value)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
