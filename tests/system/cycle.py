"""One application through its life: started cold, captured, killed, restored elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chrek.engine import capture as capturing
from chrek.engine import restore as restoring
from chrek.errors import ChrekError, Refused
from chrek.store.layout import Store
from chrek.system.ids import HostPid
from chrek.system.initstate import read_state
from chrek.system.mailbox import Mailbox
from containers import Container, Mount

APPS = Path(__file__).with_name("apps")
INIT = "/usr/local/bin/restore-entrypoint"

Make = Callable[..., Container]


def app(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a feature under the init."""
    return [INIT, "--", "python3", "/apps/run.py", name, *arguments]


def start(make: Make, command: Sequence[str], **options: Any) -> Container:
    """Start an application in a container and wait until it says that it is ready, and its init that it is there."""
    options["mounts"] = [*options.get("mounts", ()), Mount.bind(APPS, "/apps", read_only=True)]
    container = make(command, **options)
    container.wait_for("ready")
    if command[0] == INIT:
        container.until(lambda: mode(container.pid1) not in {"", "starting"}, what="the init to publish its application")
    return container


def capture(container: Container, store: Store, checkpoint_id: str = "one", **options: Any) -> capturing.Outcome:
    """Capture the container's application into the store."""
    request = capturing.Request(pid1=container.pid1, store=store, checkpoint_id=checkpoint_id, **options)
    return capturing.capture(request)


def waiting(make: Make, command: Sequence[str], checkpoint_id: str = "one", **options: Any) -> Container:
    """Start a container whose init waits for a restore from outside."""
    options["env"] = {"DYN_CHECKPOINT_HASH": checkpoint_id, **options.get("env", {})}
    options["mounts"] = [*options.get("mounts", ()), Mount.bind(APPS, "/apps", read_only=True)]
    container = make(command, **options)
    container.until(lambda: mode(container.pid1) == "waiting", what="the init to wait")
    return container


def mode(pid1: HostPid) -> str:
    """Return what an init has published; empty before it has."""
    try:
        return read_state(pid1).mode
    except Refused:
        return ""


def restore(container: Container, store: Store, checkpoint_id: str = "one", **options: Any) -> restoring.Outcome:
    """Restore into a waiting container, telling its init when that fails, as an agent does."""
    with Mailbox.claim(container.pid1, by="test") as mailbox:
        request = restoring.Request(
            pid1=container.pid1, mailbox=mailbox, store=store, checkpoint_id=checkpoint_id, **options
        )
        try:
            return restoring.restore(request)
        except ChrekError as error:
            mailbox.failed(error.reason, error.message)
            raise
