"""A full disk at any write gives an error that names the file, and nothing half done stays."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from chrek.errors import CaptureFailed, Reason, Refused, RestoreFailed
from chrek.rootfs import (
    Archive,
    Journal,
    SideFile,
    apply,
    pack_tree,
    put_back_links,
    put_file,
    read_archive,
    save_links,
)
from chrek.rootfs.skip import JOURNAL_PREFIX
from rootfs_trees import differences, directory, memory_file, overlay_mount, snapshot, tmpfs_mount

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts tmpfs: needs root")

PAGE = 4096


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Give a tree of a few pages and files."""
    path = tmp_path / "source"
    for name in ("a", "b"):
        (path / name).mkdir(parents=True)
        for number in range(4):
            (path / name / f"f{number}").write_bytes(b"x" * (PAGE * number + 1))
    return path


@pytest.fixture
def archive(source: Path) -> Iterator[Archive]:
    """Give an archive of it."""
    with memory_file() as fd, directory(source) as root:
        pack_tree(root, fd)
        yield read_archive(fd)


def fill(path: Path) -> None:
    """Take all space but none of the inodes."""
    with (path / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError:
            pass


@pytest.mark.parametrize("pages", range(1, 20, 2))
def test_capture_into_a_full_store(tmp_path: Path, source: Path, pages: int) -> None:
    """Whatever part of the archive still fits, the capture fails with NO_SPACE and the archive's name."""
    with memory_file() as fd, directory(source) as root:
        needed = pack_tree(root, fd).size
    with tmpfs_mount(tmp_path / "store", size=pages * PAGE) as store, (store / "out").open("wb") as out:
        assert needed > pages * PAGE
        with directory(source) as root, pytest.raises(CaptureFailed, match=r"vol-1\.tar") as caught:
            pack_tree(root, out.fileno(), name="vol-1.tar")
    assert caught.value.reason is Reason.NO_SPACE


@pytest.mark.parametrize("blocks", [False, True])
def test_capture_of_much_into_a_full_store_stops_its_threads(tmp_path: Path, source: Path, *, blocks: bool) -> None:
    """A failed write in the writing thread ends the pass early, and no thread stays."""
    import threading

    before = set(threading.enumerate())
    with (source / "big").open("wb") as file:
        file.write(bytes(50 << 20))
    with (
        tmpfs_mount(tmp_path / "store", size=1 << 20) as store,
        (store / "out").open("wb") as out,
        directory(source) as root,
        pytest.raises(CaptureFailed) as caught,
    ):
        pack_tree(root, out.fileno(), blocks=blocks)
    assert caught.value.reason is Reason.NO_SPACE
    assert set(threading.enumerate()) <= before


def test_too_little_space_is_refused_before_anything_is_done(tmp_path: Path, archive: Archive) -> None:
    """What the archive holds is compared with the free space first."""
    with tmpfs_mount(tmp_path / "root", size=8 * PAGE) as root:
        before = snapshot(root)
        with directory(root) as fd, Journal(fd) as journal, pytest.raises(Refused, match="bytes") as caught:
            apply(archive, journal)
        assert caught.value.reason is Reason.NO_SPACE
        assert differences(before, snapshot(root)) == []


@pytest.mark.parametrize("pages", range(1, 40, 2))
def test_space_that_goes_while_applying(tmp_path: Path, archive: Archive, pages: int) -> None:
    """When others take the space meanwhile, the restore fails naming the file, and the undo needs no space."""
    with tmpfs_mount(tmp_path / "root", size=64 * PAGE) as root:
        (root / "a").mkdir()
        (root / "a" / "f1").write_text("original")
        (root / "b").write_text("original")
        before = snapshot(root)
        with directory(root) as fd, Journal(fd) as journal:
            with _Hog(root, leave=pages):
                _apply_or_run_out(archive, journal, pages)
            journal.undo()
        (root / "hog").unlink()
        os.utime(root, ns=(0, before[b""][3]))
        assert differences(before, snapshot(root)) == []


@pytest.mark.parametrize("pages", range(0, 40, 2))
def test_space_of_an_overlay_that_goes_while_applying(tmp_path: Path, archive: Archive, pages: int) -> None:
    """The same where the originals lie in a lower layer and are copied up by being moved aside."""
    lower = tmp_path / "lower"
    for name in ("a", "b"):
        (lower / name).mkdir(parents=True)
        for number in range(4):
            (lower / name / f"f{number}").write_bytes(b"lower" * 3000)
    with tmpfs_mount(tmp_path / "disk", size=90 * PAGE) as disk, overlay_mount(disk, "one", lower=lower) as one:
        before = snapshot(one.merged)
        with directory(one.merged) as fd, Journal(fd) as journal:
            with _Hog(disk, leave=pages):
                _apply_or_run_out(archive, journal, pages)
            journal.undo()
        assert differences(before, snapshot(one.merged)) == []


def _apply_or_run_out(archive: Archive, journal: Journal, pages: int) -> None:
    """Apply; too few pages must give the right error, and enough of them none."""
    if pages > 38:
        apply(archive, journal)
        return
    with suppress(RestoreFailed) if pages > 10 else pytest.raises(RestoreFailed, match="Putting /") as caught:
        apply(archive, journal)
    assert caught is None or caught.value.reason is Reason.NO_SPACE


class _Hog:
    """Takes the disk as the journal is begun, after the plan was made, as a neighbour could."""

    def __init__(self, root: Path, *, leave: int) -> None:
        self.root = root
        self.leave = leave
        self.active = False
        sys.addaudithook(self._look)

    def _look(self, event: str, args: tuple[object, ...]) -> None:
        if self.active and event == "os.mkdir" and isinstance(args[0], bytes) and args[0].startswith(JOURNAL_PREFIX):
            self.active = False
            space = os.statvfs(self.root)
            (self.root / "hog").write_bytes(bytes((space.f_bavail - self.leave) * PAGE))

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *_: object) -> None:
        self.active = False


def test_a_marker_on_a_full_disk(tmp_path: Path) -> None:
    """A marker that cannot be written fails with its path, and what it would have replaced comes back."""
    with tmpfs_mount(tmp_path / "root", size=16 * PAGE) as root:
        (root / "marker").write_text("old")
        before = snapshot(root)
        with directory(root) as fd, Journal(fd) as journal:
            put_file(journal, b"other", b"x")
            fill(root)
            with pytest.raises(RestoreFailed, match="/marker") as caught:
                put_file(journal, b"marker", b"x" * PAGE * 2)
            assert caught.value.reason is Reason.NO_SPACE
            journal.undo()
        (root / "filler").unlink()
        os.utime(root, ns=(0, before[b""][3]))
        assert differences(before, snapshot(root)) == []


def test_side_files_on_full_disks(tmp_path: Path) -> None:
    """CRIU's link files: no half copy stays in the checkpoint, and none in the container."""
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"x" * PAGE * 3)
    with tmpfs_mount(tmp_path / "full", size=5 * PAGE) as full, directory(full) as full_fd, directory(tmp_path) as root:
        with pytest.raises(CaptureFailed, match="side-2") as caught:
            save_links(root, [b"one", b"two"], full_fd)
        assert caught.value.reason is Reason.NO_SPACE
        assert os.listdir(full) == ["side-1"]
        (full / "side-1").unlink()
        files = [SideFile(b"1", "one", 0o600, 0, 0), SideFile(b"2", "two", 0o600, 0, 0)]
        with pytest.raises(RestoreFailed, match="/2") as failed:
            put_back_links(files, root, full_fd)
        assert failed.value.reason is Reason.NO_SPACE
        assert os.listdir(full) == []
