"""What a checkpoint holds, for people: memory by kind, open files, sockets.

Everything is read from the images and the memory index; nothing is decoded that a restore would not decode too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

from chrek.artifact import Level
from chrek.criu import pagemaps
from chrek.criu.images import Image, matching, read_all
from chrek.criu.messages import FdInfo, File, InetSocket, PagemapEntry
from chrek.criu.messages import Memory as MemoryImage
from chrek.errors import Reason, Refused
from chrek.memory.index import INDEX_NAME, SKIPPED, Index
from chrek.memory.shard import read_index
from chrek.system.protobuf import RAW, UINT32, Message, WireError, field, nested
from chrek.system.runs import Run, RunSet, union

if TYPE_CHECKING:
    from chrek.artifact import Checkpoint
    from chrek.system.ids import NsPid

PAGE = 4096

DAMAGE = (WireError, ValueError, IndexError, StopIteration)
"""What the decoders of images raise for entries that are missing or of another form."""

_KINDS = (
    (1 << 3, "vdso"),
    (1 << 12, "vdso"),
    (1 << 14, "shared memory"),
    (1 << 8, "shared memory"),
    (1 << 10, "System V shared"),
    (1 << 7, "shared file"),
    (1 << 6, "private file"),
    (1 << 5, "heap"),
    (1 << 1, "stack"),
    (1 << 9, "private anonymous"),
)
"""Bits of a VMA's status (``criu/include/image.h``), the more telling first."""

_TYPES = {
    1: "file", 2: "pipe", 3: "FIFO", 4: "socket", 5: "unix socket", 6: "eventfd", 7: "epoll", 8: "inotify",
    9: "signalfd", 10: "packet socket", 11: "terminal", 12: "fanotify", 13: "netlink socket", 14: "namespace",
    15: "tunnel", 16: "external", 17: "timerfd", 18: "memfd", 19: "BPF map", 20: "pidfd",
}  # fmt: skip
"""``fd_types`` of CRIU's ``images/fdinfo.proto``."""

_INET_STATES = {1: "established", 2: "connecting", 7: "closed", 10: "listening"}
_UNIX_STATES = {1: "connected", 7: "unconnected", 10: "listening"}


@dataclass
class _UnixSocket(Message):
    """``unix_sk_entry``; a name that begins with NUL is abstract."""

    id: int = field(1, UINT32, required=True)
    type: int = field(3, UINT32, required=True)
    state: int = field(4, UINT32, required=True)
    name: bytes = field(11, RAW, required=True)


@dataclass
class _AnyFile(File):
    """``file_entry`` with one more kind that is shown by name."""

    unix: _UnixSocket | None = nested(16, _UnixSocket)


@dataclass
class _ObjectIds(Message):
    """``task_kobj_ids_entry``: which table of open files a process uses."""

    files: int = field(2, UINT32, required=True)


@dataclass(frozen=True)
class MemoryKind:
    """Memory of one kind in one process, in bytes: how much address space, and how much of it is stored.

    What is in shared memory is stored once, not for each process that maps it: *pid* is 0 there.
    """

    pid: int
    kind: str
    mapped: int
    stored: int


@dataclass(frozen=True)
class OpenDescriptor:
    """One open file of a process: its kind, and its name or address where it has one."""

    pid: int
    number: int
    kind: str
    name: str


@dataclass(frozen=True)
class Contents:
    """The memory and the open files of all processes."""

    memory: tuple[MemoryKind, ...]
    files: tuple[OpenDescriptor, ...]

    @property
    def sockets(self) -> tuple[OpenDescriptor, ...]:
        """The open files that are sockets with a name or an address."""
        return tuple(file for file in self.files if file.kind in {"socket", "unix socket"})


def read(checkpoint: Checkpoint) -> Contents:
    """Read what a checkpoint holds; the digests of all that is looked at are compared first.

    Raises:
        Refused: ``CORRUPT``.
    """
    checkpoint.verify(Level.OFF).require_ok(checkpoint.id)
    try:
        return _read(checkpoint)
    except DAMAGE as error:  # the digests are right: whoever wrote this wrote nonsense
        raise Refused(Reason.CORRUPT, f"The images of checkpoint {checkpoint.id} make no sense: {error!r}.") from error


def _read(checkpoint: Checkpoint) -> Contents:
    with ExitStack() as stack:
        directories = []
        for name in ("images", "memory"):
            try:
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=checkpoint.fd)
            except OSError as error:
                raise Refused(Reason.CORRUPT, f"{name}/ of the checkpoint: {error.strerror}.") from error
            stack.callback(os.close, fd)
            directories.append(fd)
        images, memory = directories
        index = read_index(memory, checkpoint.manifest.files.get(f"memory/{INDEX_NAME}"))
        return Contents(tuple(_memory(images, index)), tuple(_files(images)))


# --- memory -----------------------------------------------------------------------------------------


def _memory(images: int, index: Index) -> Iterator[MemoryKind]:
    moved = _moved(index)
    for process in pagemaps.read(images):
        kept = [
            (entry.vaddr, entry.pages * PAGE) for entry in process.entries if (entry.flags or 0) & pagemaps.PE_PRESENT
        ]
        stored = RunSet(union([*kept, *moved.get(process.pid, [])]))
        sums: dict[str, list[int]] = {}
        for area in next(Image[MemoryImage].read(images, f"mm-{process.pid}.img").decode(MemoryImage)).vmas:
            length = area.end - area.start
            total = sums.setdefault(_kind(area.status), [0, 0])
            total[0] += length
            total[1] += sum(size for _, size in stored.inside(area.start, length))
        for kind, (mapped, held) in sorted(sums.items()):
            yield MemoryKind(process.pid, kind, mapped, held)
    shared = 0
    for name in matching(images, r"pagemap-shmem-(\d+)\.img").values():
        entries = Image[PagemapEntry].read(images, name).decode(PagemapEntry, 1)
        shared += sum(entry.pages * PAGE for entry in entries if (entry.flags or 0) & pagemaps.PE_PRESENT)
    if shared:
        yield MemoryKind(0, "shared memory", 0, shared)


def _moved(index: Index) -> dict[NsPid, list[Run]]:
    found: dict[NsPid, list[Run]] = {pid: [] for pid in index.pids}
    for block in index.blocks():
        for address, pages, process in index.runs_of(block):
            if process != SKIPPED:
                found[index.pids[process]].append((address, pages * PAGE))
    return found


def _kind(status: int) -> str:
    return next((name for bit, name in _KINDS if status & bit), "other")


# --- files ------------------------------------------------------------------------------------------


def _files(images: int) -> Iterator[OpenDescriptor]:
    known = {(file.type, file.id): file for file in read_all(images, "files.img", _AnyFile)}
    for pid, name in matching(images, r"ids-(\d+)\.img").items():
        for ids in Image[_ObjectIds].read(images, name).decode(_ObjectIds):
            try:
                table = read_all(images, f"fdinfo-{ids.files}.img", FdInfo)
            except Refused:
                table = []  # a process without open files has none
            for entry in sorted(table, key=lambda entry: entry.fd):
                file = known.get((entry.type, entry.id))
                yield OpenDescriptor(pid, entry.fd, _TYPES.get(entry.type, f"type {entry.type}"), _name(file))


def _name(file: _AnyFile | None) -> str:
    if file is None:
        return ""
    if file.regular is not None:
        return file.regular.name
    if file.inet is not None:
        return _inet_name(file.inet)
    if file.unix is not None:
        name = (file.unix.name or b"").rstrip(b"\0")
        shown = "@" + os.fsdecode(name[1:]) if name[:1] == b"\0" else os.fsdecode(name)
        return f"{shown or 'unnamed'} {_UNIX_STATES.get(file.unix.state, '')}".rstrip()
    return ""


def _inet_name(socket: InetSocket) -> str:
    protocol = {1: "tcp", 2: "udp", 3: "raw"}.get(socket.type, f"type {socket.type}")
    local = f"{protocol} {_address(socket.source)}:{socket.source_port}"
    if socket.destination_port:
        local += f" to {_address(socket.destination)}:{socket.destination_port}"
    return f"{local} {_INET_STATES.get(socket.state, '')}".rstrip()


def _address(words: Iterable[int]) -> str:
    # Each word as it lay in memory: the bytes are in network order.
    data = b"".join((word & 0xFFFFFFFF).to_bytes(4, "little") for word in words)
    if len(data) not in {4, 16}:
        return "?"
    address = ip_address(data)
    return f"[{address}]" if len(data) == 16 else str(address)
