"""A memfd keeps its contents, its size, its seals and its position."""
import fcntl
import os


def setup():
    fd = os.memfd_create("feature", os.MFD_ALLOW_SEALING)
    os.write(fd, b"memory file" * 10000)
    os.lseek(fd, 7, os.SEEK_SET)
    fcntl.fcntl(fd, 1033, 0x0002 | 0x0004)  # F_ADD_SEALS: F_SEAL_SHRINK | F_SEAL_GROW
    return fd


def check(fd):
    assert os.lseek(fd, 0, os.SEEK_CUR) == 7
    assert os.fstat(fd).st_size == 110000
    assert os.pread(fd, 110000, 0) == b"memory file" * 10000
    assert fcntl.fcntl(fd, 1034) == 0x0006  # F_GET_SEALS
