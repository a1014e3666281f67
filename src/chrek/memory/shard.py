"""Page files on disk: written block by block by one thread each, read block by block by any.

A shard has one writer because a file's inode lock serialises writers: 16 threads wrote 1.5 GB/s into one
file and 10-16 GB/s into 16 (tmpfs, 16 cores). Reading shares that lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from chrek.artifact import FASTEST, FileEntry
from chrek.errors import CaptureFailed, Reason, Refused, RestoreFailed
from chrek.memory.index import INDEX_NAME, Block, FileKind, Index, PageFile, RunTable, decode
from chrek.memory.task import Buffer

MAX_INDEX: Final = 256 << 20
"""Most bytes an index may have; one for 1 TB of memory without holes has 30 MB."""

_READ_AHEAD: Final = 128 << 10
"""The kernel cuts one request to the device's read_ahead_kb or its best size (mm/readahead.c, force_page_cache_ra);
128 KiB is the default of the former. 256 MB asked for in such pieces: 0.06 s."""

_PIECE: Final = 512 << 10
"""Bytes in one write. ext4 (Linux 6.18) takes cache pages as large as the write: a whole huge page for 2 MiB, which in a
virtual machine is memory that the host has to give back first, 0.2 to 2.5 s of processor time a GB. From 128 KiB to
512 KiB it is 0.2 s, for 32 KiB 0.3 to 0.4 (2-core EPYC)."""

_HELD_UP: Final = 0.005
"""Seconds that the write of a block waited from which on it is digested at once, though digests were to come later. Then
the disk is what the application waits for (the kernel lets a writer sleep that is too far ahead of it, mm/page-writeback.c,
and takes off that sleep what the writer does in between), so the 0.3 ms of the digest cost nobody anything."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK opening a FIFO that somebody put in the file's place would wait for ever.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Folders:
    """Descriptors of a checkpoint's ``memory/`` and of the directory that holds page images of CRIU's, if any does."""

    memory: int
    images: int | None = None

    def of(self, file: PageFile) -> int:
        """Return the descriptor of the directory that *file* lies in.

        Raises:
            Refused: ``CORRUPT``, if the index names a file in a directory that was not given.
        """
        folder = self.memory if file.kind is FileKind.SHARD else self.images
        if folder is None:
            raise Refused(Reason.CORRUPT, f"The memory index names {file.path}, which this checkpoint cannot have.")
        return folder


def write_failed(name: str, error: OSError) -> CaptureFailed:
    """Return the error to raise for a failed write of ``memory/``*name*."""
    reason = Reason.NO_SPACE if error.errno in _FULL else Reason.WRITE_FAILED
    return CaptureFailed(reason, f"memory/{name} could not be written: {error.strerror}.")


class ShardWriter:
    """One shard while it is written: collects pages in a buffer and writes whole blocks.

    The buffer has room for two blocks, so that a block's worth can be read behind a block that is nearly full;
    the second half is only touched where zero pages were left out.
    """

    def __init__(self, folder: int, number: int, block_size: int, *, digest: bool) -> None:
        """Make the shard *number*; without *digest* only blocks whose write had to wait for the disk are digested."""
        self.block_size = block_size
        self.buffer = Buffer(2 * block_size)
        self.filled = 0
        self.runs = RunTable(block_size)
        self._folder = folder
        self._number = number
        self._digest = digest
        self._size = 0
        self._digests: list[bytes | None] = []
        self._fd: int | None = None

    @property
    def file(self) -> PageFile:
        """The shard as it is on disk."""
        return PageFile(FileKind.SHARD, self._number, self._size)

    @property
    def digests(self) -> list[bytes | None]:
        """The digests of the blocks written; None where that was left for later."""
        return list(self._digests)

    def close(self) -> None:
        """Free buffer and descriptor."""
        self.buffer.__exit__(None, None, None)
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def accept(self, length: int) -> None:
        """Take *length* bytes that lie behind those already in the buffer; write a block that is full.

        Raises:
            CaptureFailed: ``NO_SPACE`` or ``WRITE_FAILED``.
        """
        self.filled += length
        if self.filled >= self.block_size:
            self._write(self.block_size)

    def finish(self) -> None:
        """Write what is left in the buffer.

        Raises:
            CaptureFailed: ``NO_SPACE`` or ``WRITE_FAILED``.
        """
        if self.filled:
            self._write(self.filled)

    def _write(self, length: int) -> None:
        with self.buffer.view[:length] as block:
            started, used = time.monotonic(), time.thread_time()
            try:
                self._pwrite(block)
            except OSError as error:
                raise write_failed(self.file.name, error) from error
            waited = (time.monotonic() - started) - (time.thread_time() - used)
            self._digests.append(FASTEST.of(block) if self._digest or waited > _HELD_UP else None)
        self._size += length
        self.filled -= length
        self.buffer.move(0, length, self.filled)

    def _pwrite(self, block: memoryview) -> None:
        if self._fd is None:
            self._fd = os.open(self.file.name, _CREATE, 0o600, dir_fd=self._folder)
        done = 0
        while done < len(block):
            done += os.pwrite(self._fd, block[done : done + _PIECE], self._size + done)


class PageReader:
    """The page files of one index, opened and of the size the index says."""

    def __init__(self, descriptors: dict[PageFile, int]) -> None:
        self._descriptors = descriptors

    def read(self, block: Block, buffer: Buffer) -> None:
        """Read *block* to the start of *buffer*.

        Raises:
            RestoreFailed: ``CORRUPT`` if the file is too short, else ``FILL_FAILED``.
        """
        done = 0
        with buffer.view[: block.length] as view:
            while done < block.length:
                try:
                    got = os.preadv(self._descriptors[block.file], [view[done:]], block.offset + done)
                except OSError as error:
                    text = f"{block.file.path} could not be read at byte {block.offset + done}: {error.strerror}."
                    raise RestoreFailed(Reason.FILL_FAILED, text) from error
                if not got:
                    text = f"{block.file.path} ends at byte {block.offset + done}; it should have {block.file.size}."
                    raise RestoreFailed(Reason.CORRUPT, text)
                done += got

    @property
    def descriptors(self) -> list[int]:
        """The open files, in the order of the index."""
        return list(self._descriptors.values())

    def advise(self, block: Block) -> None:
        """Have the kernel start reading *block* into the page cache (posix_fadvise(2))."""
        fd = self._descriptors[block.file]
        with contextlib.suppress(OSError):  # a file system without read-ahead
            for offset in range(block.offset, block.offset + block.length, _READ_AHEAD):
                os.posix_fadvise(fd, offset, _READ_AHEAD, os.POSIX_FADV_WILLNEED)


@contextmanager
def page_files(index: Index, folders: Folders) -> Iterator[PageReader]:
    """Open every page file of *index*.

    Raises:
        Refused: ``CORRUPT``; a file is missing, is no regular file or has another size.
    """
    with ExitStack() as stack:
        descriptors: dict[PageFile, int] = {}
        for file in index.files:
            fd = _open(file.name, folders.of(file), file.path)
            stack.callback(os.close, fd)
            size = os.fstat(fd).st_size
            if size < file.size or (size != file.size and file.kind is FileKind.SHARD):
                raise Refused(Reason.CORRUPT, f"{file.path} has {size} bytes; the index says {file.size}.")
            descriptors[file] = fd
        yield PageReader(descriptors)


def _open(name: str, folder: int, path: str) -> int:
    try:
        fd = os.open(name, _READ, dir_fd=folder)
    except OSError as error:
        raise Refused(Reason.CORRUPT, f"{path} cannot be opened: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Refused(Reason.CORRUPT, f"{path} is not a regular file.")
    return fd


def write_index(folder: int, index: Index) -> FileEntry:
    """Write ``memory/index`` and return what a manifest says of it.

    Raises:
        CaptureFailed: ``NO_SPACE`` or ``WRITE_FAILED``.
    """
    data = index.encode()
    try:
        fd = os.open(INDEX_NAME, _CREATE, 0o600, dir_fd=folder)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
    except OSError as error:
        raise write_failed(INDEX_NAME, error) from error
    return FileEntry.of_bytes(data)


def read_index(folder: int, entry: FileEntry | None = None) -> Index:
    """Return the checked index of ``memory/``, which must be the one that *entry* describes.

    Raises:
        Refused: ``CORRUPT`` or ``FORMAT_TOO_NEW``.
    """
    fd = _open(INDEX_NAME, folder, f"memory/{INDEX_NAME}")
    with open(fd, "rb") as file:
        if os.fstat(fd).st_size > MAX_INDEX:
            raise Refused(Reason.CORRUPT, f"memory/{INDEX_NAME} is larger than {MAX_INDEX} bytes.")
        try:
            data = file.read(MAX_INDEX)
        except OSError as error:
            text = f"memory/{INDEX_NAME} could not be read: {error.strerror}."
            raise Refused(Reason.CORRUPT, text) from error
    if entry is not None and entry != FileEntry.of_bytes(data):
        raise Refused(Reason.CORRUPT, f"memory/{INDEX_NAME} is not the file that the manifest describes.")
    return decode(data)
