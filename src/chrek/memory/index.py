"""The index of a checkpoint's memory: which page lies where, and the digest of each block.

The format is described in ``docs/format-memory.md``. Tables are kept packed, as in the file: memory that is
fragmented page by page gives a million runs, which as Python objects would take ten times the room.
What is decoded has been checked completely; the code that fills memory from it checks nothing again.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from chrek.artifact import WRITTEN, Algorithm, Blocks, FileEntry
from chrek.errors import Reason, Refused
from chrek.memory.ranges import MAX_PID, PAGE, USER_TOP
from chrek.system.ids import NsPid

INDEX_NAME: Final = "index"
VERSION: Final = 2
SKIPPED: Final = 0xFFFFFFFF
"""Process of a run whose bytes are nobody's here."""

MIN_BLOCK: Final = 64 << 10
MAX_BLOCK: Final = 64 << 20

_MAGIC = b"CHREKMEM"
_CODES = {Algorithm.SHA256: 1, Algorithm.GMAC: 2}
_ALGORITHMS = {code: algorithm for algorithm, code in _CODES.items()}
_CHECKSUM = 32
_HEADER = struct.Struct("<8sIIQIIQQI12s")
_FILE = struct.Struct("<IIQ")
_PROCESS = struct.Struct("<II")
_RUN = struct.Struct("<QII")

Run = tuple[int, int, int]
"""Address, pages, and position in the table of processes or `SKIPPED`."""


class FileKind(IntEnum):
    """Who wrote a page file, and so where it lies."""

    SHARD = 0
    PAGES_IMAGE = 1


@dataclass(frozen=True)
class PageFile:
    """A file that holds pages and nothing else; *size* in bytes."""

    kind: FileKind
    number: int
    size: int

    @property
    def name(self) -> str:
        """Name inside the directory of its kind."""
        return f"shard-{self.number:02d}" if self.kind is FileKind.SHARD else f"pages-{self.number}.img"

    @property
    def path(self) -> str:
        """Name inside the checkpoint."""
        return f"memory/{self.name}"


@dataclass(frozen=True)
class Block:
    """One block of a page file, with its runs."""

    number: int
    file: PageFile
    offset: int
    length: int


@dataclass(frozen=True)
class Index:
    """A checked index; *ends*, *digests* and *runs* are the tables of the format."""

    block_size: int
    files: tuple[PageFile, ...]
    pids: tuple[NsPid, ...]
    ends: tuple[int, ...]
    algorithm: Algorithm
    digests: bytes
    runs: bytes

    @property
    def size(self) -> int:
        """Bytes in all page files together."""
        return sum(file.size for file in self.files)

    @property
    def run_count(self) -> int:
        """Number of runs, skipped ones too."""
        return len(self.runs) // _RUN.size

    def blocks(self) -> Iterator[Block]:
        """Yield every block in the order of the tables."""
        number = 0
        for file in self.files:
            for offset in range(0, file.size, self.block_size):
                yield Block(number, file, offset, min(self.block_size, file.size - offset))
                number += 1

    def digest(self, block: Block) -> bytes:
        """Return the digest that the bytes of *block* must have."""
        size = self.algorithm.size
        return self.digests[block.number * size : (block.number + 1) * size]

    def runs_of(self, block: Block) -> Iterator[Run]:
        """Yield the runs of *block* in the order in which they lie in it."""
        first = self.ends[block.number - 1] if block.number else 0
        return _RUN.iter_unpack(self.runs[first * _RUN.size : self.ends[block.number] * _RUN.size])

    def entries(self) -> dict[str, FileEntry]:
        """Return for each page file, by its path in the checkpoint, what a manifest says of it."""
        found: dict[str, FileEntry] = {}
        at = 0
        for file in self.files:
            length = -(-file.size // self.block_size) * self.algorithm.size
            blocks = Blocks(
                size=file.size,
                block_size=self.block_size,
                digests=self.digests[at : at + length],
                algorithm=self.algorithm,
            )
            found[file.path] = FileEntry.of_blocks(blocks)
            at += length
        return found

    def encode(self) -> bytes:
        """Return the index as the bytes of its file."""
        body = b"".join(
            (
                _HEADER.pack(
                    _MAGIC,
                    min(VERSION, WRITTEN),
                    PAGE,
                    self.block_size,
                    len(self.files),
                    len(self.pids),
                    len(self.ends),
                    self.run_count,
                    _CODES[self.algorithm],
                    bytes(12),
                ),
                b"".join(_FILE.pack(file.kind, file.number, file.size) for file in self.files),
                b"".join(_PROCESS.pack(pid, 0) for pid in self.pids),
                struct.pack(f"<{len(self.ends)}Q", *self.ends),
                self.digests,
                self.runs,
            )
        )
        return body + hashlib.sha256(body).digest()


def decode(data: bytes) -> Index:
    """Return the index that *data* holds, completely checked.

    Raises:
        Refused: ``FORMAT_TOO_NEW``, or ``CORRUPT`` with what is wrong.
    """
    try:
        return _decode(data)
    except (ValueError, struct.error) as error:
        raise Refused(Reason.CORRUPT, f"memory/{INDEX_NAME} is damaged: {error}.") from error


def _decode(data: bytes) -> Index:
    magic, version, page, block_size, files, processes, blocks, runs, digest, reserved = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError("it does not start with the magic")
    if version > VERSION:
        text = f"memory/{INDEX_NAME} has version {version}; this ChReK reads versions up to {VERSION}."
        raise Refused(Reason.FORMAT_TOO_NEW, text)
    if hashlib.sha256(data[:-_CHECKSUM]).digest() != data[-_CHECKSUM:]:
        raise ValueError("its checksum is wrong")
    algorithm = _ALGORITHMS.get(digest)
    if version < 1 or (version == 1 and algorithm is not Algorithm.SHA256):
        raise ValueError(f"no ChReK writes version {version} with digests of kind {digest}")
    if page != PAGE or algorithm is None or any(reserved):
        raise ValueError("the header has values that no ChReK writes")
    if not MIN_BLOCK <= block_size <= MAX_BLOCK or block_size & (block_size - 1):
        raise ValueError(f"the block size is {block_size}")
    sizes = (_FILE.size * files, _PROCESS.size * processes, 8 * blocks, algorithm.size * blocks, _RUN.size * runs)
    if len(data) != _HEADER.size + sum(sizes) + _CHECKSUM:
        raise ValueError(f"it has {len(data)} bytes, which its counts do not give")
    tables: list[bytes] = []
    at = _HEADER.size
    for size in sizes:
        tables.append(data[at : at + size])
        at += size
    index = Index(
        block_size=block_size,
        files=tuple(PageFile(FileKind(kind), number, size) for kind, number, size in _FILE.iter_unpack(tables[0])),
        pids=_pids(tables[1]),
        ends=struct.unpack(f"<{blocks}Q", tables[2]),
        algorithm=algorithm,
        digests=tables[3],
        runs=tables[4],
    )
    _check_files(index.files)
    _check_ends(index)
    _check_runs(index)
    return index


def _pids(table: bytes) -> tuple[NsPid, ...]:
    pids = [NsPid(pid) for pid, _ in _PROCESS.iter_unpack(table)]
    if any(reserved for _, reserved in _PROCESS.iter_unpack(table)):
        raise ValueError("the table of processes has values that no ChReK writes")
    if len(set(pids)) != len(pids) or not all(1 <= pid <= MAX_PID for pid in pids):
        raise ValueError("the table of processes has a bad or repeated id")
    return tuple(pids)


def _check_files(files: Sequence[PageFile]) -> None:
    if len({(file.kind, file.number) for file in files}) != len(files):
        raise ValueError("a page file is listed twice")
    for file in files:
        if file.size <= 0 or file.size % PAGE or file.size > USER_TOP:
            raise ValueError(f"{file.path} has the size {file.size}")


def _check_ends(index: Index) -> None:
    # Counted before anything is looped over: a size of 2^55 bytes must not keep us busy.
    if sum(-(-file.size // index.block_size) for file in index.files) != len(index.ends):
        raise ValueError("the sizes of the page files do not give the number of blocks")
    before = 0
    for end in index.ends:
        if end <= before:
            raise ValueError("a block has no runs")
        before = end
    if before != index.run_count:
        raise ValueError("the blocks do not use all runs")


def _check_runs(index: Index) -> None:
    starts: list[list[int]] = [[] for _ in index.pids]
    known = len(index.pids)
    for block in index.blocks():
        left = block.length
        for address, pages, process in index.runs_of(block):
            left -= pages * PAGE
            if not pages or (process >= known and (process != SKIPPED or address)):
                raise ValueError(f"a run at {address:#x} is of no pages or of no process")
            if address % PAGE or address + pages * PAGE > USER_TOP:
                raise ValueError(f"a run of {pages} pages at {address:#x} is not in user space")
            if process < known:
                # Page number and length in one integer: a list of those sorts fast and takes little room.
                starts[process].append((address // PAGE) << 32 | pages)
        if left:
            raise ValueError(f"the runs of block {block.number} do not fill it")
    for pid, packed in zip(index.pids, starts, strict=True):
        packed.sort()
        end = 0
        for run in packed:
            if run >> 32 < end:
                raise ValueError(f"two runs of process {pid} overlap at {(run >> 32) * PAGE:#x}")
            end = (run >> 32) + (run & 0xFFFFFFFF)
        packed.clear()


def pack_runs(runs: Iterable[Run]) -> bytes:
    """Return runs as the table has them."""
    return b"".join(_RUN.pack(*run) for run in runs)


class RunTable:
    """The runs of one page file while it is written; cuts them where a block ends."""

    def __init__(self, block_size: int) -> None:
        self._room = self._pages = block_size // PAGE
        self._last: list[int] | None = None
        self._packed = bytearray()
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self._packed) // _RUN.size

    def add(self, address: int, pages: int, process: int) -> None:
        """Append a run; one that goes on where the last one ended is joined to it."""
        last = self._last
        if last is not None and last[2] == process and last[0] + last[1] * PAGE == address and pages <= self._room:
            last[1] += pages
            self._room -= pages
        else:
            while pages:
                self._flush()
                part = min(pages, self._room)
                self._last = [address, part, process]
                self._room -= part
                pages -= part
                if process != SKIPPED:
                    address += part * PAGE
                self._end_block(full_only=True)
        self._end_block(full_only=True)

    def finish(self) -> tuple[bytes, list[int]]:
        """Return the packed runs and for each block the number of runs up to its end."""
        self._end_block(full_only=False)
        return bytes(self._packed), self._ends

    def _flush(self) -> None:
        if self._last is not None:
            self._packed += _RUN.pack(*self._last)
            self._last = None

    def _end_block(self, *, full_only: bool) -> None:
        if self._room == self._pages or (full_only and self._room):
            return
        self._flush()
        self._ends.append(len(self))
        self._room = self._pages
