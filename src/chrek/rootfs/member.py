"""One entry of an archive of files, and its encoding as a pax tar member.

The encoding is POSIX.1-2001 pax, the dialect that GNU tar and Python's `tarfile` read, written here by
hand: a container may have tens of thousands of changed files and stands still while they are read, and
the headers of a member take `tarfile` 36 us where this takes 10 (2-core Xeon VM, Python 3.11). Nor does
`tarfile` write holes. ``docs/format-files.md`` describes every field.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Final

from chrek.rootfs.meta import Meta

BLOCK: Final = 512
RECORD: Final = 10240
"""An archive's length is a multiple of this, tar's habit since tapes."""

VERSION: Final = 1
MAX_PATH: Final = 1 << 14
"""Longest path carried, in bytes: four times what a program can name in one call."""
MAX_MEMBERS: Final = 2_000_000
"""Most entries carried: a reader keeps 600 bytes in memory for each."""
MAX_ATTRIBUTES: Final = 256 << 20
"""Most bytes of extended attributes in one archive, which a reader keeps too."""
OPAQUE: Final = "trusted.overlay.opaque"


class Kind(Enum):
    """What an entry is; the value is tar's type flag."""

    FILE = b"0"
    HARD_LINK = b"1"
    SYMLINK = b"2"
    CHAR_DEVICE = b"3"
    BLOCK_DEVICE = b"4"
    DIRECTORY = b"5"
    FIFO = b"6"
    SOCKET = b"0s"  # tar knows no sockets: an empty file with SCHILY.filetype=socket, as star writes them
    WHITEOUT = b"3w"  # overlayfs's own form: a character device 0:0


class ArchiveKind(Enum):
    """What an archive's members mean together; the value stands in its first header."""

    OVERLAY = "overlay"
    """Changes to a root file system: whiteouts delete, opaque directories hide what was there."""
    TREE = "tree"
    """The whole content of a volume: overlayfs's marks, should it hold any, are ordinary files."""


Segments = tuple[tuple[int, int], ...]
"""Where a sparse file has data: (offset, length) in ascending order."""


@dataclass(slots=True)
class Member:
    """One entry.

    Attributes:
        path: relative to the archive's root, without slash at either end; empty is the root itself.
        size: of a file, in bytes, its holes included.
        link: target of a symbolic link, or path of the member that a hard link joins.
        device: major and minor number of a device.
        opaque: the directory hides everything that lay at its path before.
        segments: the data of a sparse file; None when the file has no holes.
        offset: where in the archive the content begins (known to a reader only).
    """

    path: bytes
    kind: Kind
    meta: Meta
    size: int = 0
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    opaque: bool = False
    segments: Segments | None = None
    offset: int = field(default=0, compare=False)

    @property
    def stored(self) -> int:
        """Bytes of file content that the archive holds."""
        return self.size if self.segments is None else sum(length for _, length in self.segments)


def archive_header(kind: ArchiveKind) -> bytes:
    """Give the global header an archive begins with: a pax comment that says what it is."""
    return _pax(b"g", {b"comment": b"chrek-files %d %s" % (VERSION, kind.value.encode())})


def trailer(size: int) -> bytes:
    """Give the two zero blocks and the padding that end an archive of *size* bytes so far."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % RECORD)


def padding(size: int) -> bytes:
    """Give the zeros that fill the last block of content."""
    return bytes(-size % BLOCK)


def sparse_map(segments: Segments) -> bytes:
    """Give the map of GNU.sparse 1.0: the number of segments, then offset and length of each, in lines."""
    numbers = [len(segments), *(number for segment in segments for number in segment)]
    text = b"".join(b"%d\n" % number for number in numbers)
    return text + padding(len(text))


def encode(member: Member) -> bytes:
    """Encode everything of a member but its content (and the padding after that)."""
    records: dict[bytes, bytes] = {b"mtime": _seconds(member.meta.mtime_ns)}
    name, size, extra = _attributeand_size(member, records)
    if not _is_text(member.path) or not _is_text(member.link):
        records = {b"hdrcharset": b"BINARY", **records}
    if len(member.link) > 100:
        records[b"linkpath"] = member.link
    if member.kind is Kind.SOCKET:
        records[b"SCHILY.filetype"] = b"socket"
    if member.opaque:
        records[_xattr_key(OPAQUE)] = b"y"
    for attribute, value in member.meta.xattrs:
        records[_xattr_key(attribute)] = value
    for key, number in ((b"uid", member.meta.uid), (b"gid", member.meta.gid)):
        if number > 0o7777777:
            records[key] = b"%d" % number
    if size > 0o77777777777:
        records[b"size"] = b"%d" % size
    return _pax(b"x", records) + _ustar(member, name, size) + extra


def _attributeand_size(member: Member, records: dict[bytes, bytes]) -> tuple[bytes, int, bytes]:
    name = member.path
    if member.kind is Kind.DIRECTORY:
        name = name + b"/" if name else b"./"
    if member.segments is not None:
        records |= {
            b"GNU.sparse.major": b"1",
            b"GNU.sparse.minor": b"0",
            b"GNU.sparse.name": name,
            b"GNU.sparse.realsize": b"%d" % member.size,
        }
        extra = sparse_map(member.segments)
        return b"GNUSparseFile.0/file", len(extra) + member.stored, extra
    if len(name) > 100:
        records[b"path"] = name
    return name, member.size if member.kind is Kind.FILE else 0, b""


def _ustar(member: Member, name: bytes, size: int) -> bytes:
    meta = member.meta
    major, minor = member.device
    return _checked(
        name[:100],
        b"%07o\0" % meta.mode,
        b"%07o\0" % (meta.uid if meta.uid <= 0o7777777 else 0),
        b"%07o\0" % (meta.gid if meta.gid <= 0o7777777 else 0),
        b"%011o\0" % (size if size <= 0o77777777777 else 0),
        b"%011o\0" % min(max(0, meta.mtime_ns // 1_000_000_000), 0o77777777777),
        member.kind.value[:1],
        member.link[:100],
        b"%07o\0" % major if major <= 0o7777777 else b"",
        b"%07o\0" % minor if minor <= 0o7777777 else b"",
    )


HEADER: Final = struct.Struct("100s 8s 8s 8s 12s 12s 8s 1s 100s 8s 32s 32s 8s 8s 167s")
_MAGIC: Final = b"ustar\x0000"


def _checked(*fields: bytes) -> bytes:
    name, mode, uid, gid, size, mtime, flag, link, major, minor = fields
    before = (name, mode, uid, gid, size, mtime)
    after = (flag, link, _MAGIC, b"", b"", major, minor, b"")
    total = sum(HEADER.pack(*before, b"        ", *after))
    return HEADER.pack(*before, b"%06o\0 " % total, *after)


@lru_cache(maxsize=256)
def _pax_header(flag: bytes, size: int) -> bytes:
    name = b"././@PaxHeader"
    zero = b"0000000\0"
    return _checked(name, b"0000644\0", zero, zero, b"%011o\0" % size, b"00000000000\0", flag, b"", zero, zero)


def _pax(flag: bytes, records: dict[bytes, bytes]) -> bytes:
    body = b"".join(_record(key, value) for key, value in records.items())
    return _pax_header(flag, len(body)) + body + padding(len(body))


def _record(key: bytes, value: bytes) -> bytes:
    """Encode a line of ``LENGTH key=value``, where LENGTH counts its own digits and the newline too."""
    rest = len(key) + len(value) + 3
    total = rest + len(str(rest))
    if len(str(total)) != len(str(rest)):
        total = rest + len(str(total))
    return b"%d %s=%s\n" % (total, key, value)


def _seconds(nanoseconds: int) -> bytes:
    """Write a time as pax does: decimal seconds; a moment before 1970 has a minus before the whole."""
    whole, part = divmod(abs(nanoseconds), 1_000_000_000)
    return b"%s%d.%09d" % (b"-" if nanoseconds < 0 else b"", whole, part)


def _xattr_key(name: str) -> bytes:
    """Give the record of an attribute; ``%`` and ``=`` in its name are escaped as GNU tar does."""
    escaped = name.replace("%", "%25").replace("=", "%3D")
    return b"SCHILY.xattr." + escaped.encode("utf-8", "surrogateescape")


def _is_text(name: bytes) -> bool:
    if name.isascii():
        return True
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True
