"""Writing an archive of what a container changed, or of a volume's whole content.

The application stands still while this runs, so it makes one pass: a directory is listed once, each file
is opened once, read once and hashed on the way. Directories come before what is in them and a hard link
after the file it joins, so that a reader never has to look ahead; names are sorted, so that the same tree
gives the same archive.

The walker trusts nothing it meets. Every open is relative to the root's descriptor, passes no symbolic
link and no mount point; types are asked again of the opened file. Only the application is frozen: a
sidecar or an exec'd process may still write, so what changes or vanishes under the walker is reported
with the archive, and is no failure.

Mount options metacopy and redirect_dir leave data or names in the lower layers. Such a file's content,
and such a directory's whole content, is read from the merged view instead; the directory is then opaque in
the archive. Hard links between such a directory and the rest are then two files.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from chrek.artifact.digest import FileEntry
from chrek.errors import CaptureFailed, Reason
from chrek.rootfs import fd as fds
from chrek.rootfs import overlay as overlays
from chrek.rootfs.member import (
    MAX_ATTRIBUTES,
    MAX_MEMBERS,
    MAX_PATH,
    ArchiveKind,
    Kind,
    Member,
    Segments,
    archive_header,
    encode,
    padding,
    trailer,
)
from chrek.rootfs.meta import Meta, Xattrs, read_xattrs
from chrek.rootfs.output import BUFFER, ArchiveWriter
from chrek.rootfs.overlay import NO_MARKS, Marks, Overlay
from chrek.rootfs.skip import INJECTED, Skip


@dataclass(frozen=True, slots=True)
class Packed:
    """An archive that was written.

    Attributes:
        entry: size of the archive in bytes, and its digest: one SHA-256, or one of each block if that was
            asked for.
        counts: members by type (``file``, ``directory``, ``whiteout`` and so on) and ``opaque``, ``left_out``.
        content: bytes of file content in it, holes not counted.
        changed: files that changed while they were read, as people read paths.
        vanished: files that were listed and then gone.
        seconds: how long it took.
    """

    entry: FileEntry
    counts: dict[str, int]
    content: int
    changed: tuple[str, ...]
    vanished: tuple[str, ...]
    seconds: float

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        return self.entry.size

    @property
    def sha256(self) -> str | None:
        """Digest of the archive in hexadecimal; None when it has digests of blocks."""
        return self.entry.sha256


def diff_overlay(
    overlay: Overlay,
    out_fd: int,
    *,
    name: str = "rootfs.tar",
    mount_points: Iterable[bytes] = (),
    exclude: Iterable[str] = (),
    blocks: bool = False,
) -> Packed:
    """Write what the upper directory of *overlay* changes to *out_fd*.

    *mount_points* (relative to the root) and what runtimes inject are left out, and what *exclude*
    patterns match. *blocks* asks for a digest of each 4 MiB, which several threads compute. Raises
    `CaptureFailed`: `NO_SPACE` or `WRITE_FAILED` naming *name*, `FILE_NOT_CARRIED`.
    """
    skip = Skip([*INJECTED, *mount_points], tuple(exclude))
    return _Packer(out_fd, name, blocks, skip, overlay).run(overlay.upper, ArchiveKind.OVERLAY)


def pack_tree(
    directory_fd: int,
    out_fd: int,
    *,
    name: str = "volume.tar",
    exclude: Iterable[str] = (),
    blocks: bool = False,
) -> Packed:
    """Write the whole content of one mounted volume to *out_fd*; other mounts in it are left out.

    *exclude* patterns are relative to the volume. Raises as `diff_overlay`.
    """
    return _Packer(out_fd, name, blocks, Skip((), tuple(exclude)), None).run(directory_fd, ArchiveKind.TREE)


@contextmanager
def open_volume(root_fd: int, path: bytes) -> Iterator[int]:
    """Open the volume mounted at *path* of the container whose root is open at *root_fd*.

    The path is resolved as the container would, its links included, and never leaves the root. Raises
    `CaptureFailed` (`FILE_NOT_CARRIED`) when it is no directory.
    """
    try:
        fd = fds.open_in_root(root_fd, path)
    except OSError as error:
        raise CaptureFailed(
            Reason.FILE_NOT_CARRIED, f"The volume {path.decode(errors='backslashreplace')}: {error.strerror}."
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)


@dataclass(slots=True)
class _Packer:
    out_fd: int
    name: str
    blocks: bool
    skip: Skip
    overlay: Overlay | None
    counts: dict[str, int] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    content: int = 0
    _members: int = 0
    _attributes: int = 0
    _links: dict[tuple[int, int], bytes] = field(default_factory=dict)
    _pending: list[tuple[bytes, int, bool]] = field(default_factory=list)
    _writer: ArchiveWriter = field(init=False)

    def run(self, root: int, kind: ArchiveKind) -> Packed:
        start = time.monotonic()
        with ArchiveWriter(self.out_fd, self.name, blocks=self.blocks) as self._writer:
            self._writer.put(archive_header(kind))
            self._pending.append((b"", root, False))
            while self._pending:
                path, base, forced = self._pending.pop()
                self._directory(path, base, opaque=forced)
            self._writer.put(trailer(self._writer.size))
            entry = self._writer.finish()
        seconds = time.monotonic() - start
        return Packed(entry, self.counts, self.content, tuple(self.changed), tuple(self.vanished), seconds)

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _lost(self, path: bytes, error: OSError) -> None:
        """Report a file that is gone or became another; anything else ends the capture."""
        if error.errno == errno.EXDEV:
            self._count("left_out")  # another mount
        elif error.errno in fds.GONE:
            self.vanished.append(fds.shown(path))
        else:
            raise CaptureFailed(
                Reason.FILE_NOT_CARRIED, f"Reading {fds.shown(path)} failed: {os.strerror(error.errno or 0)}."
            ) from error

    def _emit(self, member: Member) -> None:
        self._count(member.kind.name.lower())
        self._members += 1
        self._attributes += sum(len(value) for _, value in member.meta.xattrs)
        if self._members > MAX_MEMBERS or self._attributes > MAX_ATTRIBUTES:
            raise CaptureFailed(
                Reason.FILE_NOT_CARRIED,
                f"{self.name} would have more than {MAX_MEMBERS} files or {MAX_ATTRIBUTES} bytes of attributes.",
            )
        self._writer.put(encode(member))

    # --- directories ---------------------------------------------------------------------------

    def _directory(self, path: bytes, base: int, *, opaque: bool) -> None:
        try:
            with fds.opened(base, path) as fd:
                before = os.fstat(fd)
                xattrs, marks = self._separate(read_xattrs(fd), base)
                if marks.redirect:
                    self._directory(path, self._merged(path), opaque=True)
                    return
                self._emit(Member(path, Kind.DIRECTORY, Meta.of(before, xattrs), opaque=opaque or marks.opaque))
                if opaque or marks.opaque:
                    self._count("opaque")
                self._entries(path, fd, base)
                if os.fstat(fd).st_mtime_ns != before.st_mtime_ns:
                    self.changed.append(fds.shown(path))
        except OSError as error:
            self._lost(path, error)

    def _entries(self, path: bytes, fd: int, base: int) -> None:
        with os.scandir(fd) as found:
            entries = sorted((os.fsencode(entry.name), entry) for entry in found)
        subdirectories = []
        for name, entry in entries:
            whole = fds.join(path, name)
            if self.skip(whole, name):
                self._count("left_out")
                continue
            if len(whole) > MAX_PATH:
                raise CaptureFailed(
                    Reason.FILE_NOT_CARRIED, f"A path below {fds.shown(path[:80])}... is longer than {MAX_PATH} bytes."
                )
            try:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    subdirectories.append((whole, base, False))
                else:
                    self._entry(whole, name, fd, status, base)
            except OSError as error:
                self._lost(whole, error)
        self._pending.extend(reversed(subdirectories))

    def _separate(self, xattrs: Xattrs, base: int) -> tuple[Xattrs, Marks]:
        """Overlayfs's marks mean something in the upper directory only, not in the merged view or a volume."""
        if not xattrs or self.overlay is None or base != self.overlay.upper:
            return xattrs, NO_MARKS
        return overlays.separate(xattrs, self.overlay.prefix)

    def _merged(self, path: bytes) -> int:
        if self.overlay is None or self.overlay.merged is None:
            raise CaptureFailed(
                Reason.FILE_NOT_CARRIED,
                f"{fds.shown(path)} has its content in a lower layer (mount option metacopy or redirect_dir).",
                cure="Capture through the container's process, which gives the merged view.",
            )
        return self.overlay.merged

    # --- everything else -----------------------------------------------------------------------

    def _entry(self, path: bytes, name: bytes, fd: int, status: os.stat_result, base: int) -> None:
        if self._is_whiteout(status, base):
            self._emit(Member(path, Kind.WHITEOUT, Meta(0, 0, 0, 0)))
            return
        key = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and (first := self._links.get(key)) is not None:
            self._emit(Member(path, Kind.HARD_LINK, Meta.of(status, ()), link=first))
            return
        if stat.S_ISREG(status.st_mode):
            carried = self._file(path, name, fd, base)
        else:
            carried = self._special(path, name, fd, status, base)
        if carried and status.st_nlink > 1:
            self._links[key] = path

    def _is_whiteout(self, status: os.stat_result, base: int) -> bool:
        in_upper = self.overlay is not None and base == self.overlay.upper
        return in_upper and stat.S_ISCHR(status.st_mode) and status.st_rdev == 0

    def _special(self, path: bytes, name: bytes, fd: int, status: os.stat_result, base: int) -> bool:
        kind = _KINDS[stat.S_IFMT(status.st_mode)]
        xattrs, _ = self._separate(read_xattrs(fds.magic(fd, name)), base)
        member = Member(path, kind, Meta.of(status, xattrs))
        if kind is Kind.SYMLINK:
            member.link = os.readlink(name, dir_fd=fd)
        elif kind in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE):
            member.device = (os.major(status.st_rdev), os.minor(status.st_rdev))
        if fds.is_mount_point(fd, name):
            self._count("left_out")
            return False
        self._emit(member)
        return True

    def _file(self, path: bytes, name: bytes, fd: int, base: int) -> bool:
        file = fds.openat2(fd, name, fds.READ, resolve=fds.BENEATH | fds.NO_XDEV)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                self.changed.append(fds.shown(path))
                return False
            xattrs, marks = self._separate(read_xattrs(file), base)
            if marks.whiteout and status.st_size == 0:
                self._emit(Member(path, Kind.WHITEOUT, Meta(0, 0, 0, 0)))
                return False
            member = Member(path, Kind.FILE, Meta.of(status, xattrs), size=status.st_size)
            if marks.metacopy:
                with fds.opened(self._merged(path), path, fds.READ) as data:
                    self._content(member, data)
            else:
                self._content(member, file)
            return True
        finally:
            os.close(file)

    def _content(self, member: Member, file: int) -> None:
        before = os.fstat(file)
        if before.st_blocks * 512 < before.st_size:
            member.segments = _find_segments(file, member.size)
        self._emit(member)
        for offset, length in ((0, member.size),) if member.segments is None else member.segments:
            self._copy(file, offset, length)
        self._writer.put(padding(member.stored))
        self.content += member.stored
        after = os.fstat(file)
        if (after.st_mtime_ns, after.st_size) != (before.st_mtime_ns, member.size):
            self.changed.append(fds.shown(member.path))

    def _copy(self, file: int, offset: int, length: int) -> None:
        """Copy a range; zeros stand for what a file that shrank meanwhile no longer has."""
        while length > 0:
            data = os.pread(file, min(length, BUFFER), offset) or bytes(min(length, BUFFER))
            self._writer.put(data)
            offset += len(data)
            length -= len(data)


_KINDS: Final = {
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET,
    stat.S_IFCHR: Kind.CHAR_DEVICE,
    stat.S_IFBLK: Kind.BLOCK_DEVICE,
}


def _find_segments(file: int, size: int) -> Segments | None:
    """Ask where a file has data (lseek(2), SEEK_DATA); None when it has no hole after all."""
    segments = []
    offset = 0
    while offset < size:
        try:
            start = os.lseek(file, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: nothing but a hole up to the end
                return None
            break
        if start >= size:
            break
        offset = min(os.lseek(file, start, os.SEEK_HOLE), size)
        segments.append((start, offset - start))
    if segments == [(0, size)]:
        return None
    if offset < size or not segments:
        segments.append((size, 0))  # GNU tar's way of saying that the file ends with a hole
    return tuple(segments)
