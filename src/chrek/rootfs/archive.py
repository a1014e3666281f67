"""Reading an archive of files, and refusing every one that this project would not have written.

An archive lies on storage that others may write to, and what it says is done as root. So the reader is
no general tar reader: it knows exactly the members that `member.encode` writes and takes nothing else
(no GNU long names, no base-256 numbers, no old sparse forms, no unknown pax record that would need
an opinion). The whole archive is read and checked before its first member is used; content is skipped
over, so this costs some 25 us a member whatever the sizes.

After that, these hold for every `Archive`: paths are relative, without ``.``, ``..``, empty or overlong
components, and unique; the root comes first and each parent is a directory member before its children; a
hard link joins a file member before it; content lies inside the archive; members and attributes are not
more than memory can hold. That a path leads nowhere else in the *target* is not decided here: that is
kept by how it is opened (see `fd`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from chrek.errors import Reason, Refused
from chrek.rootfs.frame import FrameReader, Header
from chrek.rootfs.member import (
    MAX_ATTRIBUTES,
    MAX_MEMBERS,
    MAX_PATH,
    OPAQUE,
    ArchiveKind,
    Kind,
    Member,
)
from chrek.rootfs.meta import Meta, is_carried

MAX_NAME: Final = 255
MAX_SIZE: Final = 1 << 60
_MAX_NANOSECONDS: Final = 1 << 63

_TIME: Final = re.compile(rb"(-?)(\d{1,12})\.(\d{9})")
_KNOWN: Final = frozenset(
    (
        *(b"path", b"linkpath", b"mtime", b"uid", b"gid", b"size", b"hdrcharset", b"SCHILY.filetype"),
        *(b"GNU.sparse.major", b"GNU.sparse.minor", b"GNU.sparse.name", b"GNU.sparse.realsize"),
    )
)
_XATTR: Final = b"SCHILY.xattr."
_FLAGS: Final = {kind.value: kind for kind in Kind if len(kind.value) == 1}


@dataclass(frozen=True, slots=True)
class Archive:
    """A checked archive: an open file, what its members mean together, and the members in order."""

    fd: int
    name: str
    kind: ArchiveKind
    members: tuple[Member, ...]

    @property
    def content(self) -> int:
        """Bytes of file content."""
        return sum(member.stored for member in self.members)


def read_archive(fd: int, *, name: str = "rootfs.tar") -> Archive:
    """Read and check the whole archive open at *fd*.

    Raises `Refused`: `CORRUPT` names the archive, the offset and what is wrong; `FORMAT_TOO_NEW`.
    """
    reader = FrameReader(fd, name)
    try:
        kind = reader.start()
        members = _Checker(reader, kind).all()
    except OSError as error:
        raise Refused(Reason.CORRUPT, f"{name} cannot be read: {os.strerror(error.errno or 0)}.") from error
    return Archive(fd, name, kind, members)


class _Checker:
    """Makes members of headers, and holds each against those before it."""

    def __init__(self, reader: FrameReader, kind: ArchiveKind) -> None:
        self._reader = reader
        self._kind = kind
        self._seen: dict[bytes, Kind] = {}
        self._attributes = 0

    def all(self) -> tuple[Member, ...]:
        members = []
        while (header := self._reader.header()) is not None:
            if header.flag != b"x":
                self._reader.corrupt("a member lacks its pax header")
            records = self._reader.records(header)
            main = self._reader.header()
            if main is None:
                self._reader.corrupt("a pax header without a member")
            member = self._member(main, records)
            self._check_place(member)
            self._seen[member.path] = member.kind
            members.append(member)
            self._attributes += sum(len(value) for _, value in member.meta.xattrs)
            if len(members) > MAX_MEMBERS or self._attributes > MAX_ATTRIBUTES:
                self._reader.corrupt("it has more members or attributes than any that is written")
        if not members:
            self._reader.corrupt("it has no members")
        return tuple(members)

    def _member(self, header: Header, records: Mapping[bytes, bytes]) -> Member:
        reader = self._reader
        kind = self._kind_of(header, records)
        sparse = b"GNU.sparse.major" in records
        name = records.get(b"GNU.sparse.name") if sparse else records.get(b"path", _text(header.fields[0]))
        version = records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor")
        if name is None or (sparse and version != (b"1", b"0")):
            reader.corrupt("a sparse member is malformed")
        if kind is Kind.DIRECTORY:
            name = b"" if name == b"./" else name.removesuffix(b"/")
        member = Member(name, kind, self._meta(header, records))
        member.link = records.get(b"linkpath", _text(header.fields[8]))
        member.opaque = member.kind is Kind.DIRECTORY and self._is_opaque(records)
        size = self._number(records, b"size", header.size)
        if kind is not Kind.FILE and (size or sparse):
            reader.corrupt("a member that is no file has content")
        if kind in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE):
            member.device = (reader.octal(header.fields[12]), reader.octal(header.fields[13]))
        member.size = size
        if sparse:
            member.size = self._number(records, b"GNU.sparse.realsize", -1)
            begin = reader.at
            member.segments = reader.sparse_map(member.size, size)
            size -= reader.at - begin
        member.offset = reader.at
        reader.skip(size)
        return member

    def _kind_of(self, header: Header, records: Mapping[bytes, bytes]) -> Kind:
        for key in records:
            if key not in _KNOWN and not key.startswith(_XATTR):
                self._reader.corrupt(f"unknown pax record {key[:40]!r}")
        kind = _FLAGS.get(header.flag)
        if kind is None:
            self._reader.corrupt(f"unknown type of member {header.flag!r}")
        if b"SCHILY.filetype" in records:
            if kind is not Kind.FILE or records[b"SCHILY.filetype"] != b"socket":
                self._reader.corrupt("unknown SCHILY.filetype")
            return Kind.SOCKET
        is_null = kind is Kind.CHAR_DEVICE and not any(map(self._reader.octal, header.fields[12:14]))
        return Kind.WHITEOUT if is_null and self._kind is ArchiveKind.OVERLAY else kind

    def _meta(self, header: Header, records: Mapping[bytes, bytes]) -> Meta:
        reader = self._reader
        mode = reader.octal(header.fields[1])
        match = _TIME.fullmatch(records.get(b"mtime", b""))
        if mode > 0o7777 or match is None:
            reader.corrupt("a member's mode or time is malformed")
        nanoseconds = int(match[2]) * 1_000_000_000 + int(match[3])
        if nanoseconds >= _MAX_NANOSECONDS:
            reader.corrupt("a member's time is out of range")
        uid = self._number(records, b"uid", reader.octal(header.fields[2]))
        gid = self._number(records, b"gid", reader.octal(header.fields[3]))
        if max(uid, gid) >= 0xFFFFFFFF:
            reader.corrupt("a member's owner is out of range")
        return Meta(mode, uid, gid, -nanoseconds if match[1] else nanoseconds, tuple(self._xattrs(records)))

    def _xattrs(self, records: Mapping[bytes, bytes]) -> list[tuple[str, bytes]]:
        found = []
        for key, value in records.items():
            if not key.startswith(_XATTR):
                continue
            escaped = key.removeprefix(_XATTR).decode("utf-8", "surrogateescape")
            name = escaped.replace("%3D", "=").replace("%25", "%")
            if self._kind is ArchiveKind.OVERLAY and name.startswith("trusted.overlay."):
                if name == OPAQUE:
                    continue
                if not name.startswith("trusted.overlay.overlay."):
                    self._reader.corrupt(f"attribute {name[:60]!r} belongs to overlayfs")
                name = "trusted.overlay." + name.removeprefix("trusted.overlay.overlay.")
            if not is_carried(name) or "\0" in name or len(name) > MAX_NAME or len(value) > 65536:
                self._reader.corrupt(f"attribute {name[:60]!r} is not one that travels")
            found.append((name, value))
        return sorted(found)

    def _is_opaque(self, records: Mapping[bytes, bytes]) -> bool:
        if self._kind is not ArchiveKind.OVERLAY:
            return False
        value = records.get(_XATTR + OPAQUE.encode())
        if value not in (None, b"y"):
            self._reader.corrupt("a directory's opaque mark is malformed")
        return value is not None

    def _number(self, records: Mapping[bytes, bytes], key: bytes, default: int) -> int:
        text = records.get(key)
        if text is None and default >= 0:
            return default
        if text is None or not text.isdigit() or len(text) > 19 or int(text) > MAX_SIZE:
            self._reader.corrupt(f"the pax record {key.decode()} is malformed")
        return int(text)

    def _check_place(self, member: Member) -> None:
        reader, path, seen = self._reader, member.path, self._seen
        what = path[-80:].decode("utf-8", "backslashreplace")
        if path in seen:
            reader.corrupt(f"the member {what!r} is there twice")
        if not path:
            if seen or member.kind is not Kind.DIRECTORY or member.opaque:
                reader.corrupt("the root is not the first member, or no plain directory")
            return
        if len(path) > MAX_PATH or b"\0" in path or not all(map(_is_component, path.split(b"/"))):
            reader.corrupt(f"the path {what!r} is not allowed")
        if seen.get(path.rpartition(b"/")[0]) is not Kind.DIRECTORY:
            reader.corrupt(f"the member {what!r} comes before its directory")
        if member.kind is Kind.HARD_LINK:
            if seen.get(member.link) in (None, Kind.DIRECTORY, Kind.WHITEOUT, Kind.HARD_LINK):
                reader.corrupt(f"the hard link {what!r} joins no file of the archive")
        elif member.kind is Kind.SYMLINK:
            if not 0 < len(member.link) < 4096 or b"\0" in member.link:
                reader.corrupt(f"the symbolic link {what!r} has no possible target")
        elif member.link:
            reader.corrupt(f"the member {what!r} has a link target and is no link")


def _is_component(name: bytes) -> bool:
    return 0 < len(name) <= MAX_NAME and name not in (b".", b"..")


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]
