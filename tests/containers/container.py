"""One container, from its root file system to its removal."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from chrek.system.ids import HostPid
from containers.layout import PREFIX, RUNC_STATE, SOURCE, base_root, mount, remove, state
from containers.spec import Json, Mount, Wish, config

_numbers = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000  # sched.h
_SHIM = Path(__file__).with_name("shim.py")

Stream = Literal["pipe", "file", "null", "stdout"]


class ExecError(Exception):
    """A program run inside a container failed; the message ends with what it said."""


class Log:
    """What a container wrote to one of its standard streams, copied from a pipe to a file while it runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self._read, self.write_end = os.pipe()
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        with self.path.open("ab", buffering=0) as file:
            while data := os.read(self._read, 1 << 16):
                file.write(data)

    def close(self) -> None:
        """Give our end of the pipe away, and copy what is left; the container must be gone."""
        os.close(self.write_end)
        self._thread.join(timeout=10)  # a process that escaped the container must not hold us up
        if not self._thread.is_alive():
            os.close(self._read)


def _compile_source() -> None:
    """Compile the project's modules: a container sees them read-only, and would compile them at every start."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(SOURCE)], check=False)


@functools.cache
def _prepared() -> tuple[Path, Path]:
    _compile_source()
    return base_root(), state()


class Container:
    """A running container; use it as a context manager, or call `delete` in the end.

    Args:
        args: the command of PID 1.
        hostname: default: the container's own name.
        privileged: every capability this machine has, a writable /proc/sys, nothing masked. Default: runc's three
            default capabilities, no_new_privs, masked and read-only paths.
        uid: user of PID 1 (and its group, unless `gid` says otherwise); with a uid other than 0, no capabilities.
        env: added to PATH and HOME.
        mounts: see `Mount`; mount points that the root lacks are made in the overlay's upper directory.
        seccomp: a seccomp section of the OCI runtime specification.
        capabilities, no_new_privs: where neither of the two kinds fits.
        read_only: the root file system is mounted read-only.
        memory, pids: limits of the container's cgroup, in bytes and in tasks.
        stdin, stdout, stderr: "pipe" (as under a container runtime; copied to `log` and `err`), "file" (the container
            writes the file itself), "null"; stderr "stdout": both streams are one pipe.
        lower: more read-only layers above the base, the uppermost first.
        edit: changes config.json before it is written.

    Raises:
        ExecError: runc did not start the container; the message has what it said.

    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        hostname: str | None = None,
        privileged: bool = False,
        uid: int = 0,
        gid: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        mounts: Sequence[Mount] = (),
        seccomp: Json | None = None,
        capabilities: Sequence[str] | None = None,
        no_new_privs: bool | None = None,
        read_only: bool = False,
        memory: int | None = None,
        pids: int | None = None,
        stdin: Literal["pipe", "null"] = "null",
        stdout: Stream = "pipe",
        stderr: Stream = "pipe",
        lower: Path | Sequence[Path] = (),
        edit: Callable[[Json], None] | None = None,
    ) -> None:
        base, place = _prepared()
        self.name = f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        self.home = place / self.name
        self.upper = self.home / "upper"
        self.rootfs = self.home / "rootfs"
        self._status: int | None = None
        self._closing = contextlib.ExitStack()
        wish = Wish(
            args=args,
            hostname=self.name if hostname is None else hostname,
            privileged=privileged,
            uid=uid,
            gid=gid,
            env=env or {},
            cwd=cwd,
            mounts=mounts,
            seccomp=seccomp,
            capabilities=capabilities,
            no_new_privs=no_new_privs,
            read_only=read_only,
            memory=memory,
            pids=pids,
        )
        try:
            self._make_root([lower] if isinstance(lower, Path) else lower, base)
            spec = config(wish, root=self.rootfs, source=SOURCE, cgroup=f"/{self.name}")
            if edit is not None:
                edit(spec)
            (self.home / "config.json").write_text(json.dumps(spec))
            self._start(stdin, stdout, stderr)
        except BaseException:
            self.delete()
            raise

    def _make_root(self, lower: Sequence[Path], base: Path) -> None:
        for part in ("upper", "work", "rootfs"):
            (self.home / part).mkdir(parents=True)
        self._closing.callback(remove, self.name)
        layers = ":".join(str(layer) for layer in (*lower, base))
        mount("overlay", self.rootfs, f"lowerdir={layers},upperdir={self.upper},workdir={self.home / 'work'}")

    def _stream(self, kind: Stream, name: str, stdout: int) -> int:
        """Open the write end of one standard stream."""
        if kind == "stdout":
            return stdout
        path = self.home / name
        if kind == "pipe":
            log = Log(path)
            self._closing.callback(log.close)
            return log.write_end
        descriptor = os.open("/dev/null" if kind == "null" else path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._closing.callback(os.close, descriptor)
        return descriptor

    def _start(self, stdin: Literal["pipe", "null"], stdout: Stream, stderr: Stream) -> None:
        out = self._stream(stdout, "stdout.log", -1)
        err = self._stream(stderr, "stderr.log", out)
        self.stdin = -1
        source = os.open("/dev/null", os.O_RDONLY)
        if stdin == "pipe":
            os.close(source)
            source, self.stdin = os.pipe()
            self._closing.callback(os.close, self.stdin)
        self._closing.callback(os.close, source)
        control, self._control = os.pipe()
        self._report, report = os.pipe()
        self._closing.callback(os.close, self._report)
        pidfile = self.home / "pid"
        words = ["runc", "--root", str(RUNC_STATE), "--log", str(self.home / "runc.log"), "run", "--detach"]
        start = [*words, "--bundle", str(self.home), "--pid-file", str(pidfile), self.name]
        argv = [sys.executable, "-I", "-S", str(_SHIM), str(control), str(report), str(pidfile), *start]
        began = time.monotonic()
        try:
            # In a session of its own: Ctrl-C is for the test, whose clean-up then ends the container.
            self._shim = subprocess.Popen(
                argv, stdin=source, stdout=out, stderr=err, pass_fds=(control, report), start_new_session=True
            )
        finally:
            os.close(control)
            os.close(report)
        self._closing.callback(self._end_shim)
        line = self._read_report()
        if not line:
            said = [self.home / name for name in ("runc.log", "stderr.log")]
            text = " ".join(path.read_text(errors="replace") for path in said if path.exists())
            raise ExecError(f"runc did not start {self.name}: {text.strip()[-2000:]}")
        self.pid1 = HostPid(int(line))
        self._pidfd = os.pidfd_open(self.pid1)
        self._closing.callback(self._end_pid1)
        self.start_seconds = time.monotonic() - began

    def _read_report(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            data = os.read(self._report, 1)
            if not data:
                break
            line += data
        return line

    def _end_shim(self) -> None:
        os.close(self._control)  # the shim kills PID 1 now, if it still runs
        self._shim.wait()

    def _end_pid1(self) -> None:
        """Kill PID 1, should the shim be gone already."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        os.close(self._pidfd)

    # --- what runs inside ----------------------------------------------------------------------------

    @property
    def root(self) -> Path:
        """The container's file system as PID 1 sees it, mounts included."""
        return Path(f"/proc/{self.pid1}/root")

    @property
    def running(self) -> bool:
        """Whether PID 1 has not ended."""
        return self._status is None and not select.select([self._report], [], [], 0)[0]

    @property
    def log(self) -> str:
        """What came on standard output so far."""
        return self._text("stdout.log")

    @property
    def err(self) -> str:
        """What came on standard error so far."""
        return self._text("stderr.log")

    def _text(self, name: str) -> str:
        path = self.home / name
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, text: str, *, timeout: float = 60.0) -> None:
        """Return when `text` stands in one of the logs; TimeoutError after `timeout` seconds or when PID 1 ended."""
        self.until(lambda: text in self.log or text in self.err, timeout=timeout, what=f"{text!r} in the log")

    def until(self, happened: Callable[[], bool], *, timeout: float = 60.0, what: str = "what was waited for") -> None:
        """Return when `happened()` is true; TimeoutError after `timeout` seconds or when PID 1 ended before."""
        deadline = time.monotonic() + timeout
        while not happened():
            ended = not self.running
            if ended and happened():
                return
            if ended or time.monotonic() > deadline:
                how = f"PID 1 ended with {self.wait()}" if ended else f"{timeout} s went by"
                raise TimeoutError(f"{self.name}: {how} before {what}\n--- stdout\n{self.log}\n--- stderr\n{self.err}")
            time.sleep(0.005)

    def exec(self, args: Sequence[str], *, check: bool = True, stdin: str = "", user: str = "") -> str:
        """Run a program in the container as an exec probe does; return its standard output.

        Raises:
            ExecError: it ended with another status than 0 and `check` is true.

        """
        words = ["exec", *(["--user", user] if user else []), self.name, *args]
        argv = ["runc", "--root", str(RUNC_STATE), *words]
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise ExecError(f"{list(args)} in {self.name} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def connect(self, port: int, *, timeout: float = 30.0) -> socket.socket:
        """Return a TCP connection to 127.0.0.1 of the container, though its network is not ours.

        A socket stays in the network namespace that its thread was in when it was made (socket(2)), so a thread of
        its own enters the container's, and ends.

        Raises:
            OSError: nobody listens there.

        """
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
            made = pool.submit(self._socket_inside)
        connection = made.result()
        connection.settimeout(timeout)
        try:
            connection.connect(("127.0.0.1", port))
        except OSError:
            connection.close()
            raise
        return connection

    def _socket_inside(self) -> socket.socket:
        namespace = os.open(f"/proc/{self.pid1}/ns/net", os.O_RDONLY)
        try:
            if _libc.setns(namespace, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns", f"/proc/{self.pid1}/ns/net")
            return socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        finally:
            os.close(namespace)

    def children(self, pid: int | None = None) -> list[HostPid]:
        """Return the children of PID 1 (or of `pid`, a host's process id)."""
        of = self.pid1 if pid is None else pid
        return [HostPid(int(word)) for word in Path(f"/proc/{of}/task/{of}/children").read_text().split()]

    # --- its end -------------------------------------------------------------------------------------

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send PID 1 a signal, as the runtime does."""
        os.kill(self.pid1, number)

    def wait(self, timeout: float = 30.0) -> int:
        """Return PID 1's exit status, 128 + n when a signal ended it; TimeoutError after `timeout` seconds."""
        if self._status is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise TimeoutError(f"{self.name} still runs after {timeout} s\n{self.log}\n{self.err}")
            self._status = int(self._read_report() or b"-1")
        return self._status

    def stop(self, timeout: float = 60.0) -> int:
        """Kill PID 1 and with it everything in the container; return the exit status. Files and logs stay."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.kill(signal.SIGKILL)
        return self.wait(timeout)

    def delete(self) -> None:
        """Kill what still runs and remove everything; may be called again."""
        self._closing.close()

    def keep(self, destination: Path) -> None:
        """Copy the logs, for whoever looks into a failure."""
        destination.mkdir(parents=True, exist_ok=True)
        for name in ("stdout.log", "stderr.log", "runc.log", "config.json"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(self.home / name, destination / name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.delete()
