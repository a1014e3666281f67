"""Power cut at every call that changes a store, on a real ext4: the old checkpoint or the new one, whole.

The file system is on a loop device and is shut down without flushing its journal (``EXT4_IOC_SHUTDOWN``), so that
everything which was not flushed is lost, as if the machine had lost power; then it is mounted again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chrek.store import Store, delete
from interrupt import count_changes, interrupt_at
from sample_store import publish, read_or_none
from system.ownmounts import in_own_mounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, include/uapi/linux/ext4.h
_NO_LOG_FLUSH = struct.pack("I", 2)  # EXT4_GOING_FLAGS_NOLOGFLUSH
_OLD = {"dump.log": b"old", "images/a": b"old", "memory/0": b"old" * 3000}
_NEW = {"dump.log": b"new!", "images/a": b"new!", "volumes/0.tar": b"new!"}


@pytest.fixture
def disk() -> Iterator[Path]:
    """Give a directory in memory for disk images and a mount point."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        Path(path, "mount").mkdir()
        yield Path(path)


@contextmanager
def _mounted(disk: Path, image: str = "image") -> Iterator[Path]:
    subprocess.run(["mount", "-o", "loop", str(disk / image), str(disk / "mount")], check=True)
    try:
        yield disk / "mount"
    finally:
        subprocess.run(["umount", str(disk / "mount")], check=True)


def _cut_power(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    fcntl.ioctl(fd, _SHUTDOWN, _NO_LOG_FLUSH)
    os.close(fd)


def _operate(disk: Path, operation: Callable[[Store], object], at: int) -> None:
    """Run the operation on a copy of the image, with the power cut before its *at*-th change (0: at its end)."""
    shutil.copyfile(disk / "pristine", disk / "image")
    with _mounted(disk) as path:
        child = os.fork()
        if child == 0:
            begun, done = threading.Event(), threading.Event()

            def cut() -> None:
                begun.set()
                _cut_power(path)
                done.set()
                os.kill(os.getpid(), signal.SIGKILL)

            try:
                interrupt_at(at, cut)
                with Store.open(path) as store:
                    operation(store)
                cut()
            finally:
                # What the other threads see of a power that is cut beside them is nobody's concern any more.
                if begun.is_set() and done.wait(10):
                    os.kill(os.getpid(), signal.SIGKILL)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)


def _found(disk: Path) -> str:
    with _mounted(disk) as path, Store.open(path) as store:
        contents = read_or_none(store, "abc")
        assert contents in (None, _OLD, _NEW)
        return "none" if contents is None else "old" if contents == _OLD else "new"


@pytest.mark.parametrize(
    ("what", "first"),
    [
        ("publication", "none"),
        ("publication", "published"),
        ("publication", "plain"),
        ("deletion", "published"),
        ("deletion", "plain"),
    ],
)
def test_power_cut_anywhere(disk: Path, what: str, first: str) -> None:
    """Never a mixture, never a marker without its files; what had returned before the cut has happened."""
    in_own_mounts(lambda: _cut_anywhere(disk, what, first))


def _cut_anywhere(disk: Path, what: str, first: str) -> None:
    operation: Callable[[Store], object] = (
        (lambda store: publish(store, "abc", _NEW)) if what == "publication" else (lambda store: delete(store, "abc"))
    )
    before = "none" if first == "none" else "old"
    after = "new" if what == "publication" else "none"
    with (disk / "pristine").open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(disk / "pristine")], check=True)
    with _mounted(disk, "pristine") as path, Store.open(path) as store:
        if first != "none":
            publish(store, "abc", _OLD)
        if first == "plain":
            (path / "abc").unlink()
            (path / ".generations" / "abc" / "1").rename(path / "abc")
    changes = count_changes(lambda: _on_copy(disk, operation))
    seen = set()
    for at in range(1, changes + 1):
        _operate(disk, operation, at)
        seen.add(found := _found(disk))
        assert found in {before, after}
    _operate(disk, operation, 0)
    assert _found(disk) == after
    assert before in seen


def _on_copy(disk: Path, operation: Callable[[Store], object]) -> None:
    shutil.copyfile(disk / "pristine", disk / "image")
    with _mounted(disk) as path, Store.open(path) as store:
        operation(store)
