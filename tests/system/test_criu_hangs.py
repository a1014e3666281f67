"""A CRIU that does not move any more: neither an application nor a container waits for it for ever."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from chrek.criu import process
from chrek.criu.process import Settings
from chrek.engine import capture as capturing
from chrek.engine import restore as restoring
from chrek.engine.progress import Progress
from chrek.errors import CaptureFailed, Reason, RestoreFailed
from chrek.store.layout import Store
from chrek.system import procfs
from chrek.system.ids import HostPid
from chrek.system.initstate import application
from chrek.system.mailbox import Mailbox
from containers import needs
from system import cycle
from system.cycle import Make

pytestmark = [needs("containers", "criu"), pytest.mark.timeout(120)]


def _criu() -> list[HostPid]:
    """CRIU processes that this test's process has started."""
    return [pid for pid in procfs.tree(HostPid(os.getpid())) if procfs.command_line(pid)[:1] == ("ld.so",)]


def _stop_criu() -> None:
    for pid in _criu():
        os.kill(pid, signal.SIGSTOP)


def test_capture(container: Make, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the deadline and a period of grace it is killed; the application runs on, and the next capture works."""
    monkeypatch.setattr(process, "DUMP_GRACE", 0.5)
    source = cycle.start(container, cycle.app("beat"))
    cancel = threading.Event()

    def listener(phase: str, done: int, _: int) -> None:
        if phase == "frozen" and not done:
            _stop_criu()
            cancel.set()

    request = capturing.Request(pid1=source.pid1, store=store, checkpoint_id="one", settings=Settings(timeout=1))
    with pytest.raises(CaptureFailed) as caught:
        capturing.capture(request, Progress(cancel=cancel, listener=listener))
    assert caught.value.reason is Reason.CAPTURE_INTERRUPTED
    assert _criu() == []
    before = source.log.count("beat")
    source.until(lambda: source.log.count("beat") > before + 1, what="the application to go on")
    cycle.capture(source, store)


def test_restore(container: Make, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the deadline and a period of grace it is killed with all that it has half restored; the start is cold."""
    monkeypatch.setattr(process, "RESTORE_GRACE", 0.5)
    source = cycle.start(container, cycle.app("queue"))
    cycle.capture(source, store)
    source.delete()
    copy = cycle.waiting(container, cycle.app("beat"))

    def listener(phase: str, done: int, _: int) -> None:
        if phase == "fill" and not done:
            _stop_criu()

    with Mailbox.claim(copy.pid1, by="test") as mailbox:
        request = restoring.Request(
            pid1=copy.pid1, mailbox=mailbox, store=store, checkpoint_id="one", settings=Settings(timeout=1)
        )
        with pytest.raises(RestoreFailed) as caught:
            restoring.restore(request, Progress(listener=listener))
        mailbox.failed(caught.value.reason, caught.value.message)
    assert caught.value.reason is Reason.TIMEOUT
    copy.wait_for("chrek: start=cold reason=TIMEOUT")
    copy.wait_for("beat")
    assert procfs.members("pid", copy.pid1) == [copy.pid1, application(copy.pid1)]
    assert _criu() == []
