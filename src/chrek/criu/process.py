"""One CRIU process at work inside a container: start it, serve it, read its log.

`dump` and `restore` below hold every option ChReK gives to CRIU, each with its reason.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from chrek.criu import features
from chrek.criu.bundle import Bundle, OpenBundle
from chrek.criu.messages import Answer, CgroupMode, InheritFd, NetworkLock, Notification, Options, Request, RequestType
from chrek.criu.rpc import Client, CriuGone
from chrek.system import launch, procfs
from chrek.system.ids import HostPid

if TYPE_CHECKING:
    from collections.abc import Callable

    from chrek.system.ids import NsPid

GHOST_LIMIT = (1 << 32) - 1
"""The largest deleted file CRIU may carry: the RPC field has 32 bits."""

DUMP_GRACE = 60.0
"""Seconds for CRIU to let an application go once it was hung up on. Pinning 100 GB, in which it does not listen, takes 13 s.
Killing it then is the lesser evil: in most states the kernel lets the application run on, and frozen it serves nobody."""

RESTORE_GRACE = 10.0
"""The same for a half-restored tree, which goes with it."""

# CRIU runs as root inside the container and needs much, but never these: loading modules, raw I/O,
# rebooting, making devices. What is not in its bounding set, no image can make it do.
_NEVER = {"SYS_MODULE": 16, "SYS_RAWIO": 17, "SYS_PACCT": 20, "SYS_BOOT": 22, "MKNOD": 27, "MAC_ADMIN": 33}


class CriuFailed(Exception):
    """CRIU said no, died, or took too long.

    Attributes:
        lines: the last error lines of its log, oldest first.
        pid_taken: whether a process id it needs is in use.
    """

    def __init__(self, what: str, lines: list[str], *, pid_taken: bool = False, timeout: bool = False) -> None:
        super().__init__(f"{what}: {' | '.join(lines)}" if lines else what)
        self.lines = lines
        self.pid_taken = pid_taken
        self.timeout = timeout


@dataclass(frozen=True)
class Settings:
    """What of CRIU a user can tune.

    Attributes:
        timeout: seconds for one operation, 0 for no limit.
        log_level: 0 to 4.
        skip_in_flight: leave out connections that are not yet accepted. Without it one that a probe is just
            making would fail the dump, and connections to outside are closed in the restored application anyway.
        auto_dedup: see CRIU.
    """

    timeout: int = 0
    log_level: int = 4
    skip_in_flight: bool = True
    auto_dedup: bool = False


@dataclass
class Criu:
    """A CRIU process in the namespaces of *pid1*, or right here when they are ours.

    Used as a context; leaving it hangs up (which makes a CRIU at work roll back) and reaps.

    Attributes:
        pid1: whose namespaces to enter.
        images: descriptor of the image directory.
        work: descriptor of the directory for CRIU's log and statistics.
        log: name of the log there.
        control_groups: groups to join first (see `chrek.system.launch.Spec`).
        keep_free: PIDs up to this one are kept free before it starts.
        inherit: descriptors the restored processes take over, by CRIU's key.
        keep: capabilities (numbers) that stay allowed although they are on the list of those never needed.
        real_ids: real user and group id to run with (see `chrek.criu.limits`); None is root.
        page_server: give CRIU one end of a socket pair to serve lazy pages on.
        check: called while waiting; what it raises makes CRIU roll back.
    """

    bundle: Bundle
    pid1: HostPid
    images: int
    work: int
    log: str
    settings: Settings = field(default_factory=Settings)
    control_groups: list[int] = field(default_factory=list)
    keep_free: int = 0
    inherit: dict[str, int] = field(default_factory=dict)
    keep: frozenset[int] = frozenset()
    real_ids: tuple[int, int] | None = None
    page_server: bool = False
    check: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self._stack = ExitStack()
        self._helper: subprocess.Popen[bytes] | None = None
        self._pages: socket.socket | None = None
        self._grace = DUMP_GRACE
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the stack

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._errors)
            cached = stack.enter_context(features.lend(self.bundle, self.work))
            with ExitStack() as ours:
                # Open, it stays an empty directory; gone from its place, nobody has to clear it away who may be killed.
                empty = Path(tempfile.mkdtemp(prefix="chrek-empty-"))
                try:
                    opened = OpenBundle.open(self.bundle, empty)
                finally:
                    empty.rmdir()
                ours.callback(opened.close)
                channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.callback(theirs.close)
                options = ["--work-dir", f"/proc/self/fd/{self.work}"]
                keep = [*opened.descriptors, self.images, self.work, theirs.fileno(), *self.inherit.values()]
                if self.page_server:
                    # Over TCP, CRIU's page server would listen on every address of the pod, and wait for ever
                    # for a client that died: one end of a socket pair has neither trouble.
                    self._pages, pages = socket.socketpair()
                    ours.callback(pages.close)
                    options += ["--ps-socket", str(pages.fileno())]
                    keep.append(pages.fileno())
                namespaces = launch.open_namespaces(self.pid1)
                for fd in namespaces:
                    ours.callback(os.close, fd)
                spec = launch.Spec(
                    program=opened.loader,
                    arguments=opened.arguments(*options, "swrk", str(theirs.fileno())),
                    environment=opened.environment(),
                    keep=keep,
                    namespaces=namespaces,
                    control_groups=self.control_groups,
                    keep_free=self.keep_free,
                    drop=sorted(set(_NEVER.values()) - self.keep),
                    real_ids=list(self.real_ids or ()),
                )
                self._helper = launch.start(spec, stderr=self._errors)
                if namespaces and not cached:
                    # Once a boot, when the work is done: the next one starts faster.
                    stack.callback(features.prepare, self.bundle)
            deadline = time.monotonic() + self.settings.timeout if self.settings.timeout else None
            self._client = Client(channel, deadline=deadline, check=self.check)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hang_up()
        self._stack.close()

    def _hang_up(self) -> None:
        self._client.close()
        self.end_pages()
        if self._helper is None:
            return
        try:
            self._helper.wait(self._grace)
        except subprocess.TimeoutExpired:
            # Children first; the helper ends by itself once it has reaped CRIU.
            for pid in reversed(procfs.tree(self.helper)[1:] or [self.helper]):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._helper.wait()

    @property
    def helper(self) -> HostPid:
        """The process whose child CRIU is."""
        assert self._helper is not None
        return HostPid(self._helper.pid)

    def end_pages(self) -> None:
        """Close our end of the page server's socket: CRIU takes every lazy page as served."""
        if self._pages is not None:
            self._pages.close()
            self._pages = None

    def dump(
        self,
        root: NsPid,
        on_notification: Callable[[Notification], None],
        *,
        watched: list[str],
        external: list[str],
    ) -> None:
        """Dump the tree under *root* and leave it running.

        Raises:
            CriuFailed: it did not work; the tree runs on.
        """
        options = self._common()
        options.pid = root
        options.leave_running = True
        # Deleted files that are still open travel in the images as long as the 32-bit limit allows.
        options.ghost_limit = GHOST_LIMIT
        options.tcp_skip_in_flight = self.settings.skip_in_flight
        options.lazy_pages = self.page_server
        options.auto_dedup = self.settings.auto_dedup
        options.external = external
        # inotify on overlayfs has no usable file handles: CRIU looks the inodes up under these paths instead.
        options.force_irmap = bool(watched)
        options.irmap_scan_paths = watched
        self._call(RequestType.DUMP, options, on_notification)

    def restore(self, on_notification: Callable[[Notification], None], *, lsm_profile: str | None) -> int:
        """Restore the tree and return its root's PID in the container.

        Raises:
            CriuFailed: it did not work; nothing of the tree is left.
        """
        self._grace = RESTORE_GRACE
        options = self._common()
        options.inherit_fd = [InheritFd(key=key, fd=fd) for key, fd in self.inherit.items()]
        options.lsm_profile = lsm_profile
        answer = self._call(RequestType.RESTORE, options, on_notification)
        return answer.restore.pid if answer.restore and answer.restore.pid else 0

    def _common(self) -> Options:
        return Options(
            images_dir_fd=-1,
            images_dir=f"/proc/self/fd/{self.images}",
            log_file=self.log,
            log_level=self.settings.log_level,
            notify_scripts=True,
            # Left out, it would be CRIU's own 10 seconds; 0 is no limit. The whole call's deadline is ours.
            timeout=self.settings.timeout,
            # A socket whose other end is outside (a log daemon's) is no reason to give up.
            ext_unix_sk=True,
            # Pairs inside the tree survive; the others are turned into closed sockets in the images.
            tcp_established=True,
            file_locks=True,
            # Names unlinked while open (a spawned process's semaphore) get a temporary link, kept in the checkpoint.
            link_remap=True,
            # Restored processes stay in the groups CRIU was put into: the container's.
            manage_cgroups_mode=CgroupMode.IGNORE,
            # A network lock would need iptables or nft from the container, and nothing there may be run.
            network_lock=NetworkLock.SKIP,
            # The other end of a pseudo-terminal may be held by a process that is gone.
            orphan_pts_master=True,
        )

    def _call(self, kind: RequestType, options: Options, on_notification: Callable[[Notification], None]) -> Answer:
        try:
            answer = self._client.call(Request(type=kind, opts=options), on_notification)
        except CriuGone as error:
            self._hang_up()
            raise CriuFailed(f"{error}{self._helper_words()}", self.error_lines()) from error
        except TimeoutError as error:
            self._hang_up()
            raise CriuFailed(str(error), self.error_lines(), timeout=True) from error
        except BaseException:
            self._hang_up()
            raise
        if not answer.success:
            lines = self.error_lines()
            taken = answer.errno == 17 or any("File exists" in line and "fork" in line for line in lines)
            raise CriuFailed("CRIU refused", lines, pid_taken=taken)
        return answer

    def _helper_words(self) -> str:
        self._errors.seek(0)
        words = self._errors.read(2000).decode(errors="replace").strip()
        return f" ({words})" if words else ""

    def error_lines(self, most: int = 4) -> list[str]:
        """Return the last error lines of the log, without their time stamps."""
        try:
            fd = os.open(self.log, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.work)
        except OSError:
            return []
        with open(fd, "rb") as file:
            file.seek(max(os.fstat(fd).st_size - (1 << 18), 0))
            text = file.read().decode(errors="replace")
        found = re.findall(r"Error \(([^)]*)\): *(.*)", text)
        # Without CAP_SYS_RESOURCE this one is always there and never the cause.
        lines = [f"{message} [{where}]" for where, message in found if "Can't setup RLIMIT_NOFILE" not in message]
        return lines[-most:]
