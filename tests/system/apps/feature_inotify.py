"""inotify watches of a directory and of a file on the container's own root go on reporting."""
import ctypes
import os
import select
import struct

libc = ctypes.CDLL(None, use_errno=True)


def setup():
    os.makedirs("/var/lib/feature/watched")
    open("/var/lib/feature/watched/file", "w").close()
    fd = libc.inotify_init1(0o4000)
    assert libc.inotify_add_watch(fd, b"/var/lib/feature/watched", 0x100) >= 0  # IN_CREATE
    assert libc.inotify_add_watch(fd, b"/var/lib/feature/watched/file", 0x2) >= 0  # IN_MODIFY
    return fd


def check(fd):
    open("/var/lib/feature/watched/new", "w").close()
    with open("/var/lib/feature/watched/file", "w") as file:
        file.write("x")
    data = b""
    while len(data) < 32 + 16:
        assert select.select([fd], [], [], 5)[0], data
        data += os.read(fd, 4096)
    masks = []
    while data:
        _, mask, _, size = struct.unpack_from("iIII", data)
        masks.append(mask)
        data = data[16 + size :]
    assert 0x100 in masks and 0x2 in masks, masks
