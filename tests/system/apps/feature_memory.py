"""Every page is what it was: PROT_NONE, read-only, executable, locked, huge-page advised, sparse, and 20,000 small areas."""
import ctypes
import mmap
import os
import random

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
READ, WRITE, EXECUTE = 1, 2, 4
AREAS = int(os.environ.get("AREAS", "20000"))


def area(size, seed):
    address = libc.mmap(None, size, READ | WRITE, 0x22, -1, 0)
    ctypes.memmove(address, random.Random(seed).randbytes(size), size)
    return address


def setup():
    kinds = {}
    for number, (name, protection) in enumerate((("none", 0), ("ro", READ), ("rx", READ | EXECUTE), ("rw", READ | WRITE))):
        kinds[name] = (area(1 << 20, number), 1 << 20, number, protection)
        libc.mprotect(kinds[name][0], 1 << 20, protection)
    locked = area(64 << 10, 10)
    libc.mlock(locked, 64 << 10)
    huge = libc.mmap(None, 8 << 20, READ | WRITE, 0x22, -1, 0)
    libc.madvise(huge, 8 << 20, 14)
    ctypes.memmove(huge + (2 << 20), random.Random(11).randbytes(4 << 20), 4 << 20)
    sparse = libc.mmap(None, 64 << 20, READ | WRITE, 0x22, -1, 0)
    for page in range(0, 64 << 20, 1 << 20):
        ctypes.memmove(sparse + page, page.to_bytes(8, "little"), 8)
    small = libc.mmap(None, 8192 * AREAS, 0, 0x22, -1, 0)
    for number in range(AREAS):
        libc.mprotect(small + 8192 * number, 4096, READ | WRITE)
        ctypes.memmove(small + 8192 * number, number.to_bytes(8, "little"), 8)
    private = mmap.mmap(os.open("/etc/passwd", os.O_RDONLY), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    private[:4] = b"MINE"
    return kinds, locked, huge, sparse, small, private


def content(address, size):
    return ctypes.string_at(address, size)


def check(state):
    kinds, locked, huge, sparse, small, private = state
    for name, (address, size, seed, protection) in kinds.items():
        libc.mprotect(address, size, protection | READ)
        assert content(address, size) == random.Random(seed).randbytes(size), name
    assert content(locked, 64 << 10) == random.Random(10).randbytes(64 << 10)
    assert content(huge, 2 << 20) == bytes(2 << 20)
    assert content(huge + (2 << 20), 4 << 20) == random.Random(11).randbytes(4 << 20)
    for page in range(0, 64 << 20, 1 << 20):
        assert content(sparse + page, 16) == page.to_bytes(8, "little") + bytes(8), page
        assert content(sparse + page + 4096, 8) == bytes(8)
    for number in range(AREAS):
        assert content(small + 8192 * number, 8) == number.to_bytes(8, "little"), number
    assert private[:4] == b"MINE" and open("/etc/passwd").read(4) != "MINE"
