"""A process as PID 1 of a PID namespace of its own, with a /proc of its own, as a runtime starts it.

Run as a program this is the part that stands outside: it makes the namespaces, forks the first process
into them, writes that one's id as the machine numbers it to a descriptor, and ends as it ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

if __name__ == "__main__":  # run with -I, where the package may not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from chrek.system.ids import HostPid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SOURCE = Path(__file__).resolve().parents[2] / "src"
# The distribution's interpreter where there is one: other users may run it too, which a test needs.
_SYSTEM = Path("/usr/bin/python3")
PYTHON = (str(_SYSTEM) if _SYSTEM.exists() else sys.executable, "-I", "-S")
INIT = (*PYTHON, str(SOURCE / "chrek/entrypoint/__main__.py"), "--")
_NEWNS, _NEWPID, _MS_REC_PRIVATE = 0x20000, 0x20000000, 0x44000


class Contained:
    """A started PID 1; leaving the context kills its namespace."""

    def __init__(
        self,
        command: Sequence[str | bytes],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        before: str = "",
    ) -> None:
        """Start `command` as PID 1; `before` is Python that the first process runs before its exec."""
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        reading, writing = os.pipe()
        self.outside = subprocess.Popen(
            [sys.executable, "-I", __file__, str(writing), before, *command],
            env=dict(os.environ if env is None else env),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            pass_fds=(writing,),
        )
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            self.pid = HostPid(int(pipe.read() or b"0"))
        assert self.outside.stdout is not None
        self.stdout: IO[bytes] = self.outside.stdout
        if not self.pid:
            message = self.stderr()
            self.__exit__()
            raise AssertionError(message)

    def line(self) -> str:
        """Return the next line of standard output, without its end."""
        return self.stdout.readline().decode().rstrip("\n")

    def lines(self) -> list[str]:
        """Return what is left of standard output."""
        return self.stdout.read().decode().splitlines()

    def stderr(self) -> str:
        """Return all of standard error so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode()

    def kill(self, number: int) -> None:
        """Send a signal to PID 1."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60) -> int:
        """Return the exit code, negative for a signal."""
        return self.outside.wait(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.outside.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid or self.outside.pid, signal.SIGKILL)
            self.outside.wait(60)
        self.stdout.close()
        self._stderr.close()


def _outside(report: int, before: str, command: list[str]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNS | _NEWPID) or libc.mount(None, b"/", None, _MS_REC_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "unshare")
    pid = os.fork()
    if pid == 0:
        os.close(report)
        os.setsid()
        libc.mount(b"proc", b"/proc", b"proc", 0, None)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        exec(before, {"os": os, "signal": signal, "libc": libc})
        os.execvp(command[0], command)
    os.write(report, str(pid).encode())
    os.close(report)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    code = _outside(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
