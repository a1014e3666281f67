"""Reading and writing another process's memory.

Two kernel interfaces, each with its odd facts:

* ``process_vm_readv`` and ``process_vm_writev`` (man 2) copy directly between two address spaces, many pieces
  a call (IOV_MAX = 1024), without stopping anybody. They obey the mapping's protection: a page that is
  ``---`` cannot be read, and one that is ``r--``, ``r-x`` or ``---`` cannot be written (EFAULT). They stop at the
  first such page and return what they did until then, even in the middle of a piece.
  And **reading with it ends copy-on-write sharing**: it pins the pages, and since Linux 5.19 pinning a page that
  forked processes share first gives the process its own copy (FAULT_FLAG_UNSHARE in mm/gup.c). A server with
  ten workers would grow tenfold by being looked at.
* ``/proc/PID/mem`` (proc(5)) ignores the protection (FOLL_FORCE; where the kernel was told not to, by
  ``proc_mem.force_override``, it fails with EIO). It copies page by page through a bounce page and is three
  times slower, so it gets only the pieces that the other call refused, and the shared pages, which it leaves shared.
* ``/proc/PID/pagemap`` (Documentation/admin-guide/mm/pagemap.rst) has a word of 8 bytes for each page; its highest
  byte is 0x80 for a page that is present and mapped by more than one process, 0x81 for one mapped exclusively. A
  huge page that another process maps in parts counts as exclusive.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Final, Self

from chrek.system.ids import HostPid

IOV_MAX: Final = 1024
"""Most pieces in one call (uio.h, UIO_MAXIOV)."""

_HUGE: Final = 2 << 20
_PAGE: Final = 4096
_FRAME: Final = (1 << 55) - 1
_EXCLUSIVE: Final = b"\x81"
_LOOK: Final = 64 << 20
# Present, not of a file and not exclusive, or in swap (where sharing does not show); bits 57 and 58 may be set.
_SHARED = re.compile(rb"[\x40-\x4f\x80\x82-\x90]+")

_libc = ctypes.CDLL(None, use_errno=True)
_VmCall = Callable[[int, int, int, int, int, int], int]


def _vm_call(name: str) -> _VmCall:
    function = getattr(_libc, name)
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    function.restype = ctypes.c_ssize_t
    call: _VmCall = function
    return call


_readv = _vm_call("process_vm_readv")
_writev = _vm_call("process_vm_writev")
_SHORT: Final = 64 << 10
# Letting go of the interpreter's lock and fighting sixteen threads to get it back costs more than 64 KiB of memcpy.
_held = ctypes.PyDLL(None)
for _library in (_libc, _held):
    _library.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    _library.memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    _library.memmove.restype = ctypes.c_void_p
_memcmp, _memcmp_short = _libc.memcmp, _held.memcmp
_memmove, _memmove_short = _libc.memmove, _held.memmove

Piece = tuple[int, int]
"""Address and length in bytes, in the other process."""


class AccessError(Exception):
    """The memory of a process could not be read or written at an address."""

    def __init__(self, pid: HostPid, address: int, number: int) -> None:
        super().__init__(f"process {pid} at {address:#x}: {os.strerror(number)}")
        self.pid = pid
        self.address = address
        self.errno = number


class Buffer:
    """Page-aligned memory of our own, with its address; freed when the block ends.

    Huge pages are asked for: they halve the cost of the first use and spare the kernel page-table walks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= _HUGE:
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.view = memoryview(self._map)
        self.words = self.view.cast("Q")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.words.release()
        self.view.release()
        # A traceback that is still alive may hold a slice; the memory then goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()

    def is_repeated(self, offset: int, length: int) -> bool:
        """Whether all 8-byte words of a piece equal its first one."""
        at = self.address + offset
        compare = _memcmp if length > _SHORT else _memcmp_short
        return length <= 8 or compare(at, at + 8, length - 8) == 0

    def move(self, target: int, source: int, length: int) -> None:
        """Move bytes inside the buffer."""
        if length and target != source:
            move = _memmove if length > _SHORT else _memmove_short
            move(self.address + target, self.address + source, length)


class Task:
    """One process whose memory is moved; may be used by many threads at once.

    With *forked* huge pages are taken to be shared, since the kernel does not tell for sure.
    """

    def __init__(self, pid: HostPid, *, forked: bool = True) -> None:
        self.pid = pid
        self._forked = forked
        self._mem: int | None = None
        self._pagemap: int | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close what was opened."""
        for fd in (self._mem, self._pagemap):
            if fd is not None:
                os.close(fd)
        self._mem = self._pagemap = None

    def read(self, pieces: Sequence[Piece], buffer: Buffer, offset: int) -> None:
        """Read pieces one after the other into *buffer* from *offset* on; shared pages stay shared.

        Raises:
            AccessError: a page cannot be read.
        """
        own: list[Piece] = []
        start = offset
        for address, length, shared in self._by_sharing(pieces):
            if shared:
                self._transfer(_readv, self._read_mem, own, buffer, start)
                self._whole(self._read_mem, address, buffer.view[offset : offset + length])
                own, start = [], offset + length
            else:
                own.append((address, length))
            offset += length
        self._transfer(_readv, self._read_mem, own, buffer, start)

    def read_slowly(self, address: int, length: int, buffer: Buffer) -> None:
        """Read one piece to the start of *buffer* without asking whether it is shared; what is stays so.

        Raises:
            AccessError: a page cannot be read.
        """
        self._whole(self._read_mem, address, buffer.view[:length])

    def pagemap(self, address: int, length: int) -> bytes:
        """Return the pagemap words of a piece, 8 bytes a page; zeros behind the end of the address space.

        Raises:
            AccessError: the process is gone.
        """
        data = b""
        wanted = length // _PAGE * 8
        while len(data) < wanted:
            try:
                part = os.pread(self._open_pagemap(), wanted - len(data), address // _PAGE * 8 + len(data))
            except OSError as error:
                raise AccessError(self.pid, address, error.errno or errno.EIO) from error
            data += part or bytes(wanted - len(data))
        return data

    def _by_sharing(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, int, bool]]:
        """Yield the pieces, cut where sharing begins and ends; they must be in order."""
        if not pieces:
            return
        start, end = pieces[0][0], pieces[-1][0] + pieces[-1][1]
        # One look at everything is 1 % of the time of the copy; one at each of 512 pieces is as long as the copy.
        if end - start <= _LOOK and _SHARED.search(self._sharing(start, end - start)) is None:
            for address, length in pieces:
                yield address, length, False
            return
        for address, length in pieces:
            done = 0
            for match in _SHARED.finditer(self._sharing(address, length)):
                first, last = match.span()
                if first > done:
                    yield address + done * _PAGE, (first - done) * _PAGE, False
                yield address + first * _PAGE, (last - first) * _PAGE, True
                done = last
            if done * _PAGE < length:
                yield address + done * _PAGE, length - done * _PAGE, False

    def _sharing(self, address: int, length: int) -> bytes:
        """Return the highest byte of each page's pagemap word, 0x80 for every page that may be shared."""
        if not self._forked:
            return self.pagemap(address, length)[7::8]
        # Around it, whole huge pages: one that is mapped by one process as such and by another in parts counts as
        # exclusive for the first.
        before = address % _HUGE
        around = self.pagemap(address - before, -(-(before + length) // _HUGE) * _HUGE)
        top = bytearray(around[7::8])
        words = memoryview(around).cast("Q")
        for first in range(0, len(words), _HUGE // _PAGE):
            last = first + _HUGE // _PAGE
            frame, last_frame = words[first] & _FRAME, words[last - 1] & _FRAME
            # Frame 0: this program may not see frames.
            if (not frame or last_frame - frame == last - 1 - first) and top[first:last] == _EXCLUSIVE * (last - first):
                top[first:last] = b"\x80" * (last - first)
        return bytes(top[before // _PAGE : (before + length) // _PAGE])

    def write(self, pieces: Sequence[Piece], buffer: Buffer, offset: int) -> None:
        """Write *buffer* from *offset* on to pieces, one after the other.

        Raises:
            AccessError: a page cannot be written.
        """
        self._transfer(_writev, self._write_mem, pieces, buffer, offset)

    def _transfer(
        self,
        vm_call: _VmCall,
        fallback: Callable[[int, memoryview], int],
        pieces: Sequence[Piece],
        buffer: Buffer,
        offset: int,
    ) -> None:
        todo = list(pieces)
        first = 0
        while first < len(todo):
            batch = todo[first : first + IOV_MAX]
            wanted = sum(length for _, length in batch)
            done = self._call(vm_call, batch, buffer.address + offset, wanted)
            offset += done
            if done == wanted:
                first += len(batch)
                continue
            while done >= todo[first][1]:
                done -= todo[first][1]
                first += 1
            address, length = todo[first]
            self._whole(fallback, address + done, buffer.view[offset : offset + length - done])
            offset += length - done
            first += 1

    def _call(self, vm_call: _VmCall, batch: Sequence[Piece], local: int, wanted: int) -> int:
        remote = array("Q", [number for piece in batch for number in piece])
        mine = array("Q", (local, wanted))
        done = vm_call(self.pid, mine.buffer_info()[0], 1, remote.buffer_info()[0], len(batch), 0)
        if done >= 0:
            return done
        number = ctypes.get_errno()
        # EPERM: no CAP_SYS_PTRACE over the process; ESRCH: it is gone. Neither gets better by another way.
        if number in {errno.EFAULT, errno.EIO}:
            return 0
        raise AccessError(self.pid, batch[0][0], number)

    def _whole(self, fallback: Callable[[int, memoryview], int], address: int, view: memoryview) -> None:
        with view:
            at = 0
            while at < len(view):
                try:
                    done = fallback(address + at, view[at:])
                except OSError as error:
                    raise AccessError(self.pid, address + at, error.errno or errno.EIO) from error
                if done <= 0:  # the address space is gone: the process has ended
                    raise AccessError(self.pid, address + at, errno.ESRCH)
                at += done

    def _read_mem(self, address: int, view: memoryview) -> int:
        return os.preadv(self._open(), [view], address)

    def _write_mem(self, address: int, view: memoryview) -> int:
        return os.pwrite(self._open(), view, address)

    def _open(self) -> int:
        with self._lock:
            if self._mem is None:
                self._mem = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            return self._mem

    def _open_pagemap(self) -> int:
        with self._lock:
            if self._pagemap is None:
                self._pagemap = os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            return self._pagemap


@contextlib.contextmanager
def tasks(pids: Sequence[HostPid]) -> Iterator[list[Task]]:
    """Give the processes' memory for the length of a block; a single one is taken not to share any."""
    opened = [Task(pid, forked=len(pids) > 1) for pid in pids]
    try:
        yield opened
    finally:
        for task in opened:
            task.close()
