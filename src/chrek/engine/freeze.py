"""What happens while the application stands still.

CRIU has stopped the tree, written every image, and waits for our answer at ``post-dump``. Everything
that must be of one instant is copied now, in parallel: memory, what the container changed in its root
file system, and the volumes that are the application's own. Whatever fails here is raised: CRIU is
told no, undoes its part, and the application runs on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from chrek.artifact import Application, FileEntry, SideFile, Volume
from chrek.criu import pagemaps
from chrek.engine import facts, sidefiles
from chrek.errors import CaptureFailed, Reason
from chrek.memory.capture import Captured, capture
from chrek.memory.ranges import PageRun, Range
from chrek.memory.sharing import shared_pages
from chrek.rootfs import fd as fds
from chrek.rootfs.capture import Packed, diff_overlay, pack_tree
from chrek.rootfs.overlay import container_overlay, mount_points
from chrek.system import procfs
from chrek.system.ids import HostPid, NsPid
from chrek.system.runs import Run, subtract, union

if TYPE_CHECKING:
    from chrek.engine.container import Container
    from chrek.engine.progress import Progress

MINIMUM_RUN = 1 << 16
"""Shorter runs of a plain dump stay with CRIU: an index entry and a system call cost more than 64 KiB of copy."""


@dataclass
class Frozen:
    """What was copied.

    Attributes:
        application: the processes as they stood.
        memory: figures and index of a lazy dump's pages; None for a plain one.
        adopted: a plain dump's moved pages, by the number of the page image they lie in.
        archives: what is known of each archive written, by its path in the checkpoint.
        volumes: the volumes among them.
        side_files: link-remap files that lie in none of them.
        warnings: what changed under the copy, for people.
    """

    application: Application
    memory: Captured | None = None
    adopted: dict[int, list[PageRun]] = field(default_factory=dict)
    archives: dict[str, FileEntry] = field(default_factory=dict)
    volumes: list[Volume] = field(default_factory=list)
    side_files: list[SideFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What to copy and where.

    Attributes:
        directory: descriptor of the checkpoint's directory.
        images, folder, links: descriptors of its ``images/``, ``memory/`` and ``links/``.
        mode: ``lazy`` when CRIU left the pages to us, ``plain`` when it wrote them.
        root_changes: whether the container's root is an overlay of its own, whose changes are taken.
        volumes: (path in the container, kind) of each volume to take.
        exclude: the user's patterns of files to leave out.
        gpu_processes: those of the tree whose GPU state the driver has put into their memory.
        digest_now: whether pages are digested during the copy rather than after the thaw.
    """

    container: Container
    root: HostPid
    directory: int
    images: int
    folder: int
    links: int
    mode: Literal["lazy", "plain"]
    root_changes: bool
    volumes: list[tuple[str, str]]
    exclude: tuple[str, ...]
    workers: int | None
    gpu_processes: tuple[NsPid, ...]
    digest_now: bool


def copy(plan: Plan, progress: Progress) -> Frozen:
    """Copy everything of this instant.

    Raises:
        CaptureFailed: with the reason of the first thing that failed; the other copies have stopped.
    """
    tree = procfs.tree(plan.root)
    frozen = Frozen(application=facts.application(plan.container, tree, plan.gpu_processes))
    stop = threading.Event()
    jobs: list[Callable[[], None]] = [lambda: _memory(plan, tree, frozen, progress, stop), lambda: _side_files(plan, frozen)]
    if plan.root_changes:
        jobs.append(lambda: _root_changes(plan, frozen))
    for number, (path, kind) in enumerate(plan.volumes):
        jobs.append(_volume_job(plan, frozen, number, path, kind))
    with ThreadPoolExecutor(len(jobs), thread_name_prefix="frozen") as pool:
        futures = [pool.submit(job) for job in jobs]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [future for future in done if future.exception()]
        if failed:
            stop.set()
    _raise_first(futures)
    return frozen


def _raise_first(futures: list[Future[None]]) -> None:
    errors = [error for future in futures if (error := future.exception()) is not None]
    # A job that was stopped because of another's failure says CAPTURE_INTERRUPTED: the other one is the cause.
    errors.sort(key=lambda error: getattr(error, "reason", None) is Reason.CAPTURE_INTERRUPTED)
    if errors:
        raise errors[0]


# --- memory -----------------------------------------------------------------------------------------


def _memory(plan: Plan, tree: list[HostPid], frozen: Frozen, progress: Progress, stop: threading.Event) -> None:
    processes = pagemaps.read(plan.images)
    # A zombie is in the tree and has no memory.
    alive = {process.pid for process in processes}
    host_pids = {pid: host for pid, host in procfs.in_namespace(tree).items() if pid in alive}
    runs = (
        pagemaps.lazy_runs(processes)
        if plan.mode == "lazy"
        else pagemaps.movable_runs(plan.images, processes, minimum=MINIMUM_RUN)
    )
    kept = _kept(plan, host_pids, runs)
    moved = {pid: subtract(own, kept.get(pid, [])) for pid, own in runs.items()}
    split = pagemaps.split(
        plan.images,
        processes,
        moved,
        lambda pid, at, size: _read(host_pids[pid], at, size),
        aside=plan.folder if plan.mode == "plain" else None,
    )
    if plan.mode == "plain":
        for pid, start, length, number, offset in split.adopted:
            frozen.adopted.setdefault(number, []).append(PageRun(Range(pid, start, length), offset))
        return
    with progress.phase("memory"):
        frozen.memory = capture(
            [Range(pid, start, length) for pid, own in moved.items() for start, length in own],
            host_pids=host_pids,
            folder=plan.folder,
            digest=plan.digest_now,
            limits=progress.limits("memory", plan.workers, stop),
        )


def _kept(plan: Plan, host_pids: dict[NsPid, HostPid], runs: dict[NsPid, list[Run]]) -> dict[NsPid, list[Run]]:
    """Return the runs that must stay in CRIU's images."""
    threads = {pid: _thread_ids(host) for pid, host in host_pids.items()}
    kept = pagemaps.rseq_runs(plan.images, threads)
    if len(runs) > 1:
        shared = shared_pages(
            _parents(host_pids),
            [Range(pid, start, length) for pid, own in runs.items() for start, length in own],
            host_pids=host_pids,
        )
        for span in shared:
            kept.setdefault(span.pid, []).append((span.start, span.length))
    return {pid: union(own) for pid, own in kept.items()}


def _thread_ids(pid: HostPid) -> list[int]:
    """Return the thread ids of *pid* as its own PID namespace numbers them: the names of its core images."""
    found = []
    for thread in procfs.threads(pid):
        state = procfs.status(thread)
        if state is not None:
            found.append(int(state.ns_pid))
    return found


def _parents(host_pids: dict[NsPid, HostPid]) -> dict[NsPid, NsPid | None]:
    by_host = {host: pid for pid, host in host_pids.items()}
    parents: dict[NsPid, NsPid | None] = {}
    for pid, host in host_pids.items():
        state = procfs.status(host)
        parents[pid] = by_host.get(state.parent) if state else None
    return parents


def _read(pid: HostPid, address: int, length: int) -> bytes:
    """Read memory whatever its protection: /proc/PID/mem does not ask for it."""
    try:
        fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(fd, length, address)
        finally:
            os.close(fd)
    except OSError as error:
        raise CaptureFailed(Reason.MEMORY_UNREADABLE, f"Process {pid} at {address:#x}: {error.strerror}.") from error
    if len(data) != length:
        raise CaptureFailed(Reason.MEMORY_UNREADABLE, f"Process {pid} has no {length} bytes at {address:#x}.")
    return data


# --- files ------------------------------------------------------------------------------------------


def _root_changes(plan: Plan, frozen: Frozen) -> None:
    with container_overlay(plan.container.pid1) as overlay:
        _archive(
            plan,
            frozen,
            "rootfs.tar",
            lambda out: diff_overlay(
                overlay, out, mount_points=mount_points(plan.container.pid1), exclude=plan.exclude, blocks=True
            ),
        )


def _volume_job(plan: Plan, frozen: Frozen, number: int, path: str, kind: str) -> Callable[[], None]:
    def job() -> None:
        name = f"volumes/{number}.tar"
        root = plan.container.open_root()
        try:
            directory = fds.open_in_root(root, os.fsencode(path.lstrip("/")))
        finally:
            os.close(root)
        try:
            _archive(plan, frozen, name, lambda out: pack_tree(directory, out, name=name, exclude=plan.exclude, blocks=True))
        finally:
            os.close(directory)
        frozen.volumes.append(Volume(path=path, kind=kind, archive=name))

    return job


def _side_files(plan: Plan, frozen: Frozen) -> None:
    covered = [path for path, _ in plan.volumes]
    frozen.side_files = sidefiles.save(plan.container, plan.images, plan.links, covered=covered)


def _archive(plan: Plan, frozen: Frozen, name: str, write: Callable[[int], Packed]) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        out = os.open(name, flags, 0o600, dir_fd=plan.directory)
    except OSError as error:
        raise CaptureFailed(Reason.WRITE_FAILED, f"{name} cannot be made: {error.strerror}.") from error
    try:
        packed = write(out)
    finally:
        os.close(out)
    frozen.archives[name] = packed.entry
    frozen.warnings += [f"{path} changed while it was copied" for path in packed.changed]
    frozen.warnings += [f"{path} vanished while it was copied" for path in packed.vanished]
