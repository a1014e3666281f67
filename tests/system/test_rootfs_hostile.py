"""What containers plant in their files, and what targets look like that were made to be written out of."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.errors import ChrekError, Reason, Refused
from chrek.rootfs import Journal, Overlay, apply, diff_overlay, pack_tree, put_file, read_archive
from chrek.rootfs.member import ArchiveKind, Kind, Member, archive_header, encode, padding, trailer
from chrek.rootfs.meta import Meta
from rootfs_trees import differences, directory, memory_file, overlay_mount, snapshot, tmpfs_mount

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts overlays: needs root")

META = Meta(0o644, 0, 0, 0)
ROOT = Member(b"", Kind.DIRECTORY, Meta(0o755, 0, 0, 0))


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Give a directory beside the root that must look the same after the test."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "f").write_text("precious")
    before = snapshot(path)
    yield path
    assert differences(before, snapshot(path)) == []


def apply_members(root: Path, *members: Member, kind: ArchiveKind = ArchiveKind.OVERLAY, undo: bool = False) -> None:
    """Apply an archive of a root and these members; then commit or undo, also after a refusal."""
    data = archive_header(kind)
    for member in (ROOT, *members):
        data += encode(member) + bytes(member.stored) + padding(member.stored)
    with memory_file() as fd, directory(root) as root_fd, Journal(root_fd) as journal:
        os.write(fd, data + trailer(len(data)))
        try:
            apply(read_archive(fd), journal)
        finally:
            journal.undo() if undo else journal.commit()


@pytest.mark.parametrize("target", ["../outside", "/proc/self/cwd/../..", "{outside}"])
def test_a_link_in_the_target_is_replaced_and_never_followed(tmp_path: Path, outside: Path, target: str) -> None:
    """Where the archive has a directory or file and the target a link, the link gives way, its target stays."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("d", "f", "h", "gone"):
        (root / name).symlink_to(target.format(outside=outside))
    members = (
        Member(b"d", Kind.DIRECTORY, Meta(0o700, 1, 1, 1), opaque=True),
        Member(b"d/f", Kind.FILE, META, size=3),
        Member(b"f", Kind.FILE, META, size=3),
        Member(b"h", Kind.HARD_LINK, META, link=b"d/f"),
        Member(b"gone", Kind.WHITEOUT, META),
    )
    before = snapshot(root)
    apply_members(root, *members, undo=True)
    assert differences(before, snapshot(root)) == []
    apply_members(root, *members)
    assert sorted(os.listdir(root)) == ["d", "f", "h"]
    assert (root / "d" / "f").stat().st_ino == (root / "h").stat().st_ino


def test_a_symbolic_link_of_the_archive_is_not_followed_by_later_members(tmp_path: Path, outside: Path) -> None:
    """A link that leads out is made as it is; a member beneath it is refused before anything is done."""
    root = tmp_path / "root"
    root.mkdir()
    link = Member(b"l", Kind.SYMLINK, META, link=str(outside).encode())
    with pytest.raises(Refused) as caught:
        apply_members(root, link, Member(b"l/f", Kind.FILE, META))
    assert caught.value.reason is Reason.CORRUPT
    assert os.listdir(root) == []
    apply_members(root, link)
    assert (root / "l").is_symlink()


def test_markers_do_not_follow_links(tmp_path: Path, outside: Path) -> None:
    """A marker whose name or directory is a link in the container is not written through it."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "tmp").symlink_to(outside)
    (root / "marker").symlink_to(outside / "f")
    with directory(root) as fd, Journal(fd) as journal:
        with pytest.raises(ChrekError, match="/tmp/f"):
            put_file(journal, b"tmp/f", b"x")
        put_file(journal, b"marker", b"x")
        assert not (root / "marker").is_symlink()
        journal.undo()
    assert (root / "marker").is_symlink()


@pytest.mark.parametrize("kind", [Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE])
def test_devices_are_refused_unless_they_are_there(tmp_path: Path, kind: Kind) -> None:
    """A device is never made; one that is there with the same numbers and owner is left."""
    with tmpfs_mount(tmp_path / "root") as root:
        device = Member(b"dev", kind, META, device=(1, 1))
        with pytest.raises(Refused, match="1:1") as caught:
            apply_members(root, device)
        assert caught.value.reason is Reason.PRIVILEGE_EXCEEDED
        assert os.listdir(root) == []
        flag = 0o020000 if kind is Kind.CHAR_DEVICE else 0o060000
        os.mknod(root / "dev", flag | 0o644, os.makedev(1, 1))
        os.chmod(root / "dev", 0o644)
        apply_members(root, device)
        with pytest.raises(Refused):
            apply_members(root, Member(b"dev", kind, META, device=(1, 2)))


def test_other_mounts_in_the_target_are_left_alone(tmp_path: Path) -> None:
    """Files under a mount, a file that is one, and directories to be deleted that hold one stay, and are reported."""
    root = tmp_path / "root"
    for name in ("vol/in", "opaque/vol", "gone/deep/vol", "now-a-file/vol"):
        (root / name).mkdir(parents=True)
    (root / "bound").write_text("bound over")
    (root / "opaque" / "old").touch()
    mounted = [root / "vol", root / "opaque/vol", root / "gone/deep/vol", root / "now-a-file/vol"]
    for path in mounted:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
        (path / "theirs").write_text("a volume's")
    subprocess.run(["mount", "--bind", "/etc/hostname", root / "bound"], check=True)
    try:
        before = (Path("/etc/hostname").read_bytes(), Path("/etc/hostname").stat().st_mtime_ns)
        members = (
            Member(b"bound", Kind.FILE, META, size=4),
            Member(b"gone", Kind.WHITEOUT, META),
            Member(b"hard", Kind.HARD_LINK, META, link=b"bound"),
            Member(b"now-a-file", Kind.FILE, META),
            Member(b"opaque", Kind.DIRECTORY, META, opaque=True),
            Member(b"vol", Kind.DIRECTORY, Meta(0o700, 5, 5, 0), opaque=True),
            Member(b"vol/theirs", Kind.WHITEOUT, META),
            Member(b"vol/new", Kind.DIRECTORY, META),
            Member(b"vol/new/f", Kind.FILE, META),
        )
        apply_members(root, *members)
        for path in mounted:
            assert (path / "theirs").read_text() == "a volume's"
            assert os.listdir(path) == ["theirs"]
        assert (root / "vol").stat().st_uid == 0
        assert not (root / "opaque" / "old").exists()
        assert (root / "hard").read_bytes() == bytes(4)
        assert before == (Path("/etc/hostname").read_bytes(), Path("/etc/hostname").stat().st_mtime_ns)
    finally:
        for path in (root / "bound", *mounted):
            subprocess.run(["umount", path], check=True)


def test_a_read_only_root_is_refused_only_when_something_is_to_be_done(tmp_path: Path) -> None:
    """Times of directories alone, which no two containers share, are nothing to be done."""
    with tmpfs_mount(tmp_path / "root") as root:
        (root / "d").mkdir()
        (root / "same").touch()
        os.utime(root / "same", ns=(0, 0))
        subprocess.run(["mount", "-o", "remount,ro", root], check=True)
        before = snapshot(root)
        same = Member(b"d", Kind.DIRECTORY, Meta(0o755, 0, 0, 5)), Member(b"same", Kind.FILE, META)
        apply_members(root, *same)
        with pytest.raises(Refused, match="read-only") as caught:
            apply_members(root, *same, Member(b"new", Kind.FILE, META))
        assert caught.value.reason is Reason.UNDO_IMPOSSIBLE
        assert differences(before, snapshot(root)) == []


def test_a_file_system_without_attributes_loses_them_and_says_so(tmp_path: Path) -> None:
    """An attribute that cannot be held is reported by path and name; the file arrives all the same."""
    (tmp_path / "root").mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", tmp_path / "root"], check=True)
    try:
        mine = Meta(0o644, 0, 0, 0, (("user.mine", b"1"),))
        data = archive_header(ArchiveKind.TREE) + encode(ROOT) + encode(Member(b"f", Kind.FILE, mine))
        with memory_file() as fd, directory(tmp_path / "root") as root, Journal(root) as journal:
            os.write(fd, data + trailer(len(data)))
            assert apply(read_archive(fd), journal).lost_attributes == (("/f", "user.mine"),)
            journal.commit()
        assert os.listdir(tmp_path / "root") == ["f"]
    finally:
        subprocess.run(["umount", tmp_path / "root"], check=True)


def test_an_equal_file_is_left_in_its_lower_layer(tmp_path: Path) -> None:
    """A file that was only copied up is not replaced by its own copy."""
    lower = tmp_path / "lower"
    lower.mkdir()
    (lower / "f").write_text("same")
    with overlay_mount(tmp_path, "one", lower=lower) as one, overlay_mount(tmp_path, "two", lower=lower) as two:
        (one.merged / "f").open("ab").close()
        with (
            memory_file() as fd,
            directory(one.upper) as upper,
            directory(two.merged) as root,
            Journal(root) as journal,
        ):
            assert diff_overlay(Overlay(upper), fd).counts["file"] == 1
            assert apply(read_archive(fd), journal).counts == {"merge": 1, "same": 1}
            journal.commit()
        assert os.listdir(two.upper) == []


def test_whiteouts_that_are_attributes_are_known(tmp_path: Path) -> None:
    """The other form of a whiteout, an empty file with an attribute in a directory marked x, is one too."""
    (tmp_path / "d").mkdir()
    for name in ("gone", "here"):
        (tmp_path / "d" / name).touch()
    os.setxattr(tmp_path / "d", "trusted.overlay.opaque", b"x")
    os.setxattr(tmp_path / "d" / "gone", "trusted.overlay.whiteout", b"y")
    with memory_file() as fd, directory(tmp_path) as root:
        diff_overlay(Overlay(root), fd)
        found = {member.path: member for member in read_archive(fd).members}
    assert found[b"d/gone"].kind is Kind.WHITEOUT
    assert found[b"d/here"].kind is Kind.FILE
    assert not found[b"d"].opaque


# --- capturing what was planted ------------------------------------------------------------------


def test_the_walker_reads_nothing_outside_the_tree(tmp_path: Path, outside: Path) -> None:
    """Links to files, directories and /proc are carried as links, FIFOs and sockets block nothing."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "dir").symlink_to(outside)
    (root / "file").symlink_to(outside / "f")
    (root / "proc").symlink_to("/proc/self/root")
    os.mkfifo(root / "fifo")
    with memory_file() as fd, directory(root) as root_fd:
        packed = pack_tree(root_fd, fd)
        os.lseek(fd, 0, os.SEEK_SET)
        assert b"precious" not in os.read(fd, 1 << 20)
    assert packed.counts == {"directory": 1, "symlink": 3, "fifo": 1}


def test_files_that_change_or_vanish_are_reported(tmp_path: Path) -> None:
    """A neighbour that writes, truncates and deletes all the time costs a report, not the capture."""
    root = tmp_path / "root"
    (root / "busy").mkdir(parents=True)
    (root / "still").write_text("still")
    child = os.fork()
    if child == 0:
        number = 0
        while True:
            number += 1
            path = root / "busy" / f"f{number % 50}"
            try:
                path.write_bytes(b"x" * (number * 977 % 100_000))
                os.truncate(path, 10)
                os.unlink(root / "busy" / f"f{(number + 25) % 50}")
            except OSError:
                continue
    try:
        reported = 0
        while not reported:
            with memory_file() as fd, directory(root) as root_fd:
                packed = pack_tree(root_fd, fd)
                members = {member.path for member in read_archive(fd).members}
                reported = len(packed.changed) + len(packed.vanished)
                assert b"still" in members
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert all(name.startswith("/busy") for name in (*packed.changed, *packed.vanished))


def test_what_the_runtime_injects_and_patterns_are_left_out(tmp_path: Path) -> None:
    """Injected files, mount points, user patterns and a forgotten journal are left out; all else below /etc travels."""
    for name in (
        "etc/hosts",
        "etc/resolv.conf",
        "etc/app.conf",
        "usr/lib/x.so",
        "opt/cache/f",
        "var/a.log",
        "data/vol/f",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "run" / "secrets").mkdir(parents=True)
    (tmp_path / ".chrek-undo.5").mkdir()
    with memory_file() as fd, directory(tmp_path) as root:
        packed = diff_overlay(Overlay(root), fd, mount_points=[b"data/vol"], exclude=["/opt/cache", "*.log"])
        found = {member.path for member in read_archive(fd).members if member.kind is Kind.FILE}
    assert found == {b"etc/app.conf", b"usr/lib/x.so"}
    assert packed.counts["left_out"] == 7


def test_very_deep_trees_are_carried_and_undone(tmp_path: Path) -> None:
    """A tree deeper than any path a program can name arrives and goes; an absurd one is refused by name."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    _deepen(source, 500)
    with memory_file() as fd, directory(source) as root, directory(target) as other, Journal(other) as journal:
        assert pack_tree(root, fd).counts["directory"] == 501
        apply(read_archive(fd), journal)
        journal.undo()
        assert os.listdir(target) == []
        _deepen(source, 700)
        with pytest.raises(ChrekError, match="longer than 16384") as caught:
            pack_tree(root, fd)
        assert caught.value.reason is Reason.FILE_NOT_CARRIED
    subprocess.run(["rm", "-r", source], check=True)


def _deepen(path: Path, levels: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    for _ in range(levels):
        name = "twenty-five-characters-of"
        if name not in os.listdir(fd):
            os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
