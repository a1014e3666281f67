"""Files that the application writes, cut back to the size they had at the dump.

CRIU restores an open file only if its size is what it was, log files opened for appending excepted. On a
machine's own file system, where no layer of changes is replayed, a file may have grown since: the application
ran on after its checkpoint. The restored one goes on writing where it was at the dump, so what came after is
cut off first. Only files opened for nothing but writing are cut: whoever also reads a file (a data base) must
not find it changed, and is refused by the comparison of open files instead.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Self

from chrek.criu.images import read_all
from chrek.criu.messages import File
from chrek.errors import Reason, Refused, RestoreFailed
from chrek.rootfs import fd as fds

if TYPE_CHECKING:
    from chrek.engine.container import Container

_MAX_TAIL = 1 << 30
"""More than this written since the dump is not a log; it is refused rather than copied."""


@dataclass(frozen=True)
class Written:
    """A file open for writing only; *size* is what it must have, in bytes."""

    path: str
    size: int


def written(images: int) -> list[Written]:
    """Return the files of an image directory whose size CRIU compares although the application only writes them.

    Raises:
        Refused: ``CORRUPT``.
    """
    found = {}
    for file in read_all(images, "files.img", File):
        regular = file.regular
        if regular is None or regular.external or regular.size is None or not stat.S_ISREG(regular.mode or 0):
            continue
        if regular.flags & os.O_ACCMODE == os.O_WRONLY:
            found[regular.name] = Written(regular.name, regular.size)
    return list(found.values())


class Cut:
    """Cuts files and gives what was cut back unless `keep` is called; used as a context."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._stack = ExitStack()
        self._tails: list[tuple[int, int, IO[bytes]]] = []
        self.warnings: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for fd, size, tail in reversed(self._tails):
            with suppress(OSError), open(fd, "r+b", buffering=0, closefd=False) as file:
                file.seek(size)
                tail.seek(0)
                shutil.copyfileobj(tail, file)
        self._stack.close()

    def keep(self) -> None:
        """Let the files stay as they are."""
        self._tails.clear()

    def cut(self, files: list[Written]) -> None:
        """Give each file its size.

        Raises:
            RestoreFailed: ``FILES_NOT_APPLIED``.
            Refused: ``MOUNT_MISSING``, for one that is missing, shorter, or on a volume that others may share.
        """
        root = self._container.open_root()
        self._stack.callback(os.close, root)
        for file in files:
            self._cut(root, file)

    def _cut(self, root: int, file: Written) -> None:
        name = os.fsencode(file.path.lstrip("/"))
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = fds.openat2(root, name, flags, resolve=fds.IN_ROOT | fds.NO_MAGICLINKS)
        except OSError as error:
            message = f"{file.path}, which the application writes, cannot be opened here: {error.strerror}."
            raise Refused(Reason.MOUNT_MISSING, message) from error
        self._stack.callback(os.close, fd)
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size == file.size:
            return  # another type of file is for CRIU to refuse
        self._require_cuttable(file, info.st_size)
        try:
            tail = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed by the stack
            os.lseek(fd, file.size, os.SEEK_SET)
            with open(fd, "rb", buffering=0, closefd=False) as source:
                shutil.copyfileobj(source, tail)
            os.ftruncate(fd, file.size)
        except OSError as error:
            message = f"{file.path} cannot be cut to the {file.size} bytes it had: {error.strerror}."
            raise RestoreFailed(Reason.FILES_NOT_APPLIED, message) from error
        self._tails.append((fd, file.size, tail))
        more = info.st_size - file.size
        self.warnings.append(f"{more} bytes written to {file.path} after the checkpoint are cut off")

    def _require_cuttable(self, file: Written, size: int) -> None:
        mount = self._container.mount_of(file.path)
        shared = self._container.has_own_root and mount is not None and mount.point != "/"
        if size < file.size or size - file.size > _MAX_TAIL or shared:
            message = f"{file.path}, which the application writes, has {size} bytes here, not {file.size}."
            raise Refused(Reason.MOUNT_MISSING, message, cure="Give it the content it had at the checkpoint.")
