"""A program that hands a real process tree over to an init, as an engine with CRIU does.

It speaks the real mailbox protocol and stands outside the container: a helper enters the init's PID
namespace (CRIU's place), forks the tree's root there, and when the helper ends the root falls to the
init. Steps are given as arguments and carried out in order; each prints what came of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from chrek.errors import ChrekError, Reason
from chrek.system.ids import HostPid, NsPid
from chrek.system.mailbox import Mailbox

ROOT = """
import os, signal, sys, time
os.setsid()
names = {1: "HUP", 10: "USR1", 12: "USR2"}
for number in names:
    signal.signal(number, lambda n, _: print("got", names[n], flush=True))
def leave(*_):
    print("leaving", flush=True)
    sys.exit(int(os.environ["CODE"]))
signal.signal(15, leave)
if os.environ.get("QUICK"):
    sys.exit(int(os.environ["CODE"]))
print("root up", flush=True)
while True:
    signal.pause()
"""


class Engine:
    """The steps."""

    def __init__(self, pid1: int) -> None:
        self.pid1 = HostPid(pid1)
        self.mailbox: Mailbox | None = None
        self.root = NsPid(0)
        self.go = -1
        self.helper = 0
        # A PID namespace whose first process has ended waits until every process of it is reaped, also those with
        # a parent outside: none of ours may stay a zombie while a test makes us wait.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    def claim(self) -> None:
        self.mailbox = Mailbox.claim(self.pid1, by="stand-in")

    def tree(self) -> None:
        """Build the tree in the container's PID namespace; it waits for `resume`."""
        libc = ctypes.CDLL(None, use_errno=True)
        namespace = os.open(f"/proc/{self.pid1}/ns/pid", os.O_RDONLY)
        assert libc.setns(namespace, 0) == 0
        reading, writing = os.pipe()
        hold, self.go = os.pipe()
        self.helper = os.fork()
        if self.helper == 0:
            self._helper(writing, hold)
        os.close(writing)
        os.close(hold)
        self.root = NsPid(int(os.read(reading, 100)))

    def _helper(self, report: int, hold: int) -> None:
        os.close(self.go)
        start, started = os.pipe()
        root = os.fork()
        if root == 0:
            os.close(started)
            os.read(start, 1)
            os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", ROOT])
        os.write(report, str(root).encode())
        if os.read(hold, 1) != b"x":
            os.kill(root, signal.SIGKILL)
        else:
            os.write(started, b"x")
            while os.environ.get("SLOW") and os.read(hold, 1):
                pass
        os._exit(0)

    def ready(self) -> None:
        assert self.mailbox
        self.mailbox.ready(self.root)

    def resume(self) -> None:
        os.write(self.go, b"x")
        if not os.environ.get("SLOW"):
            os.close(self.go)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.helper, 0)

    def restored(self) -> None:
        assert self.mailbox
        self.mailbox.restored(self.root)

    def other(self) -> None:
        """Name another process than the one that was announced."""
        assert self.mailbox
        self.mailbox.restored(NsPid(self.root + 1))

    def failed(self) -> None:
        assert self.mailbox
        self.mailbox.failed(Reason.FILL_FAILED, "two pages of process 7 are missing")

    def log(self) -> None:
        assert self.mailbox
        self.mailbox.log(b"(00.1) line\n" * 1000)

    def alive(self) -> None:
        assert self.mailbox
        self.mailbox.alive()

    def wait(self) -> None:
        """Go on when the test says so."""
        sys.stdin.readline()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        assert self.mailbox
        self.mailbox.close()


def say(*words: str) -> None:
    """Tell the test."""
    os.write(1, " ".join(words).encode() + b"\n")


def main() -> int:
    """Carry the steps out; the first that fails prints its reason and ends the program."""
    engine = Engine(int(sys.argv[1]))
    for step in sys.argv[2:]:
        try:
            getattr(engine, step)()
        except ChrekError as error:
            say(step, error.reason.code)
            return int(error.exit_code)
        if step != "wait":
            say(step, "ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
