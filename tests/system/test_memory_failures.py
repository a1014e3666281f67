"""Everything that can go wrong while memory moves: it is said by name, and nothing wrong is written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chrek.errors import CaptureFailed, ChrekError, Reason, Refused, RestoreFailed
from chrek.memory import (
    Captured,
    Folders,
    Index,
    Limits,
    Range,
    Verify,
    capture,
    fill,
    prefetch,
    read_index,
    verify,
    write_index,
)
from chrek.system.ids import HostPid, NsPid
from system.memory_child import BASE, PAGE, Child

APP = NsPid(7)
MB = 1 << 20
SMALL = 64 << 10
TWO = Limits(workers=2)


@pytest.fixture
def child() -> Iterator[Child]:
    """Run a process with 1 MiB of random memory."""
    with Child() as process:
        process(f"anon(BASE, {MB})\nrandomise(BASE, {MB}, 1)")
        yield process


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    """Give a descriptor of an empty ``memory/``."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture(autouse=True)
def _nothing_leaks(child: Child, folder: int) -> Iterator[None]:
    """Check after each test that no thread and no descriptor is left."""
    del child, folder  # made before the count
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("chrek-")]
    assert len(os.listdir("/proc/self/fd")) == before


def host(child: Child) -> dict[NsPid, HostPid]:
    """Return the map of process ids in which the application's one process is *child*."""
    return {APP: HostPid(child.pid)}


def take(child: Child, folder: int, size: int = MB, limits: Limits = TWO) -> Captured:
    """Capture the child's memory in small blocks."""
    return capture([Range(APP, BASE, size)], host_pids=host(child), folder=folder, block_size=SMALL, limits=limits)


def failure(expected: type[ChrekError], action: Callable[[], object]) -> ChrekError:
    """Return the error of *expected* type that *action* raises."""
    with pytest.raises(expected) as caught:
        action()
    error = caught.value
    # The traceback's frames hold what they opened; the reason and the text are what is looked at.
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def refill(child: Child, folder: int, index: Index, mode: Verify = Verify.FULL, limits: Limits = TWO) -> None:
    """Fill the child's memory from the shards."""
    fill(index, Folders(folder), host_pids=host(child), verify=mode, limits=limits)


# --- processes ----------------------------------------------------------------------------------


def test_a_dead_process_is_named_at_capture(child: Child, folder: int) -> None:
    """A process that ended before or during the copy ends the capture, with its id."""

    def kill(_done: int) -> None:
        child.kill()

    error = failure(CaptureFailed, lambda: take(child, folder, limits=Limits(workers=2, progress=kill)))
    assert error.reason is Reason.MEMORY_UNREADABLE
    assert f"process {child.pid}" in error.message
    assert "has ended" in error.message


def test_a_process_that_dies_during_the_fill(child: Child, folder: int) -> None:
    """A target that dies half way ends the fill, with process, address and shard."""
    index = take(child, folder).index

    def kill(_done: int) -> None:
        child.kill()

    limits = Limits(workers=2, progress=kill)
    error = failure(RestoreFailed, lambda: refill(child, folder, index, limits=limits))
    assert error.reason is Reason.FILL_FAILED
    assert f"process {child.pid} at 0x2000" in error.message
    assert "memory/shard-0" in error.message


def test_memory_that_is_not_there(child: Child, folder: int) -> None:
    """An address that is not mapped is named, at capture and at fill."""
    index = take(child, folder).index
    child(f"libc.munmap(BASE + {MB // 2}, PAGE)")
    text = f"{BASE + MB // 2:#x}"
    unread = failure(CaptureFailed, lambda: probe(child, folder))
    assert unread.reason is Reason.MEMORY_UNREADABLE
    assert text in unread.message
    unfilled = failure(RestoreFailed, lambda: refill(child, folder, index))
    assert unfilled.reason is Reason.FILL_FAILED
    assert text in unfilled.message


def probe(child: Child, folder: int) -> None:
    """Capture into a second directory."""
    os.mkdir("second", dir_fd=folder)
    fd = os.open("second", os.O_RDONLY, dir_fd=folder)
    try:
        take(child, fd)
    finally:
        os.close(fd)


def test_a_process_that_is_not_in_the_map(child: Child, folder: int) -> None:
    """A process of the checkpoint without a host process is refused before anything is touched."""
    index = take(child, folder).index
    missing = failure(RestoreFailed, lambda: fill(index, Folders(folder), host_pids={}))
    assert missing.reason is Reason.FILL_FAILED
    assert "Process 7" in missing.message
    unknown = failure(CaptureFailed, lambda: capture([Range(APP, BASE, MB)], host_pids={}, folder=folder))
    assert unknown.reason is Reason.MEMORY_UNREADABLE


# --- ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["capture", "fill"])
def test_cancel_and_deadline(child: Child, folder: int, step: str) -> None:
    """A request and a passed deadline end either step between two blocks."""
    index = take(child, folder).index
    stop = threading.Event()
    limits = {
        "cancel": Limits(workers=2, cancel=stop, progress=lambda _done: stop.set()),
        "deadline": Limits(workers=2, deadline=time.monotonic() - 1),
    }
    reasons = []
    for name, limit in limits.items():
        os.mkdir(name, dir_fd=folder)
        fd = os.open(name, os.O_RDONLY, dir_fd=folder)
        if step == "capture":
            reasons.append(failure(CaptureFailed, lambda: take(child, fd, limits=limit)).reason)  # noqa: B023
        else:
            reasons.append(failure(RestoreFailed, lambda: refill(child, folder, index, limits=limit)).reason)  # noqa: B023
        os.close(fd)
    assert reasons == [Reason.CAPTURE_INTERRUPTED if step == "capture" else Reason.FILL_FAILED, Reason.TIMEOUT]


# --- disks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[int]:
    """Mount a tmpfs of *size* bytes and give its directory."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "chrek-test", path], check=True)
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_full_disk_of_every_size(child: Child, tmp_path: Path) -> None:
    """Whatever the room, a capture that does not fit says so and which file did not."""
    for pages in range(1, MB // PAGE, 16):
        with small_disk(tmp_path / "disk", pages * PAGE) as fd:
            error = failure(CaptureFailed, lambda: take(child, fd))
        assert error.reason is Reason.NO_SPACE
        assert "memory/shard-0" in error.message


def test_a_full_disk_for_the_index(child: Child, tmp_path: Path) -> None:
    """An index that does not fit is told apart from a shard that does not."""
    with small_disk(tmp_path / "disk", MB) as fd:
        captured = take(child, fd)
        error = failure(CaptureFailed, lambda: write_index(fd, captured.index))
    assert (error.reason, "memory/index" in error.message) == (Reason.NO_SPACE, True)


def test_a_write_that_fails_otherwise(child: Child, folder: int) -> None:
    """A file system that refuses to go on for another reason than space is told apart, with the kernel's words."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * SMALL + PAGE, hard))
    try:
        error = failure(CaptureFailed, lambda: take(child, folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.reason is Reason.WRITE_FAILED
    assert "memory/shard-0" in error.message
    assert "File too large" in error.message


def test_files_that_are_there_already_are_not_overwritten(child: Child, folder: int) -> None:
    """A shard or index of an earlier capture is never written over."""
    captured = take(child, folder)
    write_index(folder, captured.index)
    assert failure(CaptureFailed, lambda: take(child, folder)).reason is Reason.WRITE_FAILED
    assert failure(CaptureFailed, lambda: write_index(folder, captured.index)).reason is Reason.WRITE_FAILED


# --- damage -------------------------------------------------------------------------------------


def test_every_flipped_byte_of_the_index_is_noticed(child: Child, folder: int, tmp_path: Path) -> None:
    """No byte of the index can change unseen, with or without the manifest's entry."""
    entry = write_index(folder, take(child, folder, size=4 * PAGE).index)
    good = (tmp_path / "index").read_bytes()
    for at in range(len(good)):
        (tmp_path / "index").write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
        assert failure(Refused, lambda: read_index(folder)).reason in {Reason.CORRUPT, Reason.FORMAT_TOO_NEW}
        assert failure(Refused, lambda: read_index(folder, entry)).reason is Reason.CORRUPT
    (tmp_path / "index").write_bytes(good)
    read_index(folder, entry)


def test_flipped_bytes_of_a_shard_are_noticed_and_not_written(child: Child, folder: int, tmp_path: Path) -> None:
    """A changed byte of a shard is found before its block reaches any memory, with file and place."""
    index = take(child, folder, size=SMALL, limits=Limits(workers=1)).index
    shard = tmp_path / "shard-00"
    good = shard.read_bytes()
    child(f"randomise(BASE, {SMALL}, 9)")
    before = child(f"sha(BASE, {SMALL})")
    for at in range(0, SMALL, 331):
        shard.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        for action in (lambda: refill(child, folder, index), lambda: verify(index, Folders(folder))):
            error = failure(RestoreFailed, action)
            assert error.reason is Reason.CORRUPT
            assert "memory/shard-00, bytes 0 to 65536" in error.message
    assert child(f"sha(BASE, {SMALL})") == before
    refill(child, folder, index, Verify.OFF)
    assert child(f"sha(BASE, {SMALL})") != before


def fifo(path: Path) -> None:
    """Put a FIFO in the file's place."""
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    """Put a link to an equal file in the file's place."""
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def directory(path: Path) -> None:
    """Put a directory in the file's place."""
    path.unlink()
    path.mkdir()


def longer(path: Path) -> None:
    """Append a page."""
    with path.open("ab") as file:
        file.write(bytes(PAGE))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "removed": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": longer,
    "fifo": fifo,
    "link": link,
    "directory": directory,
}


@pytest.mark.parametrize("name", ["index", "shard-00", "shard-01"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_files_that_are_not_what_they_were(
    child: Child, folder: int, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """A file that is missing, too short, too long or no regular file is refused before memory is touched."""

    def both(_done: int) -> None:
        # The first thread waits until the second one has a shard too.
        deadline = time.monotonic() + 30
        while not (tmp_path / "shard-01").exists() and time.monotonic() < deadline:
            pass

    captured = take(child, folder, limits=Limits(workers=2, progress=both))
    write_index(folder, captured.index)
    before = child(f"randomise(BASE, {MB}, 3)\nsha(BASE, {MB})")
    damage(tmp_path / name)

    def restore() -> None:
        refill(child, folder, read_index(folder))

    assert failure(Refused, restore).reason is Reason.CORRUPT
    if name != "index":
        assert failure(Refused, lambda: prefetch(captured.index, Folders(folder))).reason is Reason.CORRUPT
    assert child(f"sha(BASE, {MB})") == before


@pytest.mark.parametrize("mode", [Verify.FULL, Verify.OFF])
def test_a_shard_that_shrinks_while_it_is_read(child: Child, folder: int, tmp_path: Path, mode: Verify) -> None:
    """A file cut short during the fill is an error with its name, not a crash."""
    index = take(child, folder, limits=Limits(workers=1)).index

    def cut(_done: int) -> None:
        os.truncate(tmp_path / "shard-00", SMALL)

    error = failure(RestoreFailed, lambda: refill(child, folder, index, mode, Limits(workers=1, progress=cut)))
    assert error.reason is Reason.CORRUPT
    assert "memory/shard-00 ends at byte 65536" in error.message


def test_a_shard_that_changes_while_it_is_read(child: Child, folder: int, tmp_path: Path) -> None:
    """Bytes changed during the fill are caught by their digest before they are written."""
    index = take(child, folder, limits=Limits(workers=1)).index

    def change(_done: int) -> None:
        with (tmp_path / "shard-00").open("r+b") as file:
            file.seek(MB - PAGE)
            file.write(b"forged")

    error = failure(RestoreFailed, lambda: refill(child, folder, index, limits=Limits(workers=1, progress=change)))
    assert error.reason is Reason.CORRUPT
    assert child(f"get(BASE + {MB} - PAGE, 6).hex()") != b"forged".hex()


def test_an_index_that_names_files_of_another_directory(child: Child, folder: int, tmp_path: Path) -> None:
    """Pages images are only read where the caller gave their directory."""
    captured = take(child, folder, limits=Limits(workers=1))
    data = bytearray(captured.index.encode()[:-32])
    data[64] = 1  # the kind of the first file
    (tmp_path / "index").write_bytes(bytes(data) + hashlib.sha256(data).digest())
    index = read_index(folder)
    assert failure(Refused, lambda: refill(child, folder, index)).reason is Reason.CORRUPT
