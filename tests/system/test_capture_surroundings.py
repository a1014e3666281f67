"""What lies around the application's tree: processes that are not its own, queues that outlive their files, users' namespaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chrek.errors import Reason, Refused
from chrek.store.layout import Store
from chrek.store.opening import open_checkpoint
from chrek.system import procfs
from chrek.system.initstate import application
from containers import Container, needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

BEAT = "\nprint('ready', flush=True)\nimport time\nwhile True: time.sleep(0.05); print('beat', flush=True)\n"
QUEUE = """
import ctypes, os
libc = ctypes.CDLL("librt.so.1", use_errno=True)
queue = libc.mq_open(b"/orders", os.O_CREAT | os.O_RDWR, 0o600, None)
assert queue >= 0, os.strerror(ctypes.get_errno())
assert libc.mq_send(queue, b"one", 3, 0) == 0
"""


def _python(code: str) -> list[str]:
    return [cycle.INIT, "--", "python3", "-c", code + BEAT]


OWN_USERS = """
import ctypes, os
if os.fork() == 0:
    assert ctypes.CDLL(None, use_errno=True).unshare(0x10000000) == 0, ctypes.get_errno()
    print('unshared', flush=True)
    import time
    time.sleep(1000)
"""


def _refused(source: Container, store: Store, reason: Reason) -> str:
    """Check that a capture is refused so and that the application runs on; return the message."""
    with pytest.raises(Refused) as caught:
        cycle.capture(source, store)
    assert caught.value.reason is reason, caught.value
    assert not (Path(store.path) / "one").exists()
    before = source.log.count("beat")
    source.until(lambda: source.log.count("beat") > before + 1, what="the application to go on")
    return caught.value.message


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_posix_message_queue(container: Make, store: Store, closed: bool) -> None:
    """A message queue is refused, whether a process has it open or its messages only wait for one that will."""
    source = cycle.start(container, _python(QUEUE + ("libc.mq_close(queue)" if closed else "")))
    assert "1 POSIX message queues" in _refused(source, store, Reason.SYSV_IPC_IN_USE)


def _in_user_namespace(config: dict[str, Any]) -> None:
    """Give a container users of its own, numbered as those of this machine are."""
    config["linux"]["namespaces"].append({"type": "user"})
    same = [{"containerID": 0, "hostID": 0, "size": 65536}]
    config["linux"] |= {"uidMappings": same, "gidMappings": same}


def test_container_with_users_of_its_own(container: Make, store: Store) -> None:
    """A container in a user namespace of its own is neither captured nor restored into."""
    source = cycle.start(container, _python(""), edit=_in_user_namespace)
    _refused(source, store, Reason.USER_NAMESPACE)
    source = cycle.start(container, _python(""))
    cycle.capture(source, store)
    copy = cycle.waiting(container, _python(""), edit=_in_user_namespace)
    with pytest.raises(Refused) as caught:
        cycle.restore(copy, store)
    assert caught.value.reason is Reason.USER_NAMESPACE, caught.value
    copy.wait_for("chrek: start=cold reason=USER_NAMESPACE")


def test_process_with_users_of_its_own(container: Make, store: Store) -> None:
    """A child that went to a user namespace, as some sandboxes do, is named."""
    source = cycle.start(container, _python(OWN_USERS))
    source.wait_for("unshared")
    assert "(python3)" in _refused(source, store, Reason.USER_NAMESPACE)


def test_orphans_of_probes(container: Make, store: Store) -> None:
    """What an exec probe has left behind belongs to PID 1: it is not captured, is not stopped, and hinders nothing."""
    source = cycle.start(container, cycle.app("beat"))
    source.exec(["sh", "-c", "sleep 1000 > /dev/null 2>&1 &"])
    source.until(lambda: len(source.children()) == 2, what="the orphan to be PID 1's")
    (orphan,) = [pid for pid in source.children() if pid != application(source.pid1)]
    cycle.capture(source, store)
    assert procfs.status(orphan) is not None
    with open_checkpoint(store, "one") as checkpoint:
        commands = [process.command for process in checkpoint.manifest.application.processes]
    assert len(commands) == 1
    assert "sleep" not in commands[0]
    source.delete()
    copy = cycle.waiting(container, cycle.app("beat"))
    cycle.restore(copy, store)
    copy.wait_for("ok restored")
    copy.exec(["sh", "-c", "sleep 1000 > /dev/null 2>&1 &"])
    copy.until(lambda: len(copy.children()) == 2, what="the orphan to be PID 1's")
    cycle.capture(copy, store, "two")
