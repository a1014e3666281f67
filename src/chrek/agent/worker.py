"""One capture or restore in a process of its own.

The agent has threads and gRPC, and must live on whatever one operation runs into; so each runs here, in a fresh
process that imports the engine and nothing of the agent. One JSON object comes on standard input; JSON
lines go to standard output: ``{"phase": ...}`` while it works, in the end ``{"outcome": ...}`` or
``{"error": ...}``. SIGTERM, or the end of standard input (the agent is gone), makes a capture undo itself; a
restore goes on, since the container's init is already counting on it.

Run by path with ``python3 -I -S``: nothing of the environment decides what is imported.
"""

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

if not __package__:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from chrek.engine.progress import Progress
from chrek.errors import ChrekError, ExitCode, Reason, Refused
from chrek.system.ids import HostPid


def main() -> int:
    """Do what standard input asks for; return an exit code."""
    # Unbuffered: a thread that waits inside a buffered reader keeps the interpreter from ending.
    with open(0, "rb", buffering=0, closefd=False) as file:
        request = json.loads(file.readline())
    # What else prints must not come between the lines.
    lines = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def say(**what: object) -> None:
        # An agent that is gone reads nothing any more: a restore goes on without it, a capture hears of it otherwise.
        with suppress(BrokenPipeError):
            lines.write(json.dumps(what).encode() + b"\n")

    progress = _progress(request, say)
    try:
        say(outcome=_VERBS[request["verb"]](request, progress))
    except ChrekError as error:
        code = int(error.exit_code)
        say(error={"reason": error.reason.code, "message": error.message, "cure": error.cure, "code": code})
        return code
    return int(ExitCode.DONE)


def _progress(request: dict[str, Any], say: Any) -> Progress:  # noqa: ANN401 - a local function
    def tell(phase: str, done: int, total: int) -> None:
        if done == 0:
            say(phase=phase, total=total)

    progress = Progress(deadline=time.monotonic() + request["deadline"], listener=tell)

    def cancel(*_: object) -> None:
        progress.cancel.set()

    def until_the_agent_is_gone() -> None:
        while os.read(0, 4096):
            pass
        progress.cancel.set()

    if request["verb"] == "capture":
        signal.signal(signal.SIGTERM, cancel)
        threading.Thread(target=until_the_agent_is_gone, daemon=True).start()
    else:
        # A handler that does nothing, not SIG_IGN: that would be inherited, and CRIU ends its helpers by SIGTERM.
        signal.signal(signal.SIGTERM, lambda *_: None)
    return progress


def _capture(request: dict[str, Any], progress: Progress) -> dict[str, object]:
    from chrek.agent.liveness import check  # noqa: PLC0415 - what the other verb does not need
    from chrek.criu.process import Settings  # noqa: PLC0415
    from chrek.engine.capture import Request, capture  # noqa: PLC0415
    from chrek.store.layout import Store  # noqa: PLC0415

    allow = _allow(request)
    check(HostPid(request["pid1"]), request["liveness"], allow=allow)
    with Store.open(request["store"], create=True) as store:
        outcome = capture(
            Request(
                pid1=HostPid(request["pid1"]),
                store=store,
                checkpoint_id=request["id"],
                location=request["location"],
                allow=allow,
                settings=Settings(timeout=int(request["deadline"])),
                image=request["image"],
                namespace=request["namespace"],
                service_account=request["service_account"],
                extra=request["extra"],
                instead_of=request["instead_of"],
            ),
            progress,
        )
    return {
        "seconds": outcome.seconds,
        "frozen_seconds": outcome.frozen_seconds,
        "bytes": outcome.stored_bytes,
        "memory_bytes": outcome.memory_bytes,
        "phases": dict(outcome.phases),
        "warnings": list(outcome.warnings),
        "path": outcome.published.path,
    }


def _restore(request: dict[str, Any], progress: Progress) -> dict[str, object]:
    from chrek.system.mailbox import Mailbox  # noqa: PLC0415

    # First of all: the init waits.
    with Mailbox.claim(HostPid(request["pid1"]), by=request["by"]) as mailbox:
        try:
            return _restore_claimed(request, mailbox, progress)
        except ChrekError as error:
            mailbox.failed(error.reason, error.message)
            raise
        except BaseException as error:
            mailbox.failed(Reason.RESTORE_FAILED, f"The agent's worker has a fault: {error!r}.")
            raise


def _restore_claimed(request: dict[str, Any], mailbox: Any, progress: Progress) -> dict[str, object]:  # noqa: ANN401
    if request["refuse"]:
        reason, message = request["refuse"]
        raise Refused(Reason[reason], message)
    from chrek.criu.process import Settings  # noqa: PLC0415
    from chrek.engine.restore import Request, restore  # noqa: PLC0415
    from chrek.memory.fill import Verify  # noqa: PLC0415
    from chrek.store.layout import Store  # noqa: PLC0415

    with Store.open(request["store"]) as store:
        outcome = restore(
            Request(
                pid1=HostPid(request["pid1"]),
                mailbox=mailbox,
                store=store,
                checkpoint_id=request["id"],
                verify=Verify(request["verify"]),
                allow=_allow(request),
                settings=Settings(timeout=int(request["deadline"])),
            ),
            progress,
        )
    return {
        "seconds": outcome.seconds,
        "bytes": outcome.memory_bytes,
        "phases": dict(outcome.phases),
        "warnings": list(outcome.warnings),
    }


def _allow(request: dict[str, Any]) -> frozenset[Reason]:
    return frozenset(Reason[name] for name in request["allow"])


_VERBS = {"capture": _capture, "restore": _restore}

if __name__ == "__main__":
    sys.exit(main())
