"""The state that an init publishes, read by others; and everything a hostile process may put there."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from chrek.errors import Reason, Refused
from chrek.system import procfs
from chrek.system.ids import HostPid
from chrek.system.initpublish import SEALS
from chrek.system.initstate import application, find_inits, read_state
from chrekcli import until
from system.pidns import INIT, PYTHON, Contained

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a PID namespace")

APPLICATION = "import os; print(os.getpid(), flush=True); os.read(0, 1)"


def running(init: Contained) -> HostPid:
    """Wait until the init has published its application."""
    while True:
        try:
            return application(init.pid)
        except Refused:
            assert init.outside.poll() is None, init.stderr()


@pytest.fixture
def pipe() -> Iterator[int]:
    """Give a standard input that stays open."""
    reading, writing = os.pipe()
    yield reading
    os.close(reading)
    os.close(writing)


def test_the_application_is_found(pipe: int) -> None:
    """Published state, list of inits and the application's id agree with /proc."""
    with Contained((*INIT, *PYTHON, "-c", APPLICATION), stdin=pipe) as init:
        inside = int(init.line())
        app = running(init)
        assert init.pid in find_inits()
        assert app not in find_inits()
        state = read_state(init.pid)
        assert (state.mode, state.init.pid, state.mailbox) == ("cold", 1, None)
        assert state.app is not None
        assert state.app.pid == inside
        assert f"NSpid:\t{app}\t{inside}\n" in Path(f"/proc/{app}/status").read_text()


def test_the_application_has_no_descriptor_of_the_init(pipe: int) -> None:
    """The state's memfd stays with the init."""
    with Contained((*INIT, *PYTHON, "-c", APPLICATION), stdin=pipe) as init:
        app = running(init)
        # Its loader and interpreter open files as they start.
        until(lambda: len(list(procfs.descriptors(app))) == 3, "no more than the standard streams")
        assert not [file for file in procfs.descriptors(app) if "chrek" in file.target]


def test_another_time_namespace_does_not_hide_the_application(pipe: int) -> None:
    """An init whose clocks are shifted by a day names an application that we, unshifted, still find."""
    command = ("unshare", "--time", "--boottime", "86400", "--fork", *INIT, *PYTHON, "-c", APPLICATION)
    with Contained(command, stdin=pipe) as outer:
        outer.line()
        (shifted,) = [pid for pid in _await_inits() if _ns(pid, "pid") == _ns(outer.pid, "pid")]
        state = read_state(shifted)
        app = application(shifted)
        assert state.app is not None
        seen = int(Path(f"/proc/{app}/stat").read_text().rpartition(")")[2].split()[19])
        assert state.app.start - seen > 86000 * os.sysconf("SC_CLK_TCK")


def test_an_application_in_a_time_namespace_of_its_own_is_found(pipe: int) -> None:
    """A tree whose clocks are shifted, as CRIU's restored ones are, is known by the start that its init sees."""
    # The exec enters the new time namespace (Linux 6.2).
    command = (*INIT, "unshare", "--time", "--boottime", "86400", *PYTHON, "-c", APPLICATION)
    with Contained(command, stdin=pipe) as init:
        init.line()
        app = running(init)
        if _ns(app, "time") == _ns(init.pid, "time"):
            pytest.skip("this kernel does not enter a time namespace by exec")
        assert read_state(init.pid).init.pid == 1


def _await_inits() -> tuple[HostPid, ...]:
    found: tuple[HostPid, ...] = ()
    while not found or all(read_state(pid).app is None for pid in found):
        found = find_inits()
    return found


def _ns(pid: int, name: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{name}")


def test_an_application_that_is_pid_1_is_named_so() -> None:
    """A container without our init is refused as APP_IS_PID1."""
    with Contained(("sleep", "60")) as init, pytest.raises(Refused) as caught:
        application(init.pid)
    assert caught.value.reason is Reason.APP_IS_PID1


def test_a_process_that_is_gone_is_no_init() -> None:
    """A process id that nobody has is refused as APP_NOT_FOUND."""
    with pytest.raises(Refused) as caught:
        read_state(HostPid(2**22))
    assert caught.value.reason is Reason.APP_NOT_FOUND


GOOD = {
    "version": 1,
    "mode": "cold",
    "init": {"pid": "SELF", "start": 1},
    "app": {"pid": 2, "start": 2},
    "checkpoint_id": "a",
    "mailbox": None,
    "claim": "",
    "deadline": None,
    "reason": "",
    "seconds": 0.1,
}

FAKE = """
import ctypes, fcntl, json, os, sys
what, text = sys.argv[1], sys.argv[2].replace('"SELF"', str(os.getpid())).encode()
name = "memfd:chrek-init (deleted)"
libc = ctypes.CDLL(None)
if what in ("file", "fifo", "zero", "random", "directory"):
    # The root of a mount that only this process has: seen from elsewhere, paths start there.
    assert not libc.unshare(0x20000) and not libc.mount(None, b"/", None, 0x44000, None)
    assert not libc.mount(b"none", b"/mnt", b"tmpfs", 0, None)
    os.chdir("/mnt")
    assert not libc.umount2(b"/mnt", 2)
def memfd(data, seals, name="chrek-init"):
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    if len(data) > 10**6: os.truncate(fd, 2**60)
    else: os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
kinds = {
    "memfd": lambda: memfd(text, SEALS),
    "unsealed": lambda: memfd(text, 0),
    "writable": lambda: memfd(text, SEALS & ~fcntl.F_SEAL_WRITE),
    "endless": lambda: memfd(b"x" * 10**7, SEALS),
    "many": lambda: [os.dup2(memfd(b"", SEALS), n) for n in range(10, 500)],
    "file": lambda: (open(name, "wb").write(text), os.open(name, os.O_RDONLY)),
    "fifo": lambda: (os.mkfifo(name), os.open(name, os.O_RDWR)),
    "zero": lambda: (os.mknod(name, 0o20666, os.makedev(1, 5)), os.open(name, os.O_RDONLY)),
    "random": lambda: (os.mknod(name, 0o20666, os.makedev(1, 8)), os.open(name, os.O_RDONLY)),
    "directory": lambda: (os.mkdir(name), os.open(name, os.O_RDONLY)),
}
keep = kinds[what]()
print("ready", flush=True)
os.read(0, 1)
"""


class Fake:
    """A hostile process that holds something under the state's name."""

    def __init__(self, what: str, text: str = json.dumps(GOOD)) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", "SEALS = " + str(SEALS) + FAKE, what, text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"
        self.pid = HostPid(self.process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(b"x")


def refused(pid: HostPid) -> bool:
    """Return whether reading the state is refused as it must be."""
    with pytest.raises(Refused) as caught:
        read_state(pid)
    return caught.value.reason is Reason.APP_NOT_FOUND


def test_a_well_formed_state_is_read() -> None:
    """The state the following tests damage is good before."""
    with Fake("memfd") as fake:
        assert read_state(fake.pid).mode == "cold"


@pytest.mark.parametrize("what", ["unsealed", "writable", "endless", "many"])
def test_a_memfd_that_is_not_ours_is_refused(what: str) -> None:
    """Missing seals and any size past 4096 bytes are refused."""
    with Fake(what) as fake:
        assert refused(fake.pid)


@pytest.mark.parametrize("what", ["file", "fifo", "zero", "random", "directory"])
def test_what_is_no_memfd_is_never_opened(what: str) -> None:
    """A file, FIFO, device or directory that shows the state's very name on its link is refused."""
    with Fake(what) as fake:
        links = [os.readlink(f"/proc/{fake.pid}/fd/{name}") for name in os.listdir(f"/proc/{fake.pid}/fd")]
        assert "/memfd:chrek-init (deleted)" in links
        assert refused(fake.pid)


BAD: list[tuple[str, object]] = [
    ("version", 2),
    ("version", None),
    ("mode", "other"),
    ("mode", ["cold"]),
    ("init", {"pid": 1, "start": 1}),
    ("init", {"pid": "1", "start": 1}),
    ("init", None),
    ("app", {"pid": -1, "start": 1}),
    ("app", {"pid": 2**40, "start": 1}),
    ("app", {"pid": True, "start": 1}),
    ("app", {"pid": 1.5, "start": 1}),
    ("app", {"pid": 1}),
    ("app", []),
    ("mailbox", -1),
    ("mailbox", 2**70),
    ("mailbox", "7"),
    ("claim", 7),
    ("claim", "a\n"),
    ("checkpoint_id", "x" * 1000),
    ("deadline", -1),
    ("deadline", float("nan")),
    ("deadline", float("inf")),
    ("seconds", "1"),
    ("seconds", True),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_value_out_of_bounds_is_refused(field: str, value: object) -> None:
    """Each field of a state is checked for type and range."""
    with Fake("memfd", json.dumps({**GOOD, field: value})) as fake:
        assert refused(fake.pid)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"x"', "[" * 4000, "\0" * 100, "{}", '{"version": 1}'])
def test_a_state_that_is_no_object_is_refused(text: str) -> None:
    """Whatever else a sealed memfd holds is refused, and never crashes the reader."""
    if "\0" in text:
        text = text.replace("\0", "\\0")
    with Fake("memfd", text) as fake:
        assert refused(fake.pid)


def test_an_application_that_is_no_child_is_refused() -> None:
    """A state that names a process which is not the init's child is not believed."""
    with Fake("memfd", json.dumps({**GOOD, "app": {"pid": os.getpid(), "start": 1}})) as fake:
        with pytest.raises(Refused) as caught:
            application(fake.pid)
        assert caught.value.reason is Reason.APP_NOT_FOUND


def test_an_application_with_another_start_time_is_refused(pipe: int) -> None:
    """A reused process id is told from the application by its start time."""
    code = f"""
import json, os, sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[2] / "src")!r})
from chrek.system.initpublish import InitState, Process, Publisher, process
from chrek.system.record import changed
child = os.fork()
if child == 0:
    os.read(0, 1)
    os._exit(0)
app = process(child)
publisher = Publisher()
good = InitState(mode="cold", init=process(os.getpid()), app=app)
for start in (app.start, app.start + 50):
    publisher.publish(changed(good, app=Process(pid=app.pid, start=start)))
    print("ready", flush=True)
    sys.stdin.buffer.raw.read(1)
"""
    with subprocess.Popen([sys.executable, "-I", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert application(HostPid(process.pid)) > 0
        process.stdin.write(b"xx")
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(Refused):
            application(HostPid(process.pid))
        process.stdin.write(b"xx")
        process.stdin.close()


def test_a_new_state_replaces_the_old_one_whole() -> None:
    """A reader that looks at any moment sees one of the published states, complete."""
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[2] / "src")!r})
from chrek.system.initpublish import InitState, Publisher, process
os.set_blocking(0, False)
publisher, n = Publisher(), 0
while sys.stdin.buffer.raw.read(1) is None:
    n += 1
    state = InitState(mode="waiting", init=process(os.getpid()), checkpoint_id=str(n), reason="r" * (n % 200))
    publisher.publish(state)
    if n == 1:
        print("ready", flush=True)
"""
    command = [sys.executable, "-I", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        seen: list[int] = []
        while len(set(seen)) < 100 or len(seen) < 1000:
            state = read_state(HostPid(process.pid))
            assert len(state.reason) == int(state.checkpoint_id) % 200
            seen.append(int(state.checkpoint_id))
        assert seen == sorted(seen)
        process.stdin.close()


def test_seals_are_those_of_the_kernel() -> None:
    """The state cannot be changed, not even by the init itself."""
    assert SEALS == fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
