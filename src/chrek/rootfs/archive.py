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
from typing import Final, NoReturn

from chrek.errors import Reason, Refused
from chrek.rootfs.member import (
    BLOCK,
    HEADER,
    MAX_ATTRIBUTES,
    MAX_MEMBERS,
    MAX_PATH,
    OPAQUE,
    RECORD,
    VERSION,
    ArchiveKind,
    Kind,
    Member,
    Segments,
)
from chrek.rootfs.meta import Meta, is_carried

MAX_NAME: Final = 255
MAX_PAX: Final = 4 << 20
"""One member's records: 64 KiB for each extended attribute, and the kernel's list of names is 64 KiB."""
MAX_SEGMENTS: Final = 1 << 22
MAX_SIZE: Final = 1 << 60
_MAX_NANOSECONDS: Final = 1 << 63
_WINDOW: Final = 1 << 18

_TIME: Final = re.compile(rb"(-?)(\d{1,12})\.(\d{9})")
_COMMENT: Final = re.compile(rb"chrek-files (\d{1,9}) ([a-z]{1,20})")
_OCTAL: Final = re.compile(rb"([0-7]{1,11})[\0 ]+")
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
    reader = _Reader(fd, name)
    try:
        kind = reader.start()
        members = _Checker(reader, kind).all()
    except OSError as error:
        raise Refused(Reason.CORRUPT, f"{name} cannot be read: {os.strerror(error.errno or 0)}.") from error
    return Archive(fd, name, kind, members)


@dataclass(slots=True)
class _Header:
    fields: tuple[bytes, ...]
    flag: bytes
    size: int


class _Reader:
    """Takes headers, records and maps off the archive, one after the other."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._window = b""
        self._window_at = 0
        self.at = 0
        self.size = os.fstat(fd).st_size

    def corrupt(self, what: str) -> NoReturn:
        raise Refused(Reason.CORRUPT, f"{self._name} at byte {self.at}: {what}.")

    def take(self, count: int) -> bytes:
        """Read the next *count* bytes; they must be there."""
        if count > self.size - self.at:
            self.corrupt("the archive ends early")
        begin = self.at - self._window_at
        if begin < 0 or begin + count > len(self._window):
            self._window = _read(self._fd, self.at, max(count, _WINDOW))
            self._window_at, begin = self.at, 0
        data = self._window[begin : begin + count]
        if len(data) < count:
            self.corrupt("the archive ends early")
        self.at += count
        return data

    def skip(self, count: int) -> None:
        """Pass over content and the padding after it, which must be inside the archive."""
        whole = count + -count % BLOCK
        if whole > self.size - self.at:
            self.corrupt("the content is longer than the archive")
        self.at += whole

    def start(self) -> ArchiveKind:
        """Read the global header, which says what the archive is."""
        header = self.header()
        if header is None or header.flag != b"g":
            self.corrupt("it does not begin as an archive of ChReK")
        records = self.records(header)
        comment = _COMMENT.fullmatch(records.get(b"comment", b""))
        if comment is None or len(records) != 1:
            self.corrupt("it does not begin as an archive of ChReK")
        version = int(comment[1])
        if version > VERSION:
            raise Refused(
                Reason.FORMAT_TOO_NEW, f"{self._name} has format {version}; this ChReK reads up to {VERSION}."
            )
        try:
            return ArchiveKind(comment[2].decode())
        except ValueError:
            self.corrupt(f"unknown kind of archive {comment[2].decode()!r}")

    def header(self) -> _Header | None:
        """Read one header block; None at the archive's end, after which only zeros may follow."""
        block = self.take(BLOCK)
        if block == bytes(BLOCK):
            self._end()
            return None
        fields = HEADER.unpack(block)
        total = sum(block[:148]) + 8 * 32 + sum(block[156:])
        if self.octal(fields[6]) != total:
            self.corrupt("the header's checksum is wrong")
        if fields[9] != b"ustar\x0000" or any(fields[10] + fields[11] + fields[14]):
            self.corrupt("not a header of this format")
        return _Header(fields, fields[7], self.octal(fields[4]))

    def _end(self) -> None:
        rest = self.size - self.at
        if self.size % RECORD or rest < BLOCK or rest >= RECORD + BLOCK or any(self.take(rest)):
            self.corrupt("the archive's end is not where it should be")

    def octal(self, text: bytes) -> int:
        match = _OCTAL.fullmatch(text)
        if match is None:
            self.corrupt("a number in a header is malformed")
        return int(match[1], 8)

    def records(self, header: _Header) -> dict[bytes, bytes]:
        """Read the records of a pax header, lines of ``LENGTH key=value``, each key once."""
        if header.size > MAX_PAX:
            self.corrupt("a pax header is too long")
        body = self.take(header.size)
        if any(self.take(-header.size % BLOCK)):
            self.corrupt("padding is not zero")
        found: dict[bytes, bytes] = {}
        at = 0
        while at < len(body):
            space = body.find(b" ", at, at + 9)
            digits = body[at:space] if space > at else b""
            end = at + int(digits) if digits.isdigit() and digits[:1] != b"0" else 0
            if not space < end <= len(body) or body[end - 1 : end] != b"\n":
                self.corrupt("a pax record is malformed")
            key, equals, value = body[space + 1 : end - 1].partition(b"=")
            if not equals or key in found:
                self.corrupt("a pax record is malformed or repeated")
            found[key] = value
            at = end
        return found

    def sparse_map(self, size: int, stored: int) -> Segments:
        """Read a GNU.sparse 1.0 map for a file of *size* bytes, *stored* of them (and the map) in the archive."""
        begin = self.at
        numbers: list[int] = []
        wanted = 1
        rest = b""
        while len(numbers) < wanted:
            if self.at - begin >= stored:
                self.corrupt("a sparse map is longer than its member")
            *lines, rest = (rest + self.take(BLOCK)).split(b"\n")
            for line in lines:
                if not line.isdigit() or len(line) > 19 or len(numbers) >= wanted:
                    self.corrupt("a sparse map is malformed")
                numbers.append(int(line))
                if len(numbers) == 1:
                    if not 0 < numbers[0] <= MAX_SEGMENTS:
                        self.corrupt("a sparse map has an impossible number of segments")
                    wanted = 1 + 2 * numbers[0]
        segments = tuple(zip(numbers[1::2], numbers[2::2], strict=True))
        end = 0
        for offset, length in segments:
            if offset < end or offset + length > size:
                self.corrupt("a sparse map has overlapping or overlong segments")
            end = offset + length
        if any(rest) or sum(length for _, length in segments) != stored - (self.at - begin):
            self.corrupt("a sparse map and its member differ in size")
        return segments


def _read(fd: int, offset: int, count: int) -> bytes:
    parts = []
    while count > 0 and (data := os.pread(fd, count, offset)):
        parts.append(data)
        offset += len(data)
        count -= len(data)
    return b"".join(parts)


class _Checker:
    """Makes members of headers, and holds each against those before it."""

    def __init__(self, reader: _Reader, kind: ArchiveKind) -> None:
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

    def _member(self, header: _Header, records: Mapping[bytes, bytes]) -> Member:
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

    def _kind_of(self, header: _Header, records: Mapping[bytes, bytes]) -> Kind:
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

    def _meta(self, header: _Header, records: Mapping[bytes, bytes]) -> Meta:
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
