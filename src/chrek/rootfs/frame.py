"""Taking an archive apart into headers, pax records and sparse maps, without believing any of them.

Numbers are bounded before they are used: nothing is read or allocated because a header says so, only what
the archive's own length can hold. What the parts mean together is decided in `archive`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final, NoReturn

from chrek.errors import Reason, Refused
from chrek.rootfs.member import BLOCK, HEADER, RECORD, VERSION, ArchiveKind, Segments

MAX_PAX: Final = 4 << 20
"""One member's records: 64 KiB for each extended attribute, and the kernel's list of names is 64 KiB."""
MAX_SEGMENTS: Final = 1 << 22
_WINDOW: Final = 1 << 18

_COMMENT: Final = re.compile(rb"chrek-files (\d{1,9}) ([a-z]{1,20})")
_OCTAL: Final = re.compile(rb"([0-7]{1,11})[\0 ]+")


@dataclass(slots=True)
class Header:
    """One ustar header: its fields, its type flag, and the size that it states."""

    fields: tuple[bytes, ...]
    flag: bytes
    size: int


class FrameReader:
    """Takes headers, records and maps off the archive, one after the other."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._window = b""
        self._window_at = 0
        self.at = 0
        self.size = os.fstat(fd).st_size

    def corrupt(self, what: str) -> NoReturn:
        """Refuse the archive for what is wrong at this place."""
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

    def header(self) -> Header | None:
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
        return Header(fields, fields[7], self.octal(fields[4]))

    def _end(self) -> None:
        rest = self.size - self.at
        if self.size % RECORD or rest < BLOCK or rest >= RECORD + BLOCK or any(self.take(rest)):
            self.corrupt("the archive's end is not where it should be")

    def octal(self, text: bytes) -> int:
        """Read a number of a header: octal digits and their terminator, never base-256."""
        match = _OCTAL.fullmatch(text)
        if match is None:
            self.corrupt("a number in a header is malformed")
        return int(match[1], 8)

    def records(self, header: Header) -> dict[bytes, bytes]:
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
