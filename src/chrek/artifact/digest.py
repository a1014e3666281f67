"""Digests of files: one SHA-256 for a small file, one of each block for bulk data.

Blocks let all cores work on one file, and let a restore check a block in the buffer that it is about
to write into memory. Blocks of 4 MiB cost 16 bytes each: 0.25 MB for 64 GB. Blocks are digested with GMAC, five times
as fast as SHA-256 (`chrek.system.gmac` says why), where Python has libcrypto, else with SHA-256; both are read. Files
are read with ``preadv`` into one buffer a thread, not mapped: a file that shrinks under a mapping kills the
reader with SIGBUS.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Literal, Protocol

from chrek.artifact.written import WRITTEN
from chrek.system import gmac

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BLOCK_SIZE: Final = 4 << 20
"""Block size that this project writes, in bytes."""

BULK_LIMIT: Final = 8 << 20
"""Files of this many bytes and more get a digest for each block."""

_MIN_BLOCK: Final = 64 << 10
_MAX_BLOCK: Final = 64 << 20
_SHA256_SIZE: Final = 32
_READ: Final = 1 << 20  # fits a core's second-level cache, so that hashing reads what reading just wrote
_HEX: Final = frozenset("0123456789abcdef")


class Hash(Protocol):
    """A digest that is being computed."""

    def update(self, buffer: ReadableBuffer, /) -> None:
        """Append *buffer*."""

    def digest(self) -> bytes:
        """Return the digest of all that was appended."""


class Algorithm(Enum):
    """How blocks are digested; the values are those of the manifest."""

    SHA256 = "sha256"
    GMAC = "gmac"

    @property
    def size(self) -> int:
        """Bytes of one digest."""
        return _SHA256_SIZE if self is Algorithm.SHA256 else gmac.SIZE

    def new(self) -> Hash:
        """Return an empty digest.

        Raises:
            Refused: ``NOT_SUPPORTED_HERE``; this Python cannot compute it.
        """
        return hashlib.sha256() if self is Algorithm.SHA256 else gmac.Gmac()

    def of(self, buffer: ReadableBuffer) -> bytes:
        """Return the raw digest of *buffer*; raises like `new`."""
        digest = self.new()
        digest.update(buffer)
        return digest.digest()


FASTEST: Final = Algorithm.GMAC if gmac.available() and WRITTEN > 1 else Algorithm.SHA256
"""What blocks are digested with when they are written."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The digests of a file's blocks: raw values, one after the other."""

    size: int
    block_size: int
    digests: bytes
    algorithm: Algorithm

    def __post_init__(self) -> None:
        if not _MIN_BLOCK <= self.block_size <= _MAX_BLOCK or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size {self.block_size} is not a power of two from {_MIN_BLOCK} to {_MAX_BLOCK}")
        if len(self.digests) != self.count * self.algorithm.size:
            raise ValueError(
                f"{len(self.digests)} bytes of digests are not {self.count} blocks of {self.algorithm.size}"
            )

    @property
    def count(self) -> int:
        """Number of blocks."""
        return -(-self.size // self.block_size)

    def extent(self, index: int) -> tuple[int, int]:
        """Return offset and length in bytes of block *index*."""
        offset = index * self.block_size
        return offset, min(self.block_size, self.size - offset)

    def expected(self, index: int) -> bytes:
        """Return the raw digest that block *index* must have."""
        return self.digests[index * self.algorithm.size : (index + 1) * self.algorithm.size]

    def verify(self, index: int, buffer: ReadableBuffer) -> bool:
        """Whether *buffer* holds exactly the bytes of block *index*."""
        view = memoryview(buffer)
        return view.nbytes == self.extent(index)[1] and self.algorithm.of(view) == self.expected(index)


class BlocksBuilder:
    """Collects the digests of blocks that are written in any order, by any number of threads."""

    def __init__(self, *, block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        self._digests: dict[int, tuple[int, bytes]] = {}

    def add(self, index: int, buffer: ReadableBuffer) -> None:
        """Digest *buffer*, the whole contents of block *index*."""
        view = memoryview(buffer)
        # One dict store is atomic under the interpreter's lock; no two threads write one block.
        self._digests[index] = (view.nbytes, FASTEST.of(view))

    def finish(self) -> Blocks:
        """Return the digests.

        Raises:
            ValueError: a block is missing, or one before the last is short.
        """
        blocks = [self._digests.get(index, (0, b"")) for index in range(max(self._digests, default=-1) + 1)]
        if any(length != self.block_size for length, _ in blocks[:-1]):
            raise ValueError("a block is missing or short")
        size = sum(length for length, _ in blocks)
        digests = b"".join(raw for _, raw in blocks)
        return Blocks(size=size, block_size=self.block_size, digests=digests, algorithm=FASTEST)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a manifest says of one file: its size in bytes and its digest, in one of two forms."""

    size: int
    sha256: str | None = None
    block_size: int | None = None
    digest: Literal["gmac", "sha256"] | None = None
    blocks: bytes | None = None

    def __post_init__(self) -> None:
        if self.sha256 is not None:
            if self.block_size is not None or self.blocks is not None or self.digest is not None:
                raise ValueError("sha256 and blocks exclude each other")
            check_sha256(self.sha256)
        elif self.block_size is None or self.blocks is None:
            raise ValueError("neither sha256 nor block_size and blocks are there")
        else:
            self._make_blocks(self.block_size, self.blocks)

    @property
    def bulk(self) -> Blocks | None:
        """The digests of the blocks, or None for a small file."""
        if self.block_size is None or self.blocks is None:
            return None
        return self._make_blocks(self.block_size, self.blocks)

    @classmethod
    def of_blocks(cls, blocks: Blocks) -> FileEntry:
        """Return the entry of a bulk file."""
        digest: Literal["gmac", "sha256"] | None = blocks.algorithm.value if WRITTEN > 1 else None
        return cls(size=blocks.size, block_size=blocks.block_size, digest=digest, blocks=blocks.digests)

    @classmethod
    def of_bytes(cls, contents: bytes) -> FileEntry:
        """Return the entry of a small file with these contents."""
        return cls(size=len(contents), sha256=hashlib.sha256(contents).hexdigest())

    def _make_blocks(self, block_size: int, digests: bytes) -> Blocks:
        # Format 1 had no name for it: it knew one.
        algorithm = Algorithm(self.digest or "sha256")
        return Blocks(size=self.size, block_size=block_size, digests=digests, algorithm=algorithm)


def check_sha256(text: str) -> None:
    """Raise ValueError unless *text* is a SHA-256 in lower-case hexadecimal."""
    if len(text) != 2 * _SHA256_SIZE or not _HEX.issuperset(text):
        raise ValueError(f"{text[:80]!r} is not a SHA-256 in lower-case hexadecimal")


def hash_extent(
    fd: int, offset: int, length: int, *, algorithm: Algorithm, buffer: memoryview | None = None
) -> bytes | None:
    """Return the raw digest of *length* bytes at *offset*, or None if the file ends before."""
    view = memoryview(bytearray(min(_READ, max(length, 1)))) if buffer is None else buffer
    digest = algorithm.new()
    while length > 0:
        got = os.preadv(fd, [view[: min(len(view), length)]], offset)
        if got == 0:
            return None
        digest.update(view[:got])
        offset += got
        length -= got
    return digest.digest()


def hash_file(fd: int, *, workers: int = 1) -> FileEntry:
    """Return the entry of an open regular file, in the form that its size asks for."""
    size = os.fstat(fd).st_size
    if size >= BULK_LIMIT:
        return FileEntry.of_blocks(hash_blocks(fd, size, workers=workers))
    raw = hash_extent(fd, 0, size, algorithm=Algorithm.SHA256)
    if raw is None:
        raise ValueError("the file shrank while it was read")
    return FileEntry(size=size, sha256=raw.hex())


def hash_blocks(fd: int, size: int, *, block_size: int = BLOCK_SIZE, workers: int = 1) -> Blocks:
    """Digest a file in blocks with *workers* threads.

    Raises:
        ValueError: the file is shorter than *size* bytes.
    """
    empty = bytes(-(-size // block_size) * FASTEST.size)
    layout = Blocks(size=size, block_size=block_size, digests=empty, algorithm=FASTEST)

    def one(index: int) -> bytes | None:
        return hash_extent(fd, *layout.extent(index), algorithm=FASTEST)

    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            digests = list(pool.map(one, range(layout.count)))
    else:
        digests = [one(index) for index in range(layout.count)]
    if None in digests:
        raise ValueError("the file shrank while it was read")
    joined = b"".join(raw for raw in digests if raw is not None)
    return Blocks(size=size, block_size=block_size, digests=joined, algorithm=FASTEST)
