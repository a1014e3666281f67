"""Nothing of the init leaks into the application: a probe sees the same under it as without it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from system.pidns import INIT, PYTHON, Contained

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a PID namespace")


SHELL_PROBE = r"""
for file in environ cmdline limits cgroup oom_score_adj timerslack_ns personality coredump_filter; do
    echo "== $file"; base64 -w0 /proc/$$/$file 2>/dev/null; echo
done
echo "== status"
# No program is started for this: bash changes its signal mask while it waits for one.
while read -r line; do
    case $line in
        Sig[!Q]*|Shd*|Cap*|Uid*|Gid*|Groups*|NoNewPrivs*|Seccomp*|Umask*|Cpus_allowed:*|Mems_allowed:*) echo "$line";;
    esac
done < /proc/$$/status
echo "== cwd"; readlink /proc/$$/cwd /proc/$$/root /proc/$$/exe
echo "== nice"; cut -d' ' -f18,19,40,41 /proc/$$/stat
echo "== fd"
for fd in /proc/$$/fd/*; do
    [ -e /proc/$$/fdinfo/${fd##*/} ] || continue
    link=$(readlink $fd); echo ${fd##*/} ${link%%[:#]*}; grep flags /proc/$$/fdinfo/${fd##*/}
done
exit 0
"""


def sections(text: str) -> dict[str, str]:
    """Return the probe's output by section."""
    found: dict[str, str] = {}
    for part in text.split("== ")[1:]:
        name, _, body = part.partition("\n")
        found[name] = body
    return found


def probe(prefix: tuple[str, ...], before: str) -> dict[str, str]:
    """Run the probe as PID 1, or under the init, after the same preparation."""
    env = {"PATH": os.environ["PATH"], "CHREK_BLOCK_IO_URING": "false"}
    with Contained((*prefix, "bash", "--norc", "-c", SHELL_PROBE), env=env, before=before) as contained:
        text = "\n".join(contained.lines())
        assert contained.wait() == 0, contained.stderr()
        return sections(text)


PREPARATIONS = {
    "nothing": "",
    "nohup": "signal.signal(1, signal.SIG_IGN)",
    "ignored": "[signal.signal(n, signal.SIG_IGN) for n in (2, 3, 10, 15, 34, 64)]",
    "blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, [1, 10, 15, 17, 34, 64])",
    "hidden signals": "libc.syscall(14, 0, b'\\0\\0\\0\\x80\\1\\0\\0\\0', None, 8)",
    "directory": "os.chdir('/usr/lib')",
    "umask": "os.umask(0o027)",
    "nice": "os.nice(7)",
    "limits": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400)); "
    "resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); resource.setrlimit(resource.RLIMIT_STACK, (1 << 22, 1 << 23))",
    "oom": "open('/proc/self/oom_score_adj', 'w').write('321')",
    "descriptors": "[os.dup2(0, n) for n in (7, 99, 250)]; os.dup2(os.pipe()[0], 9)",
    "many descriptors": "[os.dup2(0, n) for n in range(3, 200)]",
    "no standard input": "os.close(0)",
    "no standard error": "os.close(2)",
    "appending": "os.dup2(os.open('/tmp', os.O_TMPFILE | os.O_RDWR | os.O_APPEND), 5)",
    "user": "os.setgroups([5, 6]); os.setgid(1234); os.setuid(1235)",
    "no_new_privs": "libc.prctl(38, 1, 0, 0, 0)",
    "affinity": "os.sched_setaffinity(0, {0})",
    "scheduler": "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
    "timer slack": "libc.prctl(29, 12345, 0, 0, 0)",
    "personality": "libc.personality(0x0040000)",
}


@pytest.mark.parametrize("before", PREPARATIONS.values(), ids=PREPARATIONS)
def test_the_application_is_as_the_runtime_made_it(before: str) -> None:
    """Signals, descriptors, limits, ids, priorities, directories: all the same with and without the init."""
    direct, under = probe((), before), probe(INIT, before)
    assert direct.keys() == under.keys()
    for name, value in direct.items():
        assert under[name] == value, name


def exactly(entries: list[bytes]) -> str:
    """Return what makes PID 1 start with exactly this environment."""
    return (
        "import ctypes, sys; entries = " + repr(entries) + "\n"
        "argv = (ctypes.c_char_p * (len(sys.argv) - 2))(*[os.fsencode(a) for a in sys.argv[3:]], None)\n"
        "libc.execve(argv[0], argv, (ctypes.c_char_p * (len(entries) + 1))(*entries, None))\n"
    )


def test_the_environment_is_exact() -> None:
    """Order, duplicates, entries without '=', bytes that are no UTF-8 and an empty entry arrive as they were."""
    entries = [b"B=2", b"A=1", b"A=again", b"\xff\xfe=\x80", b"odd", b"", b"EMPTY=", b"PATH=/usr/bin:/bin"]
    with Contained((*INIT, "/bin/cat", "/proc/self/environ"), before=exactly(entries)) as init:
        assert init.stdout.read() == b"\0".join(entries) + b"\0"
        assert init.wait() == 0


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}, {"LC_CTYPE": "C"}, {"LANG": "C"}])
def test_python_s_locale_does_not_leak(locale: dict[str, str]) -> None:
    """An environment in the C locale gets no LC_CTYPE from the interpreter."""
    env = {"PATH": "/usr/bin:/bin", **locale}
    entries = [f"{name}={value}".encode() for name, value in env.items()]
    with Contained((*INIT, "env"), before=exactly(entries)) as init:
        assert init.lines() == [entry.decode() for entry in entries]


def test_an_empty_environment_stays_empty() -> None:
    """No variable at all is no variable at all."""
    with Contained((*INIT, "/usr/bin/env"), before=exactly([])) as init:
        assert init.lines() == []


def test_arguments_are_exact() -> None:
    """Arguments that are no UTF-8, empty, or look like options arrive as they were."""
    arguments = [b"a\xff", b"", b"--", b"-x", "ü".encode(), b"a b\n"]
    with Contained((*INIT, "/bin/bash", "-c", "cat /proc/$$/cmdline; true", *arguments)) as init:
        expected = [b"/bin/bash", b"-c", b"cat /proc/$$/cmdline; true", *arguments]
        assert init.stdout.read() == b"\0".join(expected) + b"\0"


def test_python_variables_do_not_reach_the_init(tmp_path: Path) -> None:
    """What the application sets for its own Python (paths, start-up code) does nothing to the init, and arrives."""
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit(99)\n")
    for name in ("json", "enum", "os", "chrek", "ctypes"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(98)\n")
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": "/x", "PYTHONHOME": "/nowhere"}
    with Contained((*INIT, "env"), env=env, before=f"os.chdir({str(tmp_path)!r})") as init:
        assert init.wait() == 0
        assert f"PYTHONPATH={tmp_path}" in init.lines()


def seccomp_filters(init: Contained, child: bool) -> int:
    """Return how many filters PID 1 or its child has."""
    pid: int | str = init.pid
    if child:
        pid = Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text().split()[0]
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("Seccomp_filters:")[2].split()[0])


IO_URING = (
    "import ctypes, json; libc = ctypes.CDLL(None, use_errno=True)\n"
    "def call(n):\n    r = libc.syscall(n, 1, ctypes.create_string_buffer(256), 0, 0, 0, 0)\n"
    "    return ctypes.get_errno() if r < 0 else 0\n"
    "print(json.dumps([call(n) for n in (424, 425, 426, 427, 428)]), flush=True); input()"
)
DROP = (
    "libc.prctl(38, {nnp}, 0, 0, 0)\nfor cap in range(41): libc.prctl(24, cap, 0, 0, 0)\n"
    "os.setgid(1000); os.setuid(1000)"
)


@pytest.mark.parametrize(
    ("wish", "before", "filters", "no_new_privs"),
    [
        ("auto", "", 1, 0),
        ("auto", DROP.format(nnp=0), 0, 0),
        ("auto", DROP.format(nnp=1), 1, 1),
        ("true", "", 1, 1),
        ("true", DROP.format(nnp=0), 1, 1),
        ("false", "", 0, 0),
        ("false", DROP.format(nnp=1), 0, 1),
    ],
    ids=["auto-root", "auto-plain", "auto-nnp", "true-root", "true-plain", "false-root", "false-nnp"],
)
def test_io_uring_is_blocked_in_the_application_only(wish: str, before: str, filters: int, no_new_privs: int) -> None:
    """One filter more in the application, none in PID 1, and no_new_privs only if it was set or is wished."""
    reading, writing = os.pipe()
    env = {"PATH": os.environ["PATH"], "CHREK_BLOCK_IO_URING": wish}
    with Contained((*INIT, *PYTHON, "-c", IO_URING), env=env, before=before, stdin=reading) as init:
        answers = json.loads(init.line())
        assert [number == 38 for number in answers[1:4]] == [bool(filters)] * 3
        assert answers[0] != 38
        assert answers[4] != 38
        assert seccomp_filters(init, child=False) == 0
        assert seccomp_filters(init, child=True) == filters
        child = Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text().split()[0]
        assert f"NoNewPrivs:\t{no_new_privs}\n" in Path(f"/proc/{child}/status").read_text()
    os.close(reading)
    os.close(writing)


TERMINAL = r"""
import fcntl, os, signal
session = int.from_bytes(fcntl.ioctl(0, 0x5429, bytes(4)), "little")
print("leader", os.getsid(0) == os.getpid(), "tty", session == os.getpid())
print("foreground", os.tcgetpgrp(0) == os.getpgid(0), flush=True)
signal.signal(signal.SIGWINCH, lambda *_: os.write(1, b"resized\n"))
signal.signal(signal.SIGHUP, lambda *_: os.write(1, b"hung up\n"))
signal.signal(signal.SIGINT, lambda *_: os.write(1, b"interrupted\n"))
print("ready", flush=True)
while True:
    signal.pause()
"""


def test_a_controlling_terminal_is_handed_on() -> None:
    """The application controls the terminal that the runtime gave to PID 1: Ctrl-C and resizing reach it."""
    main, side = os.openpty()
    before = (
        "import fcntl\nfcntl.ioctl(0, 0x540E, 0)\nos.dup2(0, 1)\nos.dup2(0, 2)\nassert os.tcgetpgrp(0) == os.getpid()"
    )
    with Contained((*INIT, *PYTHON, "-c", TERMINAL), stdin=side, before=before) as init:
        os.close(side)
        text = _until(main, "ready")
        assert "leader True tty True" in text
        assert "foreground True" in text
        os.write(main, b"\x03")
        assert "interrupted" in _until(main, "interrupted")
        fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
        assert "hung up" not in _until(main, "resized")
        init.kill(signal.SIGHUP)
        assert "hung up" in _until(main, "hung up")
        init.kill(signal.SIGTERM)
        assert init.wait() == 143
    os.close(main)


def _until(terminal: int, word: str) -> str:
    text = ""
    while word not in text:
        text += os.read(terminal, 1000).decode()
    return text


def test_on_a_plain_machine_it_is_a_subreaper(tmp_path: Path) -> None:
    """Not as PID 1 it still reaps what its application gave up, and ends with its code."""
    code = (
        "import ctypes, os\nctypes.CDLL(None).prctl(36, 0, 0, 0, 0)\ngo, start = os.pipe()\nanswer, said = os.pipe()\n"
        "if os.fork() == 0:\n    if os.fork() == 0:\n        os.read(go, 1)\n"
        "        os.write(said, str(os.getppid()).encode()); os._exit(0)\n    os._exit(0)\n"
        "os.wait(); os.write(start, b'x')\n"
        "print(os.read(answer, 20).decode() == str(os.getppid()), flush=True); os._exit(6)"
    )
    result = subprocess.run([*INIT, *PYTHON, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (result.stdout, result.returncode) == ("True\n", 6)
