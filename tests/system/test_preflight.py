"""What cannot be captured is refused by name before anything is touched, and the application runs on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chrek.engine import capture as capturing
from chrek.errors import ChrekError, Reason
from chrek.store.layout import Store
from chrek.system.initstate import application
from containers import Container, Mount, needs
from containers.needs import effective_capabilities
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

WAIT = "\nprint('ready', flush=True)\nimport time\nwhile True: time.sleep(0.05); print('beat', flush=True)\n"

SYSV = {
    "shared memory": "import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
    "semaphore": "import ctypes; assert ctypes.CDLL(None).semget(0, 1, 0o1600) >= 0",
    "message queues": "import ctypes; assert ctypes.CDLL(None).msgget(0, 0o1600) >= 0",
}
URING = """
import ctypes
fd = ctypes.CDLL(None, use_errno=True).syscall(425, 4, ctypes.create_string_buffer(120))
assert fd >= 0, ctypes.get_errno()
"""
MPTCP = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262); s.bind(('', 0)); s.listen()"
UNSUPPORTED = {
    "MPTCP": ("net/mptcp", MPTCP),
    "userfaultfd": (
        "vm/unprivileged_userfaultfd",
        "import ctypes; assert ctypes.CDLL(None).syscall(323, 0) >= 0",
    ),
    "landlock-ruleset": (
        "",
        "import ctypes; assert ctypes.CDLL(None).syscall(444, ctypes.byref(ctypes.c_uint64(1)), 8, 0) >= 0",
    ),
}
BIG = "import os; f=open('/tmp/big','w'); os.truncate('/tmp/big', 1 << 32); os.unlink('/tmp/big')"
PROJECTED = """
import os
os.makedirs('/etc/config/..2026_01_02_03_04_05.123')
f = open('/etc/config/..2026_01_02_03_04_05.123/key', 'w')
"""
NAMESPACE = """
import ctypes, os
if os.fork() == 0:
    assert ctypes.CDLL(None).unshare(0x04000000) == 0
    print('unshared', flush=True)
    import time
    time.sleep(1000)
"""


def python(code: str) -> list[str]:
    """Return the command of an application that runs *code* and then counts on."""
    return [cycle.INIT, "--", "python3", "-c", code + WAIT]


def refused(source: Container, store: Store, reason: Reason, **options: Any) -> ChrekError:
    """Check that a capture is refused so, that nothing is in the store, and that the application runs on."""
    with pytest.raises(ChrekError) as caught:
        cycle.capture(source, store, **options)
    assert caught.value.reason is reason, caught.value
    assert caught.value.cure
    assert not (Path(store.path) / "one").exists()
    before = source.log.count("beat")
    source.until(lambda: source.log.count("beat") > before + 1, what="the application to go on")
    return caught.value


def test_application_is_pid_1(container: Make, store: Store) -> None:
    """An application that is PID 1 itself is refused."""
    source = cycle.start(container, ["python3", "-c", WAIT])
    refused(source, store, Reason.APP_IS_PID1)


@pytest.mark.parametrize("kind", sorted(SYSV))
def test_system_v_objects(kind: str, container: Make, store: Store) -> None:
    """System V objects of any kind, which CRIU would lose, are counted and named."""
    error = refused(cycle.start(container, python(SYSV[kind])), store, Reason.SYSV_IPC_IN_USE)
    assert kind in error.message


def test_io_uring(container: Make, store: Store) -> None:
    """A ring is named by process and descriptor, where the init was told not to block rings."""
    if Path("/proc/sys/kernel/io_uring_disabled").read_text().strip() == "2":
        pytest.skip("kernel.io_uring_disabled=2 on this machine")
    source = cycle.start(container, python(URING), env={"CHREK_BLOCK_IO_URING": "false"})
    error = refused(source, store, Reason.IO_URING_IN_USE)
    assert "descriptor 3" in error.message


def test_io_uring_is_blocked(container: Make) -> None:
    """Under the init an application sees a kernel without io_uring, as far as that changes nothing else."""
    source = container(python(URING))
    assert source.wait() == 1
    assert "AssertionError: 38" in source.err


@pytest.mark.parametrize("kind", sorted(UNSUPPORTED))
def test_descriptor_of_an_unsupported_kind(kind: str, container: Make, store: Store) -> None:
    """A descriptor that CRIU has no way to dump is named by kind, process and number."""
    setting, code = UNSUPPORTED[kind]
    if setting and not Path("/proc/sys", setting).exists():
        pytest.skip(f"this kernel has no {kind}")
    command, env = python(code), {"CHREK_BLOCK_IO_URING": "false"}
    source = container(command, env=env, privileged=True)
    try:
        source.until(lambda: "ready" in source.log, what="the application")
    except AssertionError:
        if "AssertionError" in source.err or "not supported" in source.err:
            pytest.skip(f"no {kind} to be had here: {source.err.splitlines()[-1]}")
        raise
    error = refused(source, store, Reason.DESCRIPTOR_UNSUPPORTED)
    assert kind in error.message
    assert "descriptor 3" in error.message


def test_mptcp_is_hidden(container: Make) -> None:
    """Under the init an application sees a kernel without MPTCP, as Go's servers ask for it, and with TCP."""
    source = container(python(f"import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM, 6); {MPTCP}"))
    assert source.wait() == 1
    assert "OSError: [Errno 93] Protocol not supported" in source.err


def test_processes_of_several_users(container: Make, store: Store) -> None:
    """Where CAP_SYS_RESOURCE is missing CRIU can read the limits of one user's processes only; where not, of all."""
    code = "import os\nif os.fork() == 0:\n    os.setgid(33); os.setuid(33); print('changed', flush=True)\n"
    source = cycle.start(container, python(code), privileged=True)
    source.until(lambda: "changed" in source.log, what="the child's other user")
    sys_resource = 24
    if effective_capabilities() >> sys_resource & 1:
        cycle.capture(source, store)
    else:
        error = refused(source, store, Reason.NOT_SUPPORTED_HERE)
        assert "users [0, 33]" in error.message


def test_big_deleted_file(container: Make, store: Store) -> None:
    """A deleted open file of 4 GiB is more than an image can carry."""
    error = refused(cycle.start(container, python(BIG)), store, Reason.DELETED_FILE_TOO_BIG)
    assert str(1 << 32) in error.message
    assert "/tmp/big" in error.message


def test_projected_volume(container: Make, store: Store) -> None:
    """An open file of a ConfigMap's generation directory will not exist in the next pod."""
    refused(cycle.start(container, python(PROJECTED)), store, Reason.WATCH_UNRESTORABLE)


def test_foreign_namespace(container: Make, store: Store) -> None:
    """A child in a namespace of its own is named."""
    source = cycle.start(container, python(NAMESPACE), privileged=True)
    source.wait_for("unshared")
    error = refused(source, store, Reason.FOREIGN_NAMESPACE)
    assert "uts" in error.message


def test_device(container: Make, store: Store) -> None:
    """A device that CRIU cannot dump is named."""
    source = cycle.start(container, python("f=open('/dev/kmsg')"), privileged=True, mounts=[_device("/dev/kmsg")])
    error = refused(source, store, Reason.DEVICE_IN_USE)
    assert "/dev/kmsg" in error.message


def _device(path: str) -> Mount:
    return Mount.bind(path, path)


def test_foreign_descriptor(container: Make, store: Store, tmp_path: Path) -> None:
    """A file of another mount namespace, passed in by somebody, is named."""
    code = """
import array, socket
s = socket.socket(socket.AF_UNIX); s.connect('/data/socket')
fds = array.array('i'); _, data, _, _ = s.recvmsg(1, 64)
fds.frombytes(data[0][2]); s.close()
"""
    (tmp_path / "data").mkdir()
    with passing(tmp_path / "data/socket", tmp_path / "secret"):
        source = cycle.start(container, python(code), mounts=[Mount.bind(tmp_path / "data", "/data")])
    error = refused(source, store, Reason.FOREIGN_MOUNT)
    assert "secret" in error.message


@contextmanager
def passing(address: Path, file: Path) -> Iterator[None]:
    """Pass a descriptor of *file* to the first who connects."""
    import array
    import socket
    import threading

    file.write_text("x")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, file.open() as opened:
            rights = array.array("i", [opened.fileno()])
            connection.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield
    thread.join(60)
    listener.close()


@needs("ip")
def test_bound_to_the_pods_address(container: Make, store: Store) -> None:
    """A listener on the pod's own address is named with that address; one on every address is not."""
    code = """
import socket, time
while True:
    try:
        s = socket.create_server(('10.9.8.7', 8080)); break
    except OSError:
        time.sleep(.01)
"""
    source = container(python(code))
    add = ["ip", "address", "add", "10.9.8.7/32", "dev", "lo"]
    subprocess.run(["nsenter", "-t", str(source.pid1), "-n", *add], check=True)
    source.wait_for("ready")
    error = refused(source, store, Reason.BOUND_TO_POD_IP)
    assert "10.9.8.7:8080" in error.message


@needs("strace")
def test_traced(container: Make, store: Store) -> None:
    """A process under a tracer is named with the tracer."""
    source = cycle.start(container, python(""))
    pid = application(source.pid1)
    with subprocess.Popen(["strace", "-qq", "-o", "/dev/null", "-p", str(pid)]) as tracer:
        source.until(lambda: f"TracerPid:\t{tracer.pid}" in Path(f"/proc/{pid}/status").read_text())
        refused(source, store, Reason.BEING_TRACED)
        tracer.terminate()


def test_no_scratch(container: Make, store: Store) -> None:
    """A read-only root without a volume at /tmp is refused with the cure; with one it works."""
    source = cycle.start(container, python(""), read_only=True)
    assert "emptyDir" in refused(source, store, Reason.NO_TMP).cure
    source = cycle.start(container, python(""), read_only=True, mounts=[Mount.tmpfs("/tmp")])
    cycle.capture(source, store)
    source.delete()
    copy = cycle.waiting(container, python(""), read_only=True, mounts=[Mount.tmpfs("/tmp")])
    cycle.restore(copy, store)
    copy.wait_for("beat")


def test_wrong_id(container: Make, store: Store) -> None:
    """A container in checkpoint mode is captured under its own id only."""
    environment = {
        "DYN_CHECKPOINT_SIGNAL_FILE": "/tmp/done",
        "DYN_CHECKPOINT_READY_FILE": "/tmp/ready",
        "DYN_CHECKPOINT_HASH": "mine",
        "DYN_CHECKPOINT_LOCATION": "/checkpoints/mine",
        "DYN_CHECKPOINT_STORAGE_TYPE": "pvc",
    }
    source = cycle.start(container, python(""), env=environment)
    error = refused(source, store, Reason.ID_MISMATCH)
    assert "'mine'" in error.message
    assert "'one'" in error.message


def test_no_space(container: Make, small_store: Store) -> None:
    """A store that is too small is refused with the numbers, before the application is stopped."""
    source = cycle.start(container, python("a = bytearray(b'x' * (80 << 20))"))
    error = refused(source, small_store, Reason.NO_SPACE)
    assert "free" in error.message


@pytest.fixture
def small_store(tmp_path: Path) -> Iterator[Store]:
    """Return a store on a file system of 32 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], check=True)
    try:
        with Store.open(place / "store", create=True) as opened:
            yield opened
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_no_criu(container: Make, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a usable CRIU the message says where it was looked for."""
    monkeypatch.setenv("CHREK_CRIU_BUNDLE", str(tmp_path))
    source = cycle.start(container, python(""))
    error = refused(source, store, Reason.CRIU_UNUSABLE)
    assert str(tmp_path) in error.message


def test_override(container: Make, store: Store) -> None:
    """A refusal that the user overrides by its code is not made."""
    source = cycle.start(container, python(PROJECTED))
    outcome = cycle.capture(source, store, allow=frozenset({Reason.WATCH_UNRESTORABLE}))
    assert isinstance(outcome, capturing.Outcome)
    assert os.path.islink(Path(store.path) / "one")
