"""A GPU application's life on this machine's own root: started, captured from outside, restored, asked for answers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from chrek.engine import capture as capturing
from chrek.engine import restore as restoring
from chrek.errors import ChrekError
from chrek.store.layout import Store
from chrek.system.mailbox import Mailbox
from system.cycle import mode
from system.pidns import INIT, Contained

ANSWERING = Path(__file__).with_name("answering.py")
ID = "gpu"


def command(gigabytes: float, *words: str) -> list[str]:
    """Return the command of a model of that size under the init."""
    return [*INIT, sys.executable, str(ANSWERING), str(gigabytes), *words]


def cold(place: Path) -> dict[str, str]:
    """Return an environment without checkpoints, whose marker is the test's own."""
    return {**os.environ, "DYN_RESTORE_MARKER_FILE": str(place / "restored")}


def contract(place: Path, store: Store) -> dict[str, str]:
    """Return the environment of a container that is to be checkpointed."""
    return {
        **cold(place),
        "DYN_CHECKPOINT_HASH": ID,
        "DYN_CHECKPOINT_LOCATION": f"{store.path}/{ID}",
        "DYN_CHECKPOINT_STORAGE_TYPE": "pvc",
        "DYN_CHECKPOINT_SIGNAL_FILE": str(place / "signal"),
        "DYN_CHECKPOINT_READY_FILE": str(place / "ready"),
    }


def to_restore(place: Path) -> dict[str, str]:
    """Return the environment of a container that waits for somebody outside."""
    return {**cold(place), "DYN_CHECKPOINT_HASH": ID, "CHREK_AGENT_TIMEOUT": "60"}


def until(happened: Callable[[], bool], *, seconds: float = 60, what: str = "what was waited for") -> None:
    """Wait for something that gives no event."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def answers(process: Contained, count: int = 3) -> set[str]:
    """Return the digests of the next answers that are computed from now on."""
    since = time.time()
    found: list[str] = []
    while len(found) < count:
        words = process.line().split()
        assert words, process.stderr()
        if words[0] == "answer" and float(words[3]) >= since:
            found.append(words[2])
    return set(found)


def capture(process: Contained, store: Store) -> capturing.Outcome:
    """Capture from outside."""
    outcome = capturing.capture(capturing.Request(pid1=process.pid, store=store, checkpoint_id=ID))
    print("capture", round(outcome.seconds, 3), rounded(outcome.phases))  # noqa: T201 - figures for the log
    return outcome


def restore(process: Contained, store: Store) -> restoring.Outcome:
    """Restore from outside into a waiting init, telling it when that fails."""
    until(lambda: mode(process.pid) == "waiting", what="the init to wait")
    with Mailbox.claim(process.pid, by="test") as mailbox:
        request = restoring.Request(pid1=process.pid, mailbox=mailbox, store=store, checkpoint_id=ID)
        try:
            outcome = restoring.restore(request)
        except ChrekError as error:
            mailbox.failed(error.reason, error.message)
            raise
    print("restore", round(outcome.seconds, 3), rounded(outcome.phases))  # noqa: T201 - figures for the log
    return outcome


def rounded(phases: object) -> dict[str, float]:
    """Return the seconds of phases, short enough to read."""
    assert isinstance(phases, dict)
    return {name: round(seconds, 3) for name, seconds in phases.items()}
