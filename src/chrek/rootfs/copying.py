"""Copying one file's content as it is: holes stay holes, and the kernel does the work where it can."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from typing import Final

_OVERLAYFS: Final = 0x794C7630  # OVERLAYFS_SUPER_MAGIC (linux/magic.h)
_CHUNK: Final = 1 << 30

_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs
_fstatfs.restype = ctypes.c_int
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)


def is_overlay(fd: int) -> bool:
    """Tell whether an open file lies on an overlay (statfs(2); Python's `os.statvfs` leaves the type out)."""
    result = (ctypes.c_long * 32)()  # struct statfs begins with f_type and is shorter than this
    return _fstatfs(fd, ctypes.addressof(result)) == 0 and result[0] & 0xFFFFFFFF == _OVERLAYFS


def copy_content(source: int, target: int, size: int) -> None:
    """Copy *size* bytes of *source* into the empty file *target*; a source that shrinks leaves a hole."""
    os.truncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        end = min(size, os.lseek(source, at, os.SEEK_HOLE))
        os.lseek(target, at, os.SEEK_SET)
        while at < end:
            done = os.sendfile(target, source, at, min(_CHUNK, end - at))
            if not done:
                return
            at += done


def copy_attributes(source: int, target: int) -> None:
    """Copy every extended attribute that can be set; labels that the kernel gives by itself stay as they are."""
    for name in os.listxattr(source):
        with suppress(OSError):
            os.setxattr(target, name, os.getxattr(source, name))
