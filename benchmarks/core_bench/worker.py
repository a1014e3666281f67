"""ChReK's side as one command: ``worker.py JSON`` does one engine call and prints what it knows of itself."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

PIPE_SLOT = 40
"""Bytes of kernel memory for one slot of a pipe (struct pipe_buffer)."""
_F_GETPIPE_SZ = 1032


def main() -> None:
    """Do what the argument says."""
    task = json.loads(sys.argv[1])
    result = (_capture if task["what"] == "capture" else _restore)(task)
    result["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["rss_helpers"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps(result))


def _capture(task: dict[str, Any]) -> dict[str, Any]:
    from chrek.engine import capture
    from chrek.engine.progress import Progress
    from chrek.store.layout import Store
    from chrek.system.ids import HostPid

    slots = 0

    def listen(phase: str, done: int, _total: int) -> None:
        nonlocal slots
        if task["count_pipes"] and phase == "memory" and not done:
            slots = _pipe_slots()

    with Store.open(task["store"], create=True) as store:
        request = capture.Request(
            pid1=HostPid(task["pid1"]), store=store, checkpoint_id=task["id"], mode=task["mode"]
        )
        outcome = capture.capture(request, Progress(listener=listen))
    return {
        "engine": outcome.seconds,
        "frozen": outcome.frozen_seconds,
        "phases": dict(outcome.phases),
        "stored": outcome.stored_bytes,
        "pipe_memory": slots * PIPE_SLOT,
    }


def _restore(task: dict[str, Any]) -> dict[str, Any]:
    from chrek.engine import restore
    from chrek.memory.fill import Verify
    from chrek.store.layout import Store
    from chrek.system.ids import HostPid
    from chrek.system.mailbox import Mailbox

    began = time.time_ns()
    pid1 = HostPid(task["pid1"])
    with Store.open(task["store"]) as store, Mailbox.claim(pid1, by="benchmark") as mailbox:
        request = restore.Request(
            pid1=pid1, mailbox=mailbox, store=store, checkpoint_id=task["id"], verify=Verify(task["verify"])
        )
        outcome = restore.restore(request)
    return {"began": began, "engine": outcome.seconds, "phases": dict(outcome.phases)}


def _pipe_slots() -> int:
    """Return the slots of all pipes that our descendants hold: CRIU's, at the moment when it has all pages."""
    from chrek.system import procfs
    from chrek.system.ids import HostPid

    sizes: dict[str, int] = {}
    for pid in procfs.tree(HostPid(os.getpid())):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                name = os.readlink(entry.path)
                if name.startswith("pipe:") and name not in sizes:
                    fd = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK)
                    sizes[name] = fcntl.fcntl(fd, _F_GETPIPE_SZ)
                    os.close(fd)
    return sum(sizes.values()) // 4096


if __name__ == "__main__":
    main()
