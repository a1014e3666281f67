"""The application, from fork to exec.

It becomes the leader of its own session (CRIU dumps a tree whose session it contains), the reaper of
its orphans (they come to it as if it were PID 1), optionally blind to io_uring and MPTCP, and otherwise exactly
what the runtime would have started: the signal mask and dispositions, environment and descriptors of
`Inherited`. The init's own descriptors are all close-on-exec.

The program is looked up along the application's own PATH as execvp(3) does, without its fallback to
a shell: a runtime would not have run such a file either. What went wrong comes back through a pipe
that a successful exec closes.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # what `signal` wraps, without its enums: 3 ms
import ctypes
import errno
import os

from chrek.entrypoint.signals import SIGCHLD, SIGINT, SIGPIPE, SIGXFSZ, bit, set_mask
from chrek.entrypoint.terminal import take
from chrek.system.record import record
from chrek.system.seccomp import hide_what_criu_cannot_dump
from chrek.system.syscalls import LIBC, prctl

TYPE_CHECKING = False  # see chrek.system.ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chrek.entrypoint.inherited import Inherited

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""How a shell ends when a command is not there, or cannot be run."""

DEFAULT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""What container runtimes assume where an image sets no PATH."""

PR_SET_CHILD_SUBREAPER = 36
_TRY_NEXT = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP))


class ExecFailed(Exception):
    """The command could not be run; `code` is what a shell would end with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@record
class Plan:
    """What to run and how."""

    arguments: tuple[bytes, ...]
    inherited: Inherited
    terminal: int | None = None
    block_io_uring: bool = False
    set_no_new_privs: bool = False


def start(plan: Plan) -> int:
    """Start the application and return its process id once it runs; raise `ExecFailed` if it does not."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(plan, writing)
    os.close(writing)
    try:
        report = os.read(reading, 4096)
    finally:
        os.close(reading)
    if not report:
        return pid
    os.waitpid(pid, 0)
    code, _, message = report.partition(b" ")
    raise ExecFailed(int(code), os.fsdecode(message))


def candidates(program: bytes, path: bytes | None) -> list[bytes]:
    """Return the files to try, in order: the program itself if it names a directory, else along PATH."""
    if b"/" in program or not program:
        return [program]
    directories = (DEFAULT_PATH if path is None else path).split(b":")
    return [(directory or b".") + b"/" + program for directory in directories]


def _become(plan: Plan, report: int) -> None:
    """Turn this forked process into the application; never returns."""
    code, message = 1, b""
    try:
        os.setsid()
        if plan.terminal is not None:
            take(plan.terminal)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        if plan.block_io_uring:
            hide_what_criu_cannot_dump(set_no_new_privs=plan.set_no_new_privs)
        # Built before the mask falls: from there on a signal acts as the application's would.
        files = candidates(plan.arguments[0], plan.inherited.variable(b"PATH"))
        arguments, environ = _strings(plan.arguments), _strings(plan.inherited.environ)
        _restore_signals(plan.inherited)
        code, message = _exec(files, arguments, environ)
    except BaseException as error:  # noqa: BLE001 - nothing may return into the init's code in this process
        message = os.fsencode(f"the application could not be prepared: {error}")
    os.write(report, b"%d %s" % (code, message[:4000]))
    os._exit(code)


def _restore_signals(inherited: Inherited) -> None:
    for number in (SIGPIPE, SIGXFSZ, SIGINT, SIGCHLD):
        ignored = inherited.ignored & bit(number)
        _signal.signal(number, _signal.SIG_IGN if ignored else _signal.SIG_DFL)
    set_mask(inherited.blocked)


def _exec(
    files: Sequence[bytes], arguments: ctypes.Array[ctypes.c_char_p], environ: ctypes.Array[ctypes.c_char_p]
) -> tuple[int, bytes]:
    """Try each file; return the exit code and message if none runs."""
    denied: bytes | None = None
    for file in files:
        # The raw call: os.execve takes a mapping, which has no duplicates and no order.
        LIBC.execve(file, arguments, environ)
        failure = ctypes.get_errno()
        if failure == errno.EACCES:
            denied = denied or file
        elif failure not in _TRY_NEXT:
            return NOT_EXECUTABLE, _cannot(file, failure)
        elif os.path.exists(file):
            return NOT_EXECUTABLE, b"%s: the interpreter that it names does not exist in this image" % file
    if denied is not None:
        return NOT_EXECUTABLE, _cannot(denied, errno.EACCES)
    name = arguments[0] or b""
    where = b"" if b"/" in name else b" in PATH (" + b":".join(os.path.dirname(file) for file in files) + b")"
    return NOT_FOUND, b"%s: command not found%s" % (name or b"''", where)


def _cannot(file: bytes, failure: int) -> bytes:
    hint = ""
    if failure == errno.ENOEXEC:
        hint = " (built for another architecture, or a script without a #! line)"
    return b"%s: cannot be run: %s" % (file, os.fsencode(os.strerror(failure) + hint))


def _strings(items: Sequence[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(items) + 1))(*items, None)
