"""What a checkpoint records about where it came from, and what it needs where it goes."""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from chrek.artifact import Application, Environment, Facts, Gpu, OpenFile, Process, Stream
from chrek.engine import streams
from chrek.engine.container import closing_fd
from chrek.rootfs import fd as fds
from chrek.rootfs.overlay import container_overlay
from chrek.system import procfs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chrek.engine.container import Container
    from chrek.engine.preflight import Subject
    from chrek.system.ids import HostPid, NsPid

CPU_FEATURES = frozenset(
    "adx aes amx_bf16 amx_int8 amx_tile avx avx2 avx512_bf16 avx512_bitalg avx512_fp16 avx512_vbmi2 avx512_vnni"
    " avx512_vpopcntdq avx512bw avx512cd avx512dq avx512f avx512ifma avx512vbmi avx512vl avx_ifma avx_ne_convert"
    " avx_vnni avx_vnni_int8 bmi1 bmi2 clflushopt clwb cx16 erms f16c fma fsgsbase fsrm gfni lzcnt abm movbe movdir64b"
    " movdiri pclmulqdq pku popcnt rdpid rdrand rdseed rdtscp serialize sha_ni sse sse2 sse3 pni ssse3 sse4_1 sse4_2 sse4a"
    " vaes vpclmulqdq waitpkg xsave xsavec xsaveopt xsaves".split()
)
"""Flags of /proc/cpuinfo that a program may have chosen its code by; the rest concerns the kernel alone."""

_NT_GNU_BUILD_ID = 3
_PT_NOTE = 4


def cpu_features() -> tuple[str, ...]:
    """Return this machine's processor features that programs can see."""
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("flags"):
            return tuple(sorted(CPU_FEATURES.intersection(line.split(":", 1)[1].split())))
    return ()


def machine(memory_bytes: int, *, gpus: tuple[Gpu, ...] | None = None) -> Facts:
    """Return the facts of this machine that a restore depends on."""
    return Facts(architecture=platform.machine(), cpu_features=cpu_features(), memory_bytes=memory_bytes, gpus=gpus)


def application(container: Container, tree: list[HostPid], gpu_processes: tuple[NsPid, ...] = ()) -> Application:
    """Describe the process tree, its root first; *gpu_processes* are those with an initialised driver."""
    processes = []
    for pid in tree:
        state = procfs.status(pid)
        if state is None:
            continue
        parent = procfs.status(state.parent)
        processes.append(
            Process(
                pid=state.ns_pid,
                ppid=parent.ns_pid if parent else state.ns_pid,
                command=procfs.command_line(pid) or (state.name,),
                threads=state.threads,
                memory_bytes=state.resident,
                uid=state.uids[1],
                gid=state.gids[1],
            )
        )
    environment = container.environment
    return Application(
        root_pid=processes[0].pid,
        processes=tuple(processes),
        standard_streams=standard_streams(container),
        ready_file=environment.get("DYN_CHECKPOINT_READY_FILE"),
        signal_file=environment.get("DYN_CHECKPOINT_SIGNAL_FILE"),
        marker_file=marker_path(procfs.environment(tree[0]) or {}),
        environment=environment_digest(container.environment),
        gpu_processes=gpu_processes,
    )


def marker_path(environment: dict[str, str]) -> str:
    """Return where a process with this environment looks for the restore marker."""
    return environment.get("DYN_RESTORE_MARKER_FILE") or "/tmp/dynamo-restored"


def standard_streams(container: Container) -> dict[str, Stream]:
    """Return the container's standard streams: PID 1's, which the application inherited."""
    keys = {stream.number: stream.key for stream in streams.external(container)}
    found = {}
    for descriptor in procfs.descriptors(container.pid1):
        if descriptor.number <= 2:
            access = descriptor.flags & os.O_ACCMODE
            mode: Literal["r", "w", "rw"] = "r" if access == os.O_RDONLY else "w" if access == os.O_WRONLY else "rw"
            key = keys.get(descriptor.number)
            found[str(descriptor.number)] = Stream(target=descriptor.target, mode=mode, key=key)
    return found


def environment_digest(environment: dict[str, str]) -> Environment:
    """Return names and one digest of an environment; values stay out of the manifest, they may be secrets."""
    entries = sorted(f"{name}={value}".encode("utf-8", "surrogateescape") for name, value in environment.items())
    digest = hashlib.sha256(b"".join(entry + b"\0" for entry in entries)).hexdigest()
    return Environment(names=tuple(sorted(environment)), sha256=digest)


def used_files(subject: Subject, covered: Iterable[str]) -> tuple[OpenFile, ...]:
    """Return the files the tree maps or holds open that must be there again.

    Files whose contents the checkpoint carries are not listed: those in the *covered* volumes, and those
    that the container has changed in its root.
    """
    inside = (*(path.rstrip("/") + "/" for path in covered), "/dev/", "/proc/", "/sys/")
    container = subject.container
    found = []
    with ExitStack() as stack:
        root = stack.enter_context(closing_fd(container.open_root()))
        upper = stack.enter_context(container_overlay(container.pid1)).upper if container.has_own_root else None
        for path in sorted(_used_paths(subject)):
            mount = container.mount_of(path)
            point = mount.point if mount else "/"
            if path.endswith(" (deleted)") or path.startswith(inside) or (point == "/" and _is_in(upper, path)):
                continue
            described = describe(root, path)
            if described is not None:
                found.append(OpenFile(path=path, mount=point, size=described[0], build_id=described[1]))
    return tuple(found)


def _used_paths(subject: Subject) -> set[str]:
    """Return the paths mapped or open; not of files only written (logs grow), nor of streams from outside."""
    known = {mount.id for mount in subject.container.mounts}
    mapped = {mapping.path for pid in subject.tree for mapping in procfs.mappings(pid)}
    opened = {
        file.target
        for files in subject.files.values()
        for file in files
        if file.mount in known and file.flags & os.O_ACCMODE != os.O_WRONLY
    }
    return {path for path in mapped | opened if path.startswith("/")}


def _is_in(upper: int | None, path: str) -> bool:
    """Whether the overlay's upper directory has a file of that path, so that it is part of the changes."""
    if upper is None:
        return False
    try:
        os.close(fds.open_beneath(upper, os.fsencode(path.lstrip("/")), os.O_PATH | os.O_NOFOLLOW))
    except OSError:
        return False
    return True


def describe(root: int, path: str) -> tuple[int, str | None] | None:
    """Return (size, build id) of a regular file below *root*, None when there is none; links stay inside."""
    name = os.fsencode(path.lstrip("/"))
    try:
        fd = fds.openat2(root, name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, resolve=fds.IN_ROOT | fds.NO_MAGICLINKS)
    except OSError:
        return None
    try:
        info = os.fstat(fd)
        return (info.st_size, build_id(fd)) if stat.S_ISREG(info.st_mode) else None
    finally:
        os.close(fd)


def build_id(fd: int) -> str | None:
    """Return the GNU build id of the 64-bit ELF file *fd*, or None when it has none.

    Source: elf(5); the note is owner ``GNU``, type 3.
    """
    header = os.pread(fd, 64, 0)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return None
    offset, size, count = struct.unpack_from("<Q", header, 32)[0], *struct.unpack_from("<HH", header, 54)
    table = _read(fd, size * count, offset)
    if size < 56:
        return None
    for at in range(0, len(table) - 55, size):
        kind, _, start, _, _, length = struct.unpack_from("<IIQQQQ", table, at)
        if kind == _PT_NOTE:
            found = _note(_read(fd, length, start))
            if found:
                return found
    return None


def _read(fd: int, size: int, offset: int) -> bytes:
    """Read a part that the file itself names: no more than a header needs, nothing past the largest offset."""
    return os.pread(fd, min(size, 1 << 16), offset) if offset >> 63 == 0 else b""


def _note(data: bytes) -> str | None:
    at = 0
    while at + 12 <= len(data):
        name_size, size, kind = struct.unpack_from("<III", data, at)
        name, body = at + 12, at + 12 + (name_size + 3) // 4 * 4
        if kind == _NT_GNU_BUILD_ID and data[name : name + 4] == b"GNU\0":
            return data[body : body + size].hex()
        at = body + (size + 3) // 4 * 4
    return None
