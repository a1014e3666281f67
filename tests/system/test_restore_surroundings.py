"""What a restore finds around it: processes with the ids it needs, files of other pods, a readiness probe that waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chrek.engine import restore as restoring
from chrek.errors import Reason, RestoreFailed
from chrek.store.layout import Store
from chrek.store.opening import open_checkpoint
from chrek.system import procfs
from containers import Container, Mount, needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

RESTORER = Path(__file__).with_name("restorer.py")
# A tree with a process whose id is beyond those that starting a container and entering it use up.
WIDE = """
import os, time
for _ in range(40):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
if os.fork() == 0:
    time.sleep(1000)
print("ready", flush=True)
while not os.path.exists("/tmp/dynamo-restored"):
    time.sleep(0.02)
print("goes on", flush=True)
time.sleep(1000)
"""
# The guide's sample.
JOB = """
import os, time
signal_file, marker = os.environ["DYN_CHECKPOINT_SIGNAL_FILE"], "/tmp/dynamo-restored"
open(os.environ["DYN_CHECKPOINT_READY_FILE"], "w").write("ready")
print("ready", flush=True)
while True:
    if os.path.exists(marker):
        print("goes on", flush=True)
        time.sleep(1000)
    if os.path.exists(signal_file):
        raise SystemExit
    time.sleep(0.02)
"""


def _python(code: str) -> list[str]:
    return [cycle.INIT, "--", "python3", "-c", code]


def _job(ready: str, signal_file: str) -> dict[str, str]:
    return {
        "DYN_CHECKPOINT_SIGNAL_FILE": signal_file,
        "DYN_CHECKPOINT_READY_FILE": ready,
        "DYN_CHECKPOINT_HASH": "one",
        "DYN_CHECKPOINT_LOCATION": "/checkpoints/one",
        "DYN_CHECKPOINT_STORAGE_TYPE": "pvc",
    }


@pytest.fixture
def wide(container: Make, store: Store) -> int:
    """Capture a tree; return the highest id in it."""
    source = cycle.start(container, _python(WIDE))
    cycle.capture(source, store)
    source.delete()
    with open_checkpoint(store, "one") as checkpoint:
        return max(process.pid for process in checkpoint.manifest.application.processes)


def _occupied(container: Make, pid: int, seconds: str) -> Container:
    """Start a container that waits for a restore, with a process in it that has this id."""
    copy = cycle.waiting(container, _python(WIDE))
    copy.exec(["sh", "-c", f"for i in $(seq {pid}); do sleep {seconds} & done > /dev/null 2>&1"])
    states = [procfs.status(member) for member in procfs.members("pid", copy.pid1)]
    assert pid in {state.ns_pid for state in states if state is not None}
    return copy


def test_process_that_has_the_id(container: Make, store: Store, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that keeps an id of the tree is named with it, and the container starts cold."""
    monkeypatch.setattr(restoring, "PID_WAIT", 0.2)
    copy = _occupied(container, wide, "1000")
    with pytest.raises(RestoreFailed) as caught:
        cycle.restore(copy, store)
    assert caught.value.reason is Reason.PID_IN_USE
    assert "(sleep)" in caught.value.message
    copy.wait_for("chrek: start=cold reason=PID_IN_USE")


def test_process_that_ends_meanwhile(container: Make, store: Store, wide: int) -> None:
    """An exec probe that happens to have such an id is waited for, and the tree is restored then."""
    copy = _occupied(container, wide, "0.5")
    cycle.restore(copy, store)
    copy.wait_for("goes on")


def test_what_criu_says(container: Make, store: Store) -> None:
    """Where CRIU itself fails (a limit of processes, here), its own words are in the container's log; all it wrote is in /tmp."""
    source = cycle.start(container, cycle.app("prefork"))
    cycle.capture(source, store)
    source.delete()
    copy = cycle.waiting(container, cycle.app("beat"), pids=8)
    with pytest.raises(RestoreFailed) as caught:
        cycle.restore(copy, store)
    assert caught.value.reason is Reason.RESTORE_FAILED
    copy.wait_for("chrek: start=cold reason=RESTORE_FAILED")
    assert "not restored: RESTORE_FAILED: CRIU could not restore the application: " in copy.err
    assert "Resource temporarily unavailable" in copy.err
    assert "Resource temporarily unavailable" in (copy.root / "tmp/criu-restore.log").read_text(errors="replace")
    copy.wait_for("beat")
    assert len(procfs.members("pid", copy.pid1)) == 2


def test_files_that_other_pods_share(container: Make, store: Store, tmp_path: Path) -> None:
    """Signal and ready files on a volume of the node are other pods' as well: a restore leaves them, the marker counts."""
    volume = Mount.bind(tmp_path, "/signals")
    environment = _job("/signals/ready", "/signals/done")
    source = cycle.start(container, _python(JOB), env=environment, mounts=[volume])
    cycle.capture(source, store)
    (tmp_path / "done").write_text("{}")
    assert source.wait() == 0
    copy = cycle.waiting(container, _python(JOB), mounts=[volume])
    cycle.restore(copy, store)
    copy.wait_for("goes on")
    assert (tmp_path / "done").read_text() == "{}"
    assert (tmp_path / "ready").read_text() == "ready"


@pytest.mark.parametrize("probed", [True, False])
def test_ready_file(container: Make, store: Store, probed: bool) -> None:
    """While the tree is restored it is absent; once the tree runs it is there again, if this container's own variable says so."""
    source = cycle.start(container, _python(JOB), env=_job("/tmp/ready", "/tmp/done"))
    cycle.capture(source, store)
    source.delete()
    environment = {"DYN_CHECKPOINT_READY_FILE": "/tmp/ready"} if probed else {}
    copy = cycle.waiting(container, _python(JOB), env=environment)
    argv = [sys.executable, str(RESTORER), str(copy.pid1), store.path, "one", "phase:fill"]
    with subprocess.Popen(argv, env={**os.environ, "SIGNAL": "SIGSTOP"}) as restorer:
        os.waitid(os.P_PID, restorer.pid, os.WSTOPPED | os.WNOWAIT)
        assert not (copy.root / "tmp/ready").exists()
        restorer.send_signal(signal.SIGCONT)
        assert restorer.wait(60) == 0
    copy.wait_for("goes on")
    assert (copy.root / "tmp/ready").exists() is probed
    if probed:
        assert (copy.root / "tmp/ready").read_text() == "ready"
