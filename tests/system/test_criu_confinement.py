"""Where CRIU runs, and what it can do there: looked at while it works, stopped in the middle of a capture and a restore."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chrek.criu.process import _NEVER
from chrek.store.layout import Store
from chrek.system import cgroups, procfs
from chrek.system.ids import HostPid
from chrek.system.initstate import application
from containers import Container, needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

HERE = Path(__file__).parent
LISTENS = "0A"
# What of the environment would lead CRIU's loader, its plugins or its log astray.
PLANTED = {
    "CRIU_LIBS_DIR": "/tmp/evil",
    "CRIU_CONFIG_FILE": "/tmp/evil.conf",
    "CUDA_PLUGIN_DIR": "/tmp/evil",
    "LD_PRELOAD": "/tmp/evil.so",
    "CRIU_WORK_DIR": "/var/tmp",
}


@contextmanager
def stopped(program: str, container: Container, store: Store, step: str) -> Iterator[tuple[HostPid, HostPid]]:
    """Stop a program of this folder at a step; yields its process and CRIU's; it goes on afterwards and ends well."""
    argv = [sys.executable, str(HERE / program), str(container.pid1), store.path, "one", step]
    with subprocess.Popen(argv, env={**os.environ, "SIGNAL": "SIGSTOP"}) as process:
        try:
            ended = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert ended is not None
            assert ended.si_code == os.CLD_STOPPED, ended
            inside = HostPid(process.pid)
            (criu,) = [pid for pid in procfs.tree(inside) if procfs.command_line(pid)[:1] == ("ld.so",)]
            yield inside, criu
        finally:
            process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0


def listeners(pid: HostPid) -> list[str]:
    """Local addresses of the sockets that listen in a process's network namespace."""
    lines = [
        line.split() for kind in ("tcp", "tcp6") for line in (procfs.read_text(pid, f"net/{kind}") or "").splitlines()
    ]
    return [fields[1] for fields in lines if fields[3] == LISTENS]


def confined(criu: HostPid) -> None:
    """Check that no image can make CRIU do what it never needs, and that nothing of a workload's tells it what to load."""
    state = procfs.status(criu)
    assert state is not None
    for kind in ("CapBnd", "CapPrm", "CapEff"):
        assert not any(state.capabilities[kind] >> number & 1 for number in _NEVER.values()), kind
    environment = procfs.environment(criu)
    assert environment is not None
    assert set(environment) <= {"PATH", "CRIU_LIBS_DIR"}, environment
    assert all(value.startswith("/proc/self/fd/") for value in environment.values()), environment


def test_capture(container: Make, store: Store) -> None:
    """CRIU is in control groups of its own and a session of its own, listens nowhere, and cannot do what it never needs."""
    source = cycle.start(container, cycle.app("beat"), env=PLANTED)
    before = listeners(source.pid1)
    with stopped("capturer.py", source, store, "phase:memory") as (capturer, criu):
        confined(criu)
        assert listeners(criu) == before
        assert os.getsid(criu) != os.getsid(capturer)
        mine, theirs, its = (cgroups.memberships(pid) for pid in (capturer, source.pid1, criu))
        assert its.keys() == mine.keys()
        # The one that limits and kills; a hierarchy without controllers may stay as it is.
        memory = next(name for name in its if "memory" in name or name == "")
        assert its[memory] not in (mine[memory], theirs[memory])
        assert "/chrek/capture-" in its[memory]
    assert not [pid for pid in procfs.members("pid", source.pid1) if procfs.command_line(pid)[:1] == ("ld.so",)]


def test_restore(container: Make, store: Store) -> None:
    """CRIU works inside the target's control groups, so the tree's first page is charged there; it has nothing to listen on."""
    source = cycle.start(container, cycle.app("queue"), env=PLANTED)
    cycle.capture(source, store)
    source.delete()
    copy = cycle.waiting(container, cycle.app("queue"), env=PLANTED)
    with stopped("restorer.py", copy, store, "phase:fill") as (restorer, criu):
        confined(criu)
        assert listeners(criu) == []
        assert cgroups.memberships(criu) == cgroups.memberships(copy.pid1)
        assert cgroups.memberships(criu) != cgroups.memberships(restorer)
        for pid in procfs.tree(criu):
            assert cgroups.memberships(pid) == cgroups.memberships(copy.pid1)
    copy.wait_for("ok restored")


HUNGRY = """
import os, time
data = bytearray(os.urandom(1 << 20)) * 40
print("ready", flush=True)
while not os.path.exists("/tmp/dynamo-restored"):
    time.sleep(0.02)
print("goes on", flush=True)
while not os.path.exists("/tmp/eat"):
    time.sleep(0.02)
more = []
while True:
    more.append(bytearray(os.urandom(1 << 20)))
"""
LIMIT = 128 << 20


def test_memory_is_the_containers(container: Make, store: Store) -> None:
    """Restored memory counts against the container's limit; past it the kernel ends that application and nobody else."""
    command = [cycle.INIT, "--", "python3", "-c", HUNGRY]
    source = cycle.start(container, command, memory=LIMIT)
    cycle.capture(source, store)
    source.delete()
    copy = cycle.waiting(container, command, memory=LIMIT)
    other = cycle.waiting(container, command, memory=LIMIT)
    before = cgroups.memory_used(copy.pid1)
    cycle.restore(copy, store)
    cycle.restore(other, store)
    copy.wait_for("goes on")
    assert cgroups.memory_used(copy.pid1) - before > 40 << 20
    copy.exec(["touch", "/tmp/eat"])
    assert copy.wait(60) == 128 + signal.SIGKILL
    other.wait_for("goes on")
    assert other.running
    assert len(procfs.tree(application(other.pid1))) == 1
