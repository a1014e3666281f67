"""A process killed anywhere while it applies, undoes or commits leaves a tree that the next one puts right."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.errors import Reason, Refused, RestoreFailed
from chrek.rootfs import Archive, Journal, Overlay, apply, diff_overlay, put_file, read_archive, take_file
from rootfs_trees import (
    FailingChange,
    OverlayMount,
    Snapshot,
    differences,
    directory,
    memory_file,
    overlay_mount,
    run_killed,
    snapshot,
    tmpfs_mount,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts overlays: needs root")


def make_lower(path: Path) -> Path:
    """Make what an image could hold."""
    for name in ("opaque", "gone", "stays", "file-soon"):
        (path / name / "in").mkdir(parents=True)
        (path / name / "f").write_text(name)
        (path / name / "in" / "g").write_text(name * 2)
    (path / "replaced").write_text("lower")
    (path / "dir-soon").write_text("lower")
    os.setxattr(path / "stays", "trusted.t", b"1")
    for number, name in enumerate(["gone/in", "gone", "file-soon/in", "file-soon", "opaque", "stays", "replaced", ""]):
        os.utime(path / name, ns=(number, 10**18 + number))
    return path


def change(root: Path) -> None:
    """Make every kind of change there is."""
    shutil.rmtree(root / "opaque")
    (root / "opaque").mkdir()
    (root / "opaque" / "f").write_text("new")
    shutil.rmtree(root / "gone")
    shutil.rmtree(root / "file-soon")
    (root / "file-soon").write_text("file")
    (root / "dir-soon").unlink()
    (root / "dir-soon").mkdir()
    (root / "dir-soon" / "f").write_text("f")
    (root / "replaced").write_text("upper")
    os.chmod(root / "stays", 0o700)
    os.chmod(root, 0o711)
    os.symlink("x", root / "stays" / "link")
    os.link(root / "replaced", root / "stays" / "hard")


@pytest.fixture(params=["tmpfs"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Archive, OverlayMount]]:
    """Give an archive with every kind of change, and a fresh overlay to apply it to."""
    with tmpfs_mount(tmp_path / "tmpfs") as tmpfs, memory_file() as fd:
        base = tmp_path if request.param == "disk" else tmpfs
        lower = make_lower(base / "lower")
        with overlay_mount(base, "one", lower=lower) as one:
            change(one.merged)
            with directory(one.upper) as upper:
                diff_overlay(Overlay(upper), fd)
        with overlay_mount(base, "two", lower=lower) as two:
            yield read_archive(fd), two


def restore(archive: Archive, root: Path, *, commit: bool = False) -> None:
    """Do what a restore does to the files."""
    with directory(root) as fd, Journal(fd) as journal:
        apply(archive, journal)
        put_file(journal, b"stays/f", b"a marker over a file")
        take_file(journal, b"replaced")
        if commit:
            journal.commit()


def recover(root: Path) -> bool:
    """Do what the next process does; returns whether there was a journal."""
    with directory(root) as fd:
        journal = Journal.find(fd)
        if journal is None:
            return False
        with journal:
            journal.undo()
        assert Journal.find(fd) is None
        return True


@pytest.mark.parametrize("scene", ["disk", "tmpfs"], indirect=True)
def test_killed_at_every_change_while_applying(scene: tuple[Archive, OverlayMount]) -> None:
    """SIGKILL before any change of the applying process: a fresh process brings back exactly what was there."""
    archive, target = scene
    before = snapshot(target.merged)
    at = 1
    while run_killed(lambda: restore(archive, target.merged), at):
        recover(target.merged)
        assert differences(before, snapshot(target.merged)) == [], f"killed at change {at}"
        at += 1
    assert at > 80
    assert recover(target.merged)
    assert differences(before, snapshot(target.merged)) == []


@pytest.mark.parametrize(("error", "reason"), [(errno.ENOSPC, Reason.NO_SPACE), (errno.EIO, Reason.FILES_NOT_APPLIED)])
def test_failing_at_every_change_while_applying(
    scene: tuple[Archive, OverlayMount], error: int, reason: Reason
) -> None:
    """A full or broken disk at any change or half way through any write: the file is named, and undo takes all back."""
    archive, target = scene
    before = snapshot(target.merged)
    at, failed = 1, True
    while failed:
        with directory(target.merged) as fd, Journal(fd) as journal:
            with FailingChange(at, error) as failure:
                caught = _outcome(archive, journal)
            failed = failure.failed
            if failed:
                assert caught is not None
                assert caught.reason is reason
                assert "/" in caught.message
            put_file(journal, b"stays/f", b"the log is still good")
            journal.undo()
        assert differences(before, snapshot(target.merged)) == [], f"failed at change {at}"
        at += 1
    assert at > 70


def _outcome(archive: Archive, journal: Journal) -> RestoreFailed | None:
    try:
        apply(archive, journal)
        put_file(journal, b"stays/f", b"a marker over a file")
    except RestoreFailed as error:
        return error
    return None


def test_killed_at_every_change_while_undoing(scene: tuple[Archive, OverlayMount]) -> None:
    """SIGKILL before any change of the undoing process: undoing again finishes."""
    archive, target = scene
    before = snapshot(target.merged)
    at = 1
    killed = True
    while killed:
        restore(archive, target.merged)
        killed = run_killed(lambda: recover(target.merged), at)
        again = recover(target.merged)
        after = snapshot(target.merged)
        if killed and not again:  # the one system call that the journal's own module names: the root's time
            before_root, after_root = before[b""], after[b""]
            assert before_root[:3] == after_root[:3]
            os.utime(target.merged, ns=(0, before_root[3]))
            after = snapshot(target.merged)
        assert differences(before, after) == [], f"killed at change {at}"
        at += 1
    assert at > 50


def test_killed_at_every_change_while_committing(scene: tuple[Archive, OverlayMount], tmp_path: Path) -> None:
    """SIGKILL before any change of a commit: the next process finds all undone or all kept, never a mixture."""
    archive, target = scene
    lower = tmp_path / "copy"
    shutil.copytree(target.merged, lower)
    outcomes = []
    killed, at = True, 1
    with overlay_mount(tmp_path, "whole", lower=lower) as whole:
        restore(archive, whole.merged, commit=True)
        after = snapshot(whole.merged)
    before = _timeless(snapshot(lower))
    while killed:
        with overlay_mount(tmp_path, f"try-{at}", lower=lower) as one:
            restore(archive, one.merged)
            killed = run_killed(lambda: _commit(one.merged), at)
            recover(one.merged)
            found = snapshot(one.merged)
        outcomes.append(_timeless(found) == _timeless(after))
        assert outcomes[-1] or _timeless(found) == before, f"killed at change {at}"
        at += 1
    assert outcomes == sorted(outcomes)
    assert outcomes[-1]
    assert not outcomes[0]


def _commit(root: Path) -> None:
    with directory(root) as fd:
        journal = Journal.find(fd)
        assert journal is not None
        with journal:
            journal.commit()


def _timeless(found: Snapshot) -> Snapshot:
    """Leave out the times: markers are written anew each time, and copying the lower layer gave new ones."""
    return {path: (*values[:3], *values[4:]) for path, values in found.items()}


def test_a_log_that_was_cut_off_anywhere_is_undone_as_far_as_it_goes(tmp_path: Path) -> None:
    """A record that was only partly written was not acted on; a damaged one is refused."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "kept").write_text("kept")
    with directory(root) as fd, Journal(fd) as journal:
        put_file(journal, b"new", b"x")
        log = next(root.glob(".chrek-undo.*/log"))
        whole = log.read_bytes()
        log.write_bytes(whole + b'0123abcd {"do": "new", "path": "kept"')
    assert recover(root)
    assert os.listdir(root) == ["kept"]
    with directory(root) as fd, Journal(fd) as journal:
        put_file(journal, b"new", b"x")
        log = next(root.glob(".chrek-undo.*/log"))
        log.write_bytes(log.read_bytes().replace(b"new", b"kept"))
    with pytest.raises(Refused) as caught:
        recover(root)
    assert caught.value.reason is Reason.CORRUPT
    assert (root / "kept").exists()


@pytest.mark.parametrize(
    "record",
    [
        b'{"do": "new", "path": "../outside"}',
        b'{"do": "new", "path": "/outside"}',
        b'{"do": "new", "path": "a/../../outside"}',
        b'{"do": "new", "path": ""}',
        b'{"do": "move", "path": "x", "number": "../../outside"}',
        b'{"do": "keep", "path": "", "meta": [0, 0, 0], "xattrs": {}}',
        b'{"do": "other", "path": "x"}',
        b"[]",
        b"nonsense",
    ],
)
def test_a_journal_that_an_image_planted_leads_nowhere(tmp_path: Path, record: bytes) -> None:
    """Records that name places outside the root, or are no records, are refused and nothing happens."""
    (tmp_path / "outside").write_text("precious")
    root = tmp_path / "root"
    (root / ".chrek-undo.1" / "saved").mkdir(parents=True)
    (root / ".chrek-undo.1" / "log").write_bytes(b"%08x %s\n" % (zlib.crc32(record), record))
    with pytest.raises(Refused):
        recover(root)
    assert (tmp_path / "outside").read_text() == "precious"


def test_a_planted_link_is_not_followed_by_undo(tmp_path: Path) -> None:
    """A symbolic link on the way to what a record names ends there: its target is not touched."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "f").write_text("precious")
    root = tmp_path / "root"
    (root / ".chrek-undo.1" / "saved").mkdir(parents=True)
    (root / "link").symlink_to("../outside")
    record = b'{"do": "new", "path": "link/f"}'
    (root / ".chrek-undo.1" / "log").write_bytes(b"%08x %s\n" % (zlib.crc32(record), record))
    with pytest.raises(RestoreFailed) as caught:
        recover(root)
    assert caught.value.reason is Reason.UNDO_IMPOSSIBLE
    assert (tmp_path / "outside" / "f").read_text() == "precious"


def test_a_second_restore_waits_for_the_undo_of_the_first(tmp_path: Path) -> None:
    """A journal that is still there is refused: undoing the older one later would take away the newer changes."""
    with directory(tmp_path) as fd:
        with Journal(fd) as journal:
            put_file(journal, b"new", b"x")
        with pytest.raises(Refused) as caught:
            Journal(fd)
        assert caught.value.reason is Reason.UNDO_IMPOSSIBLE
