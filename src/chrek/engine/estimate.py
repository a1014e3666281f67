"""How much a capture will write, and which way of dumping the limits allow."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from chrek.engine.container import closing_fd
from chrek.errors import Reason, Refused
from chrek.memory.crew import default_workers
from chrek.rootfs import fd as fds
from chrek.rootfs.overlay import container_overlay
from chrek.system import procfs

if TYPE_CHECKING:
    from chrek.engine.preflight import Subject

PIPE_BYTES = 1 << 20
"""A lazy dump keeps every page in pipes of at most this size (fs.pipe-max-size), two descriptors each."""

SPARE_DESCRIPTORS = 2048
"""What CRIU and its pages of other kinds need besides; fragmented memory fills pipes less than fully."""

DIGEST_CORES = 4
"""With more cores than this all pages are digested during the copy. On two that would keep the application frozen 0.06 s
a GB longer, and save 0.03 s of the whole (GMAC at 0.12 s of a core a GB, reading back at 0.06; 2-core EPYC, ext4).
With many cores both are small, and a pass over the files is one that can fail."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that a capture may write, and how it is to be done.

    Attributes:
        bytes: all files together.
        largest_file: the largest of them.
        resident: private and shared memory of the tree, what a restore needs.
        mode: ``lazy`` or ``plain``.
        digest_now: whether to digest pages during the copy.
    """

    bytes: int
    largest_file: int
    resident: int
    mode: Literal["lazy", "plain"]
    digest_now: bool


def estimate(
    subject: Subject, volumes: Iterable[str], *, mode: Literal["auto", "lazy", "plain"], on_gpu: int = 0
) -> Estimate:
    """Look at the tree's memory, at what the container changed, and at the limits of this process.

    *on_gpu* bytes of GPU memory will be private memory, too, once the driver has saved them.

    Raises:
        Refused: ``NOT_SUPPORTED_HERE``, when a lazy dump was asked for and cannot be had.
    """
    private, total = on_gpu, on_gpu
    for pid in subject.tree:
        own, all_ = _memory(pid)
        private, total = private + own, total + all_
    possible = lazy_limit()
    if mode == "lazy" and private > possible:
        message = f"A lazy dump of {private} bytes needs more open files than allowed: {possible} bytes at most."
        raise Refused(Reason.NOT_SUPPORTED_HERE, message, cure="Raise the hard limit of open files, or dump plainly.")
    # Medians of five, 2-core EPYC, ext4, busy: 4 GB frozen 3.5 s lazily against 4.4 s, in all 6.4 against 7.0 s; 1 GB
    # 0.67 against 0.55 s and 1.9 against 1.4 s. One way for all sizes: only a lazy dump leaves zero pages out.
    lazy = mode == "lazy" or (mode == "auto" and private <= possible)
    files = _files(subject, volumes)
    return Estimate(
        bytes=private + files,
        largest_file=max(files, private if not lazy else private // 4),
        resident=total,
        mode="lazy" if lazy else "plain",
        digest_now=default_workers() > DIGEST_CORES,
    )


def _memory(pid: int) -> tuple[int, int]:
    """Return (private, proportional) memory of a process in bytes, from smaps_rollup."""
    text = procfs.read_text(pid, "smaps_rollup") or ""
    fields = dict(line.split(":", 1) for line in text.splitlines()[1:] if ":" in line)

    def size(key: str) -> int:
        return int(fields.get(key, "0 kB").split()[0]) * 1024

    return size("Anonymous"), size("Pss_Anon") + size("Pss_Shmem")


def _files(subject: Subject, volumes: Iterable[str]) -> int:
    """Return the bytes on disk of the root's changes and of the volumes."""
    container = subject.container
    total = 0
    if container.has_own_root:
        with container_overlay(container.pid1) as overlay:
            total += _used(overlay.upper)
    with closing_fd(container.open_root()) as root:
        for path in volumes:
            with suppress(OSError), closing_fd(fds.open_in_root(root, os.fsencode(path.lstrip("/")))) as directory:
                total += _used(directory)
    return total


def _used(directory: int) -> int:
    total = 0
    for _, _, names, fd in os.fwalk(".", dir_fd=directory):
        for name in names:
            with suppress(OSError):
                total += os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512
    return total


def lazy_limit() -> int:
    """Return how many bytes a lazy dump can hold under the limit of open files."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with open("/proc/sys/fs/nr_open", encoding="ascii") as file:
        most = int(file.read())
    if hard in (resource.RLIM_INFINITY, -1) or _may_raise():
        hard = most
    return max(hard - SPARE_DESCRIPTORS, 0) // 2 * PIPE_BYTES


def _may_raise() -> bool:
    state = procfs.status(os.getpid())
    sys_resource = 24
    return bool(state and state.capabilities.get("CapEff", 0) >> sys_resource & 1)
