"""Restore: bring an application back into a container whose init waits for it.

The order, each step undone in reverse when a later one fails::

    open          marker, manifest, digests of everything but the bulk
    compare       facts of this machine and container; what the images ask for
    prefetch      storage begins to read the bulk
    files         changes of the root, volumes; stale files go, markers come
    criu          joins the container's control groups, keeps PIDs free, rebuilds the tree
      fill          at post-restore: memory is put back; the init is asked once more
    (resume)      the tree runs; CRIU ends and the tree falls to the init
    hand over     the init takes it as its application

One engine serves both ways: from outside the namespaces of the container are entered, from inside there
is nothing to enter. A failure or our death at ``post-restore`` makes CRIU kill the half-restored tree;
the container's init kills what else is left.
"""

from __future__ import annotations

import os
import select
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chrek.artifact import Level, is_pool_blob
from chrek.criu import credentials
from chrek.criu.bundle import Bundle
from chrek.criu.private import private_images
from chrek.criu.process import Criu, CriuFailed, Settings
from chrek.engine import compatibility, gpu, streams
from chrek.engine.container import Container
from chrek.engine.grown import Cut, written
from chrek.engine.progress import Progress
from chrek.engine.replay import Replay
from chrek.errors import ChrekError, Reason, Refused, RestoreFailed
from chrek.memory.fill import Verify, fill
from chrek.memory.index import INDEX_NAME
from chrek.memory.prefetch import prefetch
from chrek.memory.shard import Folders, read_index
from chrek.store.layout import Store
from chrek.store.opening import open_checkpoint
from chrek.system import cgroups, enter, procfs
from chrek.system.ids import HostPid, NsPid

if TYPE_CHECKING:
    from chrek.artifact import Checkpoint
    from chrek.criu.credentials import Tree
    from chrek.criu.messages import Notification
    from chrek.memory.index import Index
    from chrek.system.mailbox import Mailbox

RESTORE_LOG = "restore.log"

PID_WAIT = 5.0
"""Seconds to wait for a process (an exec probe) that has a PID the application needs."""

READY_BY_HELPER = b"chrek.workload"

_LOG_TAIL = 512 << 10


@dataclass(frozen=True)
class Request:
    """What to restore, where, and how.

    Attributes:
        pid1: the container's init, which waits.
        mailbox: the claim on it.
        store, checkpoint_id: the checkpoint.
        verify: which bulk data is compared with its digests; everything else always is.
        allow: refusals that the user overrides.
        scratch: directory for CRIU's log; never the checkpoint.
    """

    pid1: HostPid
    mailbox: Mailbox
    store: Store
    checkpoint_id: str
    verify: Verify = Verify.FULL
    allow: frozenset[Reason] = frozenset()
    settings: Settings = Settings()
    workers: int | None = None
    scratch: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A restore that worked; times in seconds, sizes in bytes."""

    root: NsPid
    seconds: float
    memory_bytes: int
    phases: Mapping[str, float]
    warnings: tuple[str, ...]


def restore(request: Request, progress: Progress | None = None) -> Outcome:
    """Restore into the container of a claimed init.

    Raises:
        Refused: nothing was touched.
        RestoreFailed: what was half restored is gone and the container's files are its own again. The caller
            tells the init, which then starts cold.
    """
    progress = progress or Progress()
    with ExitStack() as stack:
        stack.enter_context(request.mailbox.beating())
        with progress.phase("open"):
            checkpoint = stack.enter_context(open_checkpoint(request.store, request.checkpoint_id))
            work = _Work.open(checkpoint, stack, request.scratch)
        return _restore(request, checkpoint, work, progress)


def _restore(request: Request, checkpoint: Checkpoint, work: _Work, progress: Progress) -> Outcome:
    began = time.monotonic() - progress.seconds.get("open", 0.0)
    container = Container(request.pid1)
    with ExitStack() as stack:
        with progress.phase("prefetch"):
            stack.enter_context(prefetch(work.index, work.folders))
        with progress.phase("compare"):
            bundle = Bundle.find()
            bundle.require()
            _require_no_filter(container)
            warnings, bounded = _compare(request, container, checkpoint, work)
            gpus = gpu.plan(checkpoint.manifest, container)
        files = stack.enter_context(Replay(container, checkpoint))
        grown = stack.enter_context(Cut(container))
        with progress.phase("files"):
            by_helper = _files(container, checkpoint, files)
            grown.cut(written(work.images))
        filled = _criu(request, container, checkpoint, work, bundle, bounded.bounding, progress)
        if gpus is not None:
            gpus.restore(procfs.in_namespace(procfs.members("pid", container.pid1)), progress)
        with progress.phase("hand over"):
            request.mailbox.restored(NsPid(work.tree.root))
            files.keep()
            grown.keep()
            if not by_helper:
                _ready_again(container, checkpoint)
    return Outcome(
        root=NsPid(work.tree.root),
        seconds=time.monotonic() - began,
        memory_bytes=filled,
        phases=dict(progress.seconds),
        warnings=tuple(warnings + files.warnings + grown.warnings),
    )


def restore_inside(
    *,
    store: Path,
    checkpoint_id: str,
    pid1: HostPid,
    mailbox: Mailbox,
    verify: Verify,
    allow: frozenset[Reason],
    settings: Settings,
    scratch: str,
) -> Outcome:
    """Restore from inside a container, as a child of its init; the arguments are those of `Request`.

    Raises:
        ChrekError: as `restore`.
    """
    with Store.open(store) as opened, open_checkpoint(opened, checkpoint_id) as checkpoint, ExitStack() as stack:
        # Opened once: what decides which process ids are left free is what is restored then.
        work = _Work.open(checkpoint, stack, scratch)
        _move_away(work.tree)
        request = Request(
            pid1=pid1,
            mailbox=mailbox,
            store=opened,
            checkpoint_id=checkpoint_id,
            verify=verify,
            allow=allow,
            settings=settings,
            scratch=scratch,
        )
        stack.enter_context(mailbox.beating())
        return _restore(request, checkpoint, work, Progress())


def _move_away(tree: Tree) -> None:
    """Go on in a process whose id the application does not need; descriptors and the claim's pipe come along.

    Raises:
        RestoreFailed: ``PID_IN_USE``, when the kernel does not let ids be skipped.
    """
    if os.getpid() > tree.highest:
        return
    try:
        enter.keep_free(tree.highest + 64)
    except OSError as error:
        raise RestoreFailed(Reason.PID_IN_USE, f"Process ids up to {tree.highest} cannot be kept free: {error}.") from error
    if os.fork():
        os._exit(0)
    os.setsid()  # an id stays taken as long as it names somebody's session


@dataclass(frozen=True)
class _Work:
    """The checkpoint's parts, opened: our own view of its images, its memory and the index of it, the process tree."""

    images: int
    folders: Folders
    index: Index
    tree: Tree

    @classmethod
    def open(cls, checkpoint: Checkpoint, stack: ExitStack, scratch: str | None) -> _Work:
        directories = {}
        for name in ("images", "memory"):
            try:
                directories[name] = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=checkpoint.fd)
            except OSError as error:
                raise Refused(Reason.CORRUPT, f"{name}/ of the checkpoint: {error.strerror}.") from error
            stack.callback(os.close, directories[name])
        index = read_index(directories["memory"], checkpoint.manifest.files.get(f"memory/{INDEX_NAME}"))
        images = stack.enter_context(private_images(directories["images"], scratch))
        return cls(images, Folders(directories["memory"], directories["memory"]), index, credentials.read_tree(images))


def _compare(
    request: Request, container: Container, checkpoint: Checkpoint, work: _Work
) -> tuple[list[str], credentials.Bounded]:
    """Refuse what does not fit; return warnings, and what the images still ask for."""
    bulk = {file.path for file in work.index.files}
    # Pages are compared as they are put back, and pools' blocks when they are on the GPU: reading them twice would
    # double the time of a restore.
    bulk.update(path for path in checkpoint.manifest.files if is_pool_blob(path))
    level = Level(request.verify.value)
    checkpoint.verify(level, workers=request.workers, unread=bulk).require_ok(checkpoint.id)
    warnings = compatibility.check(checkpoint.manifest, container, allow=request.allow)
    credentials.check_names(work.images)
    credentials.check_namespaces(work.images)
    credentials.check_ghosts(work.images)
    cut = Reason.PRIVILEGE_EXCEEDED in request.allow
    bounded = credentials.bound_credentials(work.images, container.pid1, cut=cut)
    return [*warnings, *bounded.warnings], bounded


def _require_no_filter(container: Container) -> None:
    """Refuse to run CRIU under a seccomp filter: the restored processes would get it on top of their own."""
    state = procfs.status(os.getpid())
    if container.same_namespaces and state is not None and state.seccomp:
        message = "This container has a seccomp profile, under which CRIU cannot restore from inside."
        raise Refused(Reason.SECCOMP_INSIDE, message)


def _files(container: Container, checkpoint: Checkpoint, files: Replay) -> bool:
    """Apply file changes, remove what is stale, write markers.

    Return whether the application writes its ready file again itself: the workload helper does, after its
    own hooks, and says so in the file's second line.
    """
    application = checkpoint.manifest.application
    files.files()
    by_helper = bool(application.ready_file) and READY_BY_HELPER in files.read(application.ready_file or "")
    for stale in (application.ready_file, application.signal_file):
        if stale:
            files.remove(stale)
    environment = container.environment
    markers = {environment.get("DYN_RESTORE_MARKER_FILE") or "/tmp/dynamo-restored"}
    if application.marker_file:
        markers.add(application.marker_file)
    pools = _pool_directory(container, checkpoint)
    for marker in sorted(markers):
        files.write_marker(marker, **({"gpu_directory": pools} if pools else {}))
    return by_helper


def _pool_directory(container: Container, checkpoint: Checkpoint) -> str | None:
    """Return where the restored application finds its pools' files; None when it has none or cannot see them."""
    if not any(path.startswith("gpu/") for path in checkpoint.manifest.files):
        return None
    environment = container.environment
    base = environment.get("DYN_CHECKPOINT_PATH") or "/checkpoints"
    return f"{base.rstrip('/')}/{checkpoint.id}/gpu"


def _ready_again(container: Container, checkpoint: Checkpoint) -> None:
    """Write the ready file again where this container's own readiness probe looks for it."""
    named = container.environment.get("DYN_CHECKPOINT_READY_FILE")
    if named and checkpoint.manifest.application.ready_file:
        with Replay(container, checkpoint) as files:
            files.write(named, b"ready")
            files.keep()


# --- CRIU -------------------------------------------------------------------------------------------


def _criu(
    request: Request,
    container: Container,
    checkpoint: Checkpoint,
    work: _Work,
    bundle: Bundle,
    bounding: frozenset[int],
    progress: Progress,
) -> int:
    """Rebuild the tree and fill it; return the bytes filled."""
    deadline = time.monotonic() + PID_WAIT
    while True:
        try:
            return _try_criu(request, container, checkpoint, work, bundle, bounding, progress)
        except CriuFailed as error:
            if error.pid_taken and time.monotonic() < deadline:
                continue
            reason = Reason.PID_IN_USE if error.pid_taken else Reason.RESTORE_FAILED
            reason = Reason.TIMEOUT if error.timeout else reason
            raise RestoreFailed(reason, f"CRIU could not restore the application: {error}.") from error


def _try_criu(
    request: Request,
    container: Container,
    checkpoint: Checkpoint,
    work: _Work,
    bundle: Bundle,
    bounding: frozenset[int],
    progress: Progress,
) -> int:
    with ExitStack() as stack:
        inherit = streams.take(container, checkpoint.manifest.application.standard_streams)
        for fd in inherit.values():
            stack.callback(os.close, fd)
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="chrek-restore-", dir=request.scratch))
        log_directory = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, log_directory)
        groups = [] if container.same_namespaces else [cgroups.open_members(d) for d in cgroups.directories(container.pid1)]
        for fd in groups:
            stack.callback(os.close, fd)
        await_pids(container, work.tree)
        criu = stack.enter_context(
            Criu(
                bundle=bundle,
                pid1=container.pid1,
                images=work.images,
                work=log_directory,
                log=RESTORE_LOG,
                settings=request.settings,
                control_groups=groups,
                keep_free=work.tree.highest + 64,
                inherit=inherit,
                keep=bounding,
            )
        )
        filled = 0

        def serve(notification: Notification) -> None:
            nonlocal filled
            if notification.script == "post-restore":
                with progress.phase("fill"):
                    filled = _fill(request, work, criu.helper, progress)
                request.mailbox.ready(NsPid(work.tree.root))

        try:
            with progress.phase("criu"):
                criu.restore(serve, lsm_profile=credentials.lsm_option(container.pid1))
        finally:
            _send_log(request.mailbox, log_directory)
        return filled


def _fill(request: Request, work: _Work, helper: HostPid, progress: Progress) -> int:
    """Put the memory back into the tree, which waits in CRIU's own code; return the bytes."""
    # The helper's child is CRIU, and CRIU's child the root.
    host_pids = procfs.in_namespace(procfs.tree(helper))
    if not set(work.index.pids) <= set(host_pids):
        # A daemon whose session leader is gone is not below the root yet.
        host_pids = procfs.in_namespace(procfs.members("pid", request.pid1))
    filled = fill(
        work.index,
        work.folders,
        host_pids=host_pids,
        verify=request.verify,
        limits=progress.limits("fill", request.workers, total=work.index.size),
    )
    return filled.written


def await_pids(container: Container, tree: Tree) -> None:
    """Wait until no process of the container has an id that the tree needs.

    Raises:
        RestoreFailed: ``PID_IN_USE``, naming the process that stayed.
    """
    deadline = time.monotonic() + PID_WAIT
    needed = set(tree.pids)
    for pid in procfs.members("pid", container.pid1):
        state = procfs.status(pid)
        if state is None or state.ns_pid not in needed:
            continue
        if not _ends(state.pid, deadline):
            message = f"Process {state.ns_pid} ({state.name}) of the container has an id that the application needs."
            raise RestoreFailed(Reason.PID_IN_USE, message)


def _ends(pid: HostPid, deadline: float) -> bool:
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        return bool(select.select([fd], [], [], max(deadline - time.monotonic(), 0))[0])
    finally:
        os.close(fd)


def _send_log(mailbox: Mailbox, directory: int) -> None:
    """Give CRIU's log to the init, which keeps it in the container's own /tmp; losing it is no failure."""
    try:
        fd = os.open(RESTORE_LOG, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        with open(fd, "rb") as file:
            file.seek(max(os.fstat(fd).st_size - _LOG_TAIL, 0))
            mailbox.log(file.read())
    except (OSError, ChrekError):
        return
