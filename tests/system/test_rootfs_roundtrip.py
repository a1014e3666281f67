"""What a container changed arrives in another one to the nanosecond, and is undone to the last byte."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chrek.rootfs import Journal, Overlay, Packed, apply, diff_overlay, pack_tree, read_archive
from chrek.rootfs.overlay import USER
from rootfs_trees import OverlayMount, differences, directory, memory_file, overlay_mount, snapshot, tmpfs_mount

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts overlays: needs root")

ACL = bytes.fromhex("0200000001000600ffffffff02000400050000000400040" + "0ffffffff10000400ffffffff20000400ffffffff")
CAPABILITY = bytes.fromhex("0100000202040000000000000000000000000000")[:20]


def make_lower(path: Path) -> Path:
    """Make what an image could hold."""
    for number in range(4):
        for inner in ("x", "y"):
            (path / f"d{number}" / inner).mkdir(parents=True)
            (path / f"d{number}" / inner / "deep").write_text(f"deep {number}{inner}")
        for name in "abc":
            (path / f"d{number}" / name).write_text(f"lower {number}{name}" * 50)
    (path / "link").symlink_to("d1")
    (path / "dangling").symlink_to("/nowhere")
    os.mkfifo(path / "fifo")
    os.setxattr(path / "d2" / "a", "user.lower", b"1")
    os.chown(path / "d3", 7, 8)
    os.setxattr(path / "d1" / "y", "system.posix_acl_default", ACL)
    os.chmod(path / "d2" / "y", 0o2775)
    os.chown(path / "d2" / "y", 9, 9)
    for number, name in enumerate(["d0", "d1", "d2", "d3", "d1/x", "d2/a", ""]):
        os.utime(path / name, ns=(10**18 + number, 10**18 + number * 1001))
    return path


@pytest.fixture(params=["disk", "tmpfs"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Give a directory on a disk's file system, and one on tmpfs."""
    if request.param == "disk":
        yield tmp_path
    else:
        with tmpfs_mount(tmp_path / "tmpfs") as path:
            yield path


@contextlib.contextmanager
def two_overlays(
    base: Path, *, lower: Path | None = None, options: str = ""
) -> Iterator[tuple[OverlayMount, OverlayMount]]:
    """Mount two overlays over one lower directory: the container captured and the one restored into."""
    lower = lower or make_lower(base / "lower")
    with (
        overlay_mount(base, "one", lower=lower, options=options) as one,
        overlay_mount(base, "two", lower=lower, options=options) as two,
    ):
        yield one, two


def capture(mount: OverlayMount, fd: int, *, prefix: str = "trusted.overlay.") -> Packed:
    """Write an archive of what a mount changed to *fd*."""
    with directory(mount.upper) as upper, directory(mount.merged) as merged:
        return diff_overlay(Overlay(upper, merged, prefix), fd)


def carry(one: OverlayMount, two: OverlayMount, *, commit: bool, prefix: str = "trusted.overlay.") -> Packed:
    """Carry the changes of *one* to *two*; then commit, or undo and compare with what was there."""
    before = snapshot(two.merged)
    with memory_file() as fd, directory(two.merged) as root, Journal(root) as journal:
        packed = capture(one, fd, prefix=prefix)
        apply(read_archive(fd), journal)
        if commit:
            journal.commit()
            assert differences(snapshot(one.merged), snapshot(two.merged)) == []
        else:
            journal.undo()
            assert differences(before, snapshot(two.merged)) == []
    return packed


def change_everything(root: Path) -> None:
    """Do to a container's files all that a program can do."""
    shutil.rmtree(root / "d0")
    (root / "d0").mkdir(mode=0o750)  # opaque
    (root / "d0" / "new").write_bytes(b"new")
    (root / "d1" / "a").unlink()
    (root / "d1" / "b").write_text("changed")
    shutil.rmtree(root / "d1" / "x")
    (root / "d1" / "x").write_text("a file where a directory was")
    (root / "d1" / "c").unlink()
    (root / "d1" / "c").mkdir()
    (root / "d1" / "c" / "in").write_text("a directory where a file was")
    shutil.rmtree(root / "d2")
    os.chmod(root / "d3" / "a", 0o4755)
    os.chown(root / "d3" / "b", 4242, 4243)
    os.rename(root / "d3" / "c", root / "renamed")
    (root / "link").unlink()
    (root / "link").symlink_to("elsewhere")
    os.lchown(root / "link", 5, 6)
    os.utime(root / "link", ns=(5, -1_500_000_001), follow_symlinks=False)
    (root / "d1" / "y" / "inherits").write_text("by default")
    (root / "d1" / "y" / "too").mkdir()
    (root / "empty").mkdir(mode=0o1777)
    os.link(root / "renamed", root / "d3" / "hard")
    os.link(root / "link", root / "hard-link-of-link", follow_symlinks=False)
    os.mkfifo(root / "pipe", 0o640)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(root / "sock"))
    os.mknod(os.fsencode(root) + b"/not-utf8-\xff\xfe\n", 0o600)
    (root / ("n" * 255)).write_text("long")
    deep = root
    for _ in range(6):
        deep = deep / ("p" * 200)
        deep.mkdir()
    (deep / "f").write_text("deep")
    with (root / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 5000)
        file.truncate(5 << 20)
    with (root / "all-hole").open("wb") as file:
        file.truncate(1 << 20)
    (root / "big").write_bytes(os.urandom(3 << 20))
    os.setxattr(root / "big", "user.odd=%name", b"\0\xff=\n")
    os.setxattr(root / "big", "trusted.mine", b"1")
    os.setxattr(root / "hard-link-of-link", "trusted.link", b"2", follow_symlinks=False)
    os.setxattr(root / "renamed", "system.posix_acl_access", ACL)
    os.setxattr(root / "d3", "system.posix_acl_default", ACL)
    (root / "d3" / "inherits").write_text("by default")
    os.setxattr(root / "d3" / "a", "security.capability", CAPABILITY)
    os.utime(root / "big", ns=(1, 1_600_000_000_999_999_999))


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "undo"])
def test_all_a_program_can_do_is_carried(base: Path, *, commit: bool) -> None:
    """Deletions, types, owners, modes, times, attributes, links and holes arrive; undo takes all of it back."""
    with two_overlays(base) as (one, two):
        change_everything(one.merged)
        packed = carry(one, two, commit=commit)
        assert packed.counts["whiteout"] >= 3
        assert packed.counts["hard_link"] == 2
        assert packed.counts["socket"] == 1
        assert packed.content < 4 << 20
        if commit:
            for name in ("sparse", "all-hole"):
                assert (two.merged / name).stat().st_blocks * 512 < (1 << 20)


def test_a_second_generation_is_carried_as_well(base: Path) -> None:
    """What was restored can be captured again and restored a third time."""
    lower = make_lower(base / "lower")
    with overlay_mount(base, "one", lower=lower) as one, overlay_mount(base, "two", lower=lower) as two:
        change_everything(one.merged)
        carry(one, two, commit=True)
        shutil.rmtree(two.merged / "d0")
        (two.merged / "d2").mkdir()
        with overlay_mount(base, "three", lower=lower) as three:
            carry(two, three, commit=True)


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "undo"])
def test_user_attributes_mark_an_overlay_mounted_without_privilege(base: Path, *, commit: bool) -> None:
    """With the mount option userxattr the marks are user.overlay attributes, and are not carried as the file's own."""
    with two_overlays(base, options="userxattr") as (one, two):
        shutil.rmtree(one.merged / "d0")
        (one.merged / "d0").mkdir()
        (one.merged / "d0" / "f").write_text("x")
        if "user.overlay.opaque" not in os.listxattr(one.upper / "d0"):
            pytest.skip("this file system holds no user attributes")
        assert carry(one, two, commit=commit, prefix=USER).counts["opaque"] == 1


def test_marks_of_a_nested_overlay_are_carried_and_mean_nothing(base: Path) -> None:
    """A program that sets overlayfs's own attributes in the container (nested containers do) keeps them."""
    with two_overlays(base) as (one, two):
        try:
            os.setxattr(one.merged / "d0", "trusted.overlay.opaque", b"y")
        except OSError:
            pytest.skip("this kernel does not nest overlays")
        packed = carry(one, two, commit=True)
        assert "opaque" not in packed.counts
        assert os.getxattr(two.merged / "d0", "trusted.overlay.opaque") == b"y"


def test_user_attributes_mean_nothing_on_an_ordinary_overlay(base: Path) -> None:
    """A program that sets user.overlay.opaque by itself deletes nothing in the next container."""
    with two_overlays(base) as (one, two):
        os.setxattr(one.merged / "d0", "user.overlay.opaque", b"y")
        packed = carry(one, two, commit=True)
        assert "opaque" not in packed.counts


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "undo"])
def test_metadata_only_copies_and_renamed_directories_are_read_from_the_merged_view(
    base: Path, *, commit: bool
) -> None:
    """With metacopy and redirect_dir the data is in a lower layer, and is carried all the same."""
    lower = make_lower(base / "lower")
    options = "metacopy=on,redirect_dir=on"
    with (
        overlay_mount(base, "one", lower=lower, options=options) as one,
        overlay_mount(base, "two", lower=lower) as two,
    ):
        os.chmod(one.merged / "d0" / "a", 0o600)
        os.rename(one.merged / "d1", one.merged / "moved")
        (one.merged / "moved" / "b").unlink()
        (one.merged / "moved" / "x" / "more").write_text("more")
        os.rename(one.merged / "d2" / "c", one.merged / "c")
        assert "trusted.overlay.redirect" in os.listxattr(one.upper / "moved")
        assert "trusted.overlay.metacopy" in os.listxattr(one.upper / "d0" / "a")
        carry(one, two, commit=commit)


def test_a_nested_overlay_in_a_volume_is_carried_literally(tmp_path: Path) -> None:
    """A volume that holds another overlay's upper directory keeps its whiteouts and marks as they are."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "dir").mkdir()
    os.mknod(source / "dir" / "whiteout", 0o600 | stat.S_IFCHR, 0)
    os.setxattr(source / "dir", "trusted.overlay.opaque", b"y")
    with memory_file() as fd, directory(source) as root, directory(target) as other, Journal(other) as journal:
        pack_tree(root, fd)
        apply(read_archive(fd), journal)
        journal.commit()
    assert differences(snapshot(source), snapshot(target)) == []


def test_a_volume_is_carried_whole_but_without_other_mounts_in_it(base: Path) -> None:
    """Everything on the volume's own mount travels; a mount inside it is left out, and left alone where it goes."""
    source, target = base / "source", base / "target"
    source.mkdir()
    change_everything(make_lower(source))
    target.mkdir()
    for tree in (source, target):
        (tree / "mnt").mkdir()
        (tree / "file").touch()
    with memory_file() as fd, directory(source) as root, directory(target) as other, Journal(other) as journal:
        with tmpfs_mount(source / "mnt"):
            (source / "mnt" / "secret").write_text("x")
            subprocess.run(["mount", "--bind", source / "renamed", source / "file"], check=True)
            packed = pack_tree(root, fd)
            subprocess.run(["umount", source / "file"], check=True)
        assert packed.counts["left_out"] == 2
        with tmpfs_mount(target / "mnt"):
            (source / "mnt" / "hidden").write_text("not touched")
            apply(read_archive(fd), journal)
            assert os.listdir(target / "mnt") == []
        journal.commit()
    (source / "mnt" / "hidden").unlink()
    shutil.rmtree(source / "mnt")
    shutil.rmtree(target / "mnt")
    for tree in (source, target):
        os.utime(tree / "file", ns=(1, 1))
        os.utime(tree, ns=(1, 1))
    assert differences(snapshot(source), snapshot(target)) == []


def test_a_volume_the_target_lacks_is_folded_into_its_root_and_undone(base: Path) -> None:
    """A volume's content goes to the same path in a root without that volume; undo removes the made directories too."""
    source = base / "source"
    source.mkdir()
    change_everything(make_lower(source))
    with overlay_mount(base, "two", lower=make_lower(base / "lower")) as two:
        before = snapshot(two.merged)
        with memory_file() as fd, directory(source) as root, directory(two.merged) as other:
            pack_tree(root, fd)
            for at in (b"data/made/for/it", b"d0", b"d0/new"):
                with Journal(other) as journal:
                    apply(read_archive(fd), journal, at=at)
                    wanted = snapshot(source)
                    found = snapshot(two.merged / os.fsdecode(at))
                    assert [d for d in differences(wanted, found) if d[0] in wanted] == []
                    journal.undo()
                assert differences(before, snapshot(two.merged)) == []


# --- random trees ------------------------------------------------------------------------------

_names = st.sampled_from(["a", "b", "c", "x", "y", "new", "d0", "d1", "n\udcff"])
_paths = st.lists(_names, min_size=1, max_size=3).map(lambda parts: "/".join([*parts]))
_places = st.builds(lambda top, rest: f"{top}/{rest}", st.sampled_from(["d0", "d1", "d2", "d3", "."]), _paths)
_numbers = st.integers(0, 2**31)


def _make_directory(path: str, _other: str, _number: int) -> None:
    os.mkdir(path)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o644)  # a FIFO may be there, which nobody reads


def _write(path: str, _other: str, number: int) -> None:
    with open(path, "wb", opener=_opener) as file:
        file.write(b"%d" % number * (number % 50))


def _append_far(path: str, _other: str, number: int) -> None:
    with open(path, "ab", opener=_opener) as file:
        file.truncate(number % 300_000)


def _remove(path: str, _other: str, _number: int) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _replace_directory(path: str, _other: str, _number: int) -> None:
    shutil.rmtree(path)
    os.mkdir(path)


def _set_attribute(path: str, _other: str, number: int) -> None:
    os.setxattr(path, f"trusted.t{number % 3}", b"%d" % number, follow_symlinks=False)


def _change_mode(path: str, _other: str, number: int) -> None:
    if not os.path.islink(path):
        os.chmod(path, number & 0o7777 | 0o700)


OPERATIONS: list[Callable[[str, str, int], object]] = [
    _make_directory,
    _write,
    _write,
    _append_far,
    _remove,
    _replace_directory,
    _set_attribute,
    _change_mode,
    lambda path, other, _: os.rename(path, other),
    lambda path, other, _: os.link(path, other, follow_symlinks=False),
    lambda path, other, _: os.symlink(other, path),
    lambda path, _, number: os.chown(path, number, number // 2, follow_symlinks=False),
    lambda path, _, number: os.utime(path, ns=(number, number * 1_000_003), follow_symlinks=False),
    lambda path, _, __: os.mkfifo(path),
    lambda path, _, __: os.mknod(path, stat.S_IFSOCK | 0o700),
]


@pytest.fixture(scope="module", params=["disk", "tmpfs"])
def shared_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a directory with one lower layer for all random trees."""
    path = tmp_path_factory.mktemp("random")
    with contextlib.ExitStack() as stack:
        base = path if request.param == "disk" else stack.enter_context(tmpfs_mount(path))
        make_lower(base / "lower")
        yield base


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, len(OPERATIONS) - 1), _places, _places, _numbers), min_size=1, max_size=25))
def test_random_changes_are_carried_and_undone(shared_base: Path, steps: list[tuple[int, str, str, int]]) -> None:
    """Whatever a program did to its files, capture and apply give equal trees, and undo gives the fresh one."""
    base = shared_base / "example"
    base.mkdir()
    try:
        with two_overlays(base, lower=shared_base / "lower") as (one, two):
            for number, path, other, value in steps:
                with contextlib.suppress(OSError):
                    OPERATIONS[number](f"{one.merged}/{path}", f"{one.merged}/{other}", value)
            carry(one, two, commit=False)
            carry(one, two, commit=True)
    finally:
        shutil.rmtree(base)
