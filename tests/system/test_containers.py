"""The harness itself: what the other tests take for granted of their containers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chrekcli import until
from containers import PREFIX, Container, ExecError, Mount, needs, remove_leftovers
from containers.layout import RUNC_STATE, STATE

pytestmark = needs("containers")

Make = Callable[..., Container]
SLEEP = ("/bin/sleep", "1000")
FACTS = """
import json, os
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
print(json.dumps({
    "pid": os.getpid(), "uid": os.getuid(), "gid": os.getgid(), "host": os.uname().nodename, "cwd": os.getcwd(),
    "caps": int(status["CapEff"], 16), "nnp": status["NoNewPrivs"], "seccomp": status["Seccomp"],
    "a": os.environ.get("A"), "sys": os.access("/proc/sys/kernel/ns_last_pid", os.W_OK),
}), flush=True)
"""


def facts(container: Container) -> dict[str, object]:
    """Return what a container's PID 1 says of itself."""
    container.wait_for("}")
    return dict(json.loads(container.log))


def python(code: str) -> list[str]:
    """Return the command that runs Python code in a container."""
    return ["/usr/bin/python3", "-c", code]


def test_unprivileged_by_default(container: Make) -> None:
    """A container has runc's three capabilities, no_new_privs, PID 1, its own host name and environment."""
    made = container(python(FACTS), hostname="one", env={"A": "b"})
    found = facts(made)
    assert found["pid"] == 1
    assert found["uid"] == 0
    assert found["host"] == "one"
    assert found["a"] == "b"
    assert found["nnp"] == "1"
    assert int(str(found["caps"])).bit_count() == 3
    assert not found["sys"]
    assert made.wait() == 0


def test_privileged_has_what_the_machine_has(container: Make) -> None:
    """A privileged container has this process's capabilities and can write /proc/sys."""
    found = facts(container(python(FACTS), privileged=True))
    mine = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    assert found["caps"] == int(mine.split()[1], 16)
    assert found["nnp"] == "0"
    assert found["sys"]


def test_own_user(container: Make) -> None:
    """PID 1 can be another user, without capabilities."""
    found = facts(container(python(FACTS), uid=1000, cwd="/tmp"))
    assert (found["uid"], found["gid"], found["caps"], found["cwd"]) == (1000, 1000, 0, "/tmp")


def test_seccomp_profile(container: Make) -> None:
    """A seccomp section of the OCI specification is applied."""
    deny = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["uname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
    }
    made = container(python("import os\ntry: os.uname()\nexcept OSError as e: print(e.errno, '}')"), seccomp=deny)
    made.wait_for("}")
    assert made.log.startswith("38")


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 0)])
def test_exit_status(container: Make, code: str, status: int) -> None:
    """The exit status is PID 1's own (a PID 1 cannot kill itself)."""
    assert container(python(code)).wait() == status


def test_exit_status_of_a_signal(container: Make) -> None:
    """A PID 1 ended by a signal has the status 128 + n, as a container runtime reports it."""
    made = container(SLEEP)
    made.kill(signal.SIGKILL)
    assert made.wait() == 128 + signal.SIGKILL
    assert not made.running


def test_streams_are_pipes_of_the_harness(container: Make) -> None:
    """Standard streams are pipes that somebody reads, apart unless asked for as one; what is written is kept."""
    made = container(["/bin/sh", "-c", "echo 1; echo 2 >&2; sleep 100"])
    links = [os.readlink(f"/proc/{made.pid1}/fd/{number}") for number in range(3)]
    assert links[0] == "/dev/null"
    assert links[1].startswith("pipe:")
    assert links[2].startswith("pipe:")
    assert links[1] != links[2]
    made.wait_for("1")
    made.wait_for("2")
    assert (made.log, made.err) == ("1\n", "2\n")


def test_streams_of_other_kinds(container: Make) -> None:
    """Streams can be one pipe, a file, or /dev/null; standard input can be a pipe."""
    made = container(["/bin/cat"], stdin="pipe", stderr="stdout")
    assert os.readlink(f"/proc/{made.pid1}/fd/1") == os.readlink(f"/proc/{made.pid1}/fd/2")
    os.write(made.stdin, b"hello\n")
    made.wait_for("hello")
    other = container(SLEEP, stdout="file", stderr="null")
    assert os.readlink(f"/proc/{other.pid1}/fd/1").endswith("stdout.log")
    assert os.readlink(f"/proc/{other.pid1}/fd/2") == "/dev/null"


def test_files_go_to_the_upper_directory(container: Make) -> None:
    """What a container writes lies in its own upper directory, and the base stays as it is."""
    made = container(["/bin/sh", "-c", "echo x > /etc/new; rm /etc/passwd; echo done; sleep 100"])
    made.wait_for("done")
    assert (made.upper / "etc/new").read_text() == "x\n"
    assert (made.upper / "etc/passwd").is_char_device()
    assert (made.root / "etc/new").exists()
    assert (container(SLEEP).root / "etc/passwd").exists()


def test_mounts(container: Make, tmp_path: Path) -> None:
    """A tmpfs and a directory of the host can be mounted; the project's source is there, read-only."""
    made = container(SLEEP, mounts=[Mount.tmpfs("/tmp"), Mount.bind(tmp_path, "/data")])
    (tmp_path / "file").write_text("from the host")
    assert made.exec(["cat", "/data/file"]) == "from the host"
    assert "tmpfs /tmp tmpfs" in made.exec(["cat", "/proc/mounts"])
    assert "chrek" in made.exec(["ls", "/opt/chrek/lib"])
    with pytest.raises(ExecError, match="Read-only"):
        made.exec(["touch", "/opt/chrek/lib/x"])


def test_network_is_its_own_with_loopback_up(container: Make) -> None:
    """The network namespace is the container's own, and the loopback interface works in it."""
    made = container(SLEEP)
    assert made.exec(python("import socket; print(*[name for _, name in socket.if_nameindex()])")).startswith("lo")
    listen = "import socket; s=socket.create_server(('127.0.0.1', 80)); socket.create_connection(s.getsockname())"
    made.exec(python(listen))
    for kind in ("pid", "mnt", "net", "ipc", "uts"):
        assert os.readlink(f"/proc/{made.pid1}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


def test_connections_from_outside(container: Make) -> None:
    """The test can talk to a server in the container's own network, and stays in its own namespace itself."""
    before = os.readlink("/proc/self/ns/net")
    serve = "import socket; s=socket.create_server(('127.0.0.1', 80)); print('up', flush=True); c=s.accept()[0]"
    made = container(python(serve + "; c.sendall(c.recv(9)[::-1])"))
    made.wait_for("up")
    with made.connect(80) as connection:
        connection.sendall(b"abc")
        assert connection.recv(9) == b"cba"
    assert os.readlink("/proc/self/ns/net") == before
    assert os.readlink("/proc/thread-self/ns/net") == before


def test_limits(container: Make) -> None:
    """Limits are those of the container's own cgroup."""
    made = container(SLEEP, memory=64 << 20, pids=10)
    with pytest.raises(ExecError):
        made.exec(python("x = b'1' * (200 << 20); print(len(x))"))
    assert made.running


def test_a_command_that_does_not_exist_says_so(container: Make) -> None:
    """A container that runc cannot start raises what runc said, and leaves nothing behind."""
    with pytest.raises(ExecError, match="nonesuch"):
        container(["/nonesuch"])
    assert not list(STATE.glob(f"{PREFIX}{os.getpid()}-*"))


def test_delete_removes_everything(container: Make) -> None:
    """After `delete` no process, mount, directory or cgroup of the container is left."""
    made = container(SLEEP, memory=64 << 20)
    pid = made.pid1
    made.delete()
    made.delete()
    assert not Path(f"/proc/{pid}").exists()
    assert made.name not in Path("/proc/self/mounts").read_text()
    assert not made.home.exists()
    assert not (RUNC_STATE / made.name).exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{made.name}"))
    assert not list(Path("/sys/fs/cgroup").glob(made.name))


def test_a_killed_run_leaves_nothing_that_the_next_does_not_remove(container: Make) -> None:
    """When the harness's process is killed, its containers die at once, and the next run removes what they had."""
    mine = container(SLEEP)
    code = (
        f"import sys, time; sys.path[:0] = {sys.path!r}\n"
        "from containers import Container\n"
        f"c = Container({SLEEP!r}); print(c.name, c.pid1, flush=True); time.sleep(100)"
    )
    victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    with victim.stdout:
        name, pid = victim.stdout.readline().split()
    victim.kill()
    victim.wait()
    until(lambda: not Path(f"/proc/{pid}").exists(), "the end of PID 1")
    assert name in remove_leftovers()
    assert not (STATE / name).exists()
    assert name.startswith(PREFIX)
    assert mine.running
