"""Cold start as PID 1 of a real PID namespace: exit status, signals, zombies."""

from __future__ import annotations

import os
import re
import signal
import textwrap
from pathlib import Path

import pytest

from system.pidns import INIT, PYTHON, Contained

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a PID namespace")

ECHO = """
import ctypes, os
libc = ctypes.CDLL(None)
every = ctypes.c_uint64(2**64 - 1)
libc.syscall({mask}, 0, ctypes.byref(every), None, 8)
print("ready", flush=True)
info = ctypes.create_string_buffer(128)
while True:
    libc.syscall({wait}, ctypes.byref(every), info, None, 8)
    number = int.from_bytes(info[0:4], "little")
    if int.from_bytes(info[8:12], "little", signed=True) <= 0:
        print(number, int.from_bytes(info[24:32], "little"), flush=True)
""".format(**({"mask": 14, "wait": 128} if os.uname().machine == "x86_64" else {"mask": 135, "wait": 137}))
"""Prints every signal it gets, 32 and 33 included, which the C library hides from ordinary programs."""


def python(code: str) -> tuple[str, ...]:
    """Return the command of an init that runs this program."""
    return (*INIT, *PYTHON, "-c", textwrap.dedent(code))


@pytest.mark.parametrize("code", [0, 1, 42, 126, 255])
def test_ends_with_the_code_of_the_application(code: int) -> None:
    """The container's exit code is the application's."""
    with Contained((*INIT, "sh", "-c", f"exit {code}")) as init:
        assert init.wait() == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGABRT, signal.SIGRTMAX])
def test_ends_with_128_plus_the_signal_of_the_application(number: int) -> None:
    """An application that a signal ended gives 128+n."""
    with Contained((*INIT, "sh", "-c", f"kill -{int(number)} $$")) as init:
        assert init.wait() == 128 + number


def test_says_how_it_started() -> None:
    """One stable line on stderr names the mode, the reason and the seconds."""
    with Contained((*INIT, "true")) as init:
        assert init.wait() == 0
        assert re.fullmatch(r"chrek: start=cold reason=none seconds=\d+\.\d{3}\n", init.stderr())


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("no-such-command", 127, "no-such-command: command not found in PATH"),
        ("/no/such/command", 127, "/no/such/command: command not found"),
        ("", 127, "command not found"),
        ("/etc/passwd", 126, "/etc/passwd: cannot be run: Permission denied"),
        ("/etc", 126, "/etc: cannot be run: Permission denied"),
    ],
)
def test_a_command_that_cannot_be_run(command: str, code: int, says: str) -> None:
    """A command that is not there ends with 127, one that cannot be run with 126, and a message."""
    with Contained((*INIT, command)) as init:
        assert init.wait() == code
        assert says in init.stderr()


def test_forwards_every_signal_every_time() -> None:
    """Each of the 64 signals but KILL and STOP reaches the application, each time it is sent."""
    numbers = [n for n in range(1, 65) if n not in {signal.SIGKILL, signal.SIGSTOP}]
    with Contained((*INIT, *PYTHON, "-c", ECHO)) as init:
        assert init.line() == "ready"
        for _ in range(3):
            for number in numbers:
                init.kill(number)
                assert init.line().split()[0] == str(number)


def test_forwards_a_signal_with_its_value() -> None:
    """What sigqueue(3) attached to a signal arrives with it."""
    with Contained((*INIT, *PYTHON, "-c", ECHO)) as init:
        assert init.line() == "ready"
        sender = f"import ctypes; assert not ctypes.CDLL(None).sigqueue({init.pid}, 40, ctypes.c_void_p(0x1234567890))"
        assert os.system(f"{PYTHON[0]} -c '{sender}'") == 0
        assert init.line() == f"40 {0x1234567890}"


def test_queued_signals_are_all_forwarded() -> None:
    """Real-time signals sent in a burst are neither lost nor merged."""
    with Contained((*INIT, *PYTHON, "-c", ECHO)) as init:
        assert init.line() == "ready"
        for _ in range(200):
            init.kill(50)
        assert [init.line().split()[0] for _ in range(200)] == ["50"] * 200


def test_a_signal_during_the_start_is_not_lost() -> None:
    """A SIGTERM that arrives when only the init's first line has run ends the application."""
    with Contained((*INIT, "sleep", "60")) as init:
        status = Path(f"/proc/{init.pid}/status")
        while "SigBlk:\tf" not in status.read_text():
            assert init.outside.poll() is None
        init.kill(signal.SIGTERM)
        assert init.wait() == 128 + signal.SIGTERM


def test_reaps_every_zombie() -> None:
    """Orphans that end as children of the init do not stay as zombies."""
    code = """
        import os, subprocess, sys, time
        # The application gives up its orphans: they go to PID 1.
        import ctypes; ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
        for _ in range(300):
            if os.fork() == 0:
                if os.fork() == 0:
                    os._exit(0)
                os._exit(0)
            os.wait()
        deadline = time.monotonic() + 60
        def others():
            return [n for n in os.listdir("/proc") if n.isdigit() and int(n) not in (1, os.getpid())]
        while others() and time.monotonic() < deadline:
            time.sleep(0.01)
        print(others())
    """
    with Contained(python(code)) as init:
        assert init.line() == "[]"
        assert init.wait() == 0


def test_orphans_come_to_the_application() -> None:
    """A process whose parent ended becomes the application's child, as it would were that PID 1."""
    code = """
        import os
        r, w = os.pipe()
        if os.fork() == 0:
            if os.fork() == 0:
                os.setsid()
                os.read(r, 1)
                os.write(1, f"{os.getppid()}\\n".encode())
                os._exit(0)
            os._exit(0)
        os.wait()
        print(os.getpid(), flush=True)
        os.write(w, b"x")
        print(os.wait()[0] > 0)
    """
    with Contained(python(code)) as init:
        application = init.line()
        assert init.line() == application
        assert init.line() == "True"


def test_the_application_leads_a_session_of_its_own() -> None:
    """The application is a child of PID 1, leader of its session and of its group."""
    code = "import os; print(os.getppid(), os.getsid(0) == os.getpgid(0) == os.getpid())"
    with Contained(python(code)) as init:
        assert init.line() == "1 True"


def test_an_inherited_ignored_sigchld_does_not_lose_the_exit_status() -> None:
    """With SIGCHLD ignored by whoever started the init, the exit code still arrives and the app still ignores it."""
    code = "grep -q 'SigIgn:.*10000$' /proc/self/status && exit 7; grep SigIgn /proc/self/status; exit 9"
    with Contained((*INIT, "bash", "-c", code), before="signal.signal(17, signal.SIG_IGN)") as init:
        assert init.wait() == 7


@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU])
def test_a_stop_signal_does_not_stop_the_container(number: int) -> None:
    """Job control's stop signals leave an application without a handler running, as they do a PID 1."""
    with Contained((*INIT, *PYTHON, "-c", "print('up', flush=True); input(); print('on')"), stdin=_pipe()) as init:
        assert init.line() == "up"
        init.kill(number)
        init.kill(signal.SIGCONT)
        os.write(_PIPES[-1][1], b"\n")
        assert init.line() == "on"


_PIPES: list[tuple[int, int]] = []


def _pipe() -> int:
    _PIPES.append(os.pipe())
    return _PIPES[-1][0]


def test_a_log_that_nobody_reads_does_not_hurt_the_application() -> None:
    """A broken pipe at the init's own standard error is not forwarded as a SIGPIPE."""
    before = "r, w = os.pipe(); os.dup2(w, 2); os.close(r); os.close(w)"
    with Contained((*INIT, "sh", "-c", "sleep 0.2; echo alive"), before=before) as init:
        assert init.line() == "alive"
        assert init.wait() == 0
