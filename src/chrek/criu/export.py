"""Write a process's pages the way CRIU does: one ``pages-N.img``, and a pagemap that names its runs by address."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from chrek.criu.images import Image
from chrek.criu.messages import PagemapEntry
from chrek.criu.pagemaps import PAGE, PE_PRESENT, Process
from chrek.errors import Reason, Refused

_CHUNK = 1 << 30
"""sendfile(2) moves at most 2 GiB less a page in one call."""


@dataclass(frozen=True, order=True)
class Piece:
    """Pages of a process, and where they lie: *length* bytes at *offset* of the open file *fd*."""

    address: int
    length: int
    fd: int
    offset: int


def kept_pieces(process: Process, pages: int) -> list[Piece]:
    """Return the pages that the process's own page image, open as *pages*, holds."""
    found, offset = [], 0
    for entry in process.entries:
        if (entry.flags or 0) & PE_PRESENT:
            found.append(Piece(entry.vaddr, entry.pages * PAGE, pages, offset))
            offset += entry.pages * PAGE
    return found


def write_pages(directory: int, process: Process, pieces: Iterable[Piece]) -> int:
    """Write pagemap and page image of a process into *directory*; return the bytes of its pages.

    Raises:
        Refused: ``CORRUPT``, when two pieces overlap or a file is shorter than it should be.
        OSError: the files cannot be written.
    """
    entries: list[PagemapEntry] = []
    end = total = 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    out = os.open(f"pages-{process.pages_id}.img", flags, 0o600, dir_fd=directory)
    try:
        for piece in sorted(pieces):
            if piece.address < end:
                message = f"Two stored runs of process {process.pid} overlap at {piece.address:#x}."
                raise Refused(Reason.CORRUPT, message)
            _extend(entries, piece, joined=piece.address == end)
            _copy(out, piece, process.pid)
            end = piece.address + piece.length
            total += piece.length
    finally:
        os.close(out)
    head = process.image.entries[:1]
    image: Image[PagemapEntry] = Image(process.image.name, process.image.magic, [*head, *(e.encode() for e in entries)])
    image.write(directory)
    return total


def _extend(entries: list[PagemapEntry], piece: Piece, *, joined: bool) -> None:
    pages = piece.length // PAGE
    if joined and entries:
        pages += entries.pop().pages
    start = piece.address + piece.length - pages * PAGE
    # Readers before 4.2 know field 2 only, later ones prefer field 5: both are set.
    entries.append(PagemapEntry(vaddr=start, compat_nr_pages=pages & 0xFFFFFFFF, nr_pages=pages, flags=PE_PRESENT))


def _copy(out: int, piece: Piece, pid: int) -> None:
    offset, left = piece.offset, piece.length
    while left:
        done = os.sendfile(out, piece.fd, offset, min(left, _CHUNK))
        if not done:
            raise Refused(Reason.CORRUPT, f"A page file ends before the pages of process {pid} at {piece.address:#x}.")
        offset, left = offset + done, left - done
