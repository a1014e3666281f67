"""Finding a container's changes from outside, through its process alone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chrek.errors import CaptureFailed, Reason, Refused
from chrek.rootfs import (
    container_overlay,
    diff_overlay,
    mount_points,
    open_volume,
    pack_tree,
    put_back_links,
    read_archive,
    remove_links,
    save_links,
)
from rootfs_trees import directory, memory_file

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts overlays: needs root")

BUSYBOX = Path("/bin/busybox")


@contextmanager
def container(base: Path, *, upper: str = "upper", options: str = "", script: str = "") -> Iterator[int]:
    """Run a process whose root is an overlay of its own; gives its PID once *script* has run inside."""
    for part in ("lower/bin", "lower/proc", "lower/vol", "lower/tmp", "work", "merged", upper):
        (base / part).mkdir(parents=True)
    (base / "lower/bin/busybox").write_bytes(BUSYBOX.read_bytes())
    (base / "lower/bin/busybox").chmod(0o755)
    escaped = f"{base}/{upper}".replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:")
    settings = f"lowerdir={base}/lower,upperdir={escaped},workdir={base}/work{options}"
    program = "/bin/busybox echo ready; exec /bin/busybox cat"
    mounts = 'mount -t overlay overlay -o "$1" "$2" && mount -t tmpfs tmpfs "$2/vol"'
    outer = mounts + ' && exec chroot "$2" /bin/busybox sh -c "$3"'
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", outer, "sh", settings, f"{base}/merged", f"{script}\n{program}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


@pytest.mark.parametrize("name", ["plain", "a,b", "a:b", "a=b", "a b", "a\\b", "a\nb", "ü"])
def test_the_upper_directory_is_found_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    """Commas, colons, backslashes and blanks are escaped twice in the mount table, and undone."""
    script = "echo changed > /new; echo hidden > /vol/f"
    with container(tmp_path, upper=name, script=script) as pid, container_overlay(pid) as overlay, memory_file() as fd:
        assert os.stat(overlay.upper).st_ino == (tmp_path / name).stat().st_ino
        assert b"vol" in mount_points(pid)
        diff_overlay(overlay, fd, mount_points=mount_points(pid))
        assert {member.path for member in read_archive(fd).members} == {b"", b"new"}


def test_a_volume_is_reached_as_the_container_sees_it(tmp_path: Path) -> None:
    """A volume's path is resolved inside the container's root, its links included, and never outside."""
    script = "echo data > /vol/f; /bin/busybox ln -s /vol /link; /bin/busybox ln -s ../../../../etc /out"
    with container(tmp_path, script=script) as pid, directory(f"/proc/{pid}/root") as root:
        for path in (b"vol", b"/vol", b"/link"):
            with open_volume(root, path) as volume, memory_file() as fd:
                assert pack_tree(volume, fd).counts["file"] == 1
        for path in (b"/out", b"/missing", b"/vol/f"):
            with pytest.raises(CaptureFailed) as caught, open_volume(root, path):
                pass
            assert caught.value.reason is Reason.FILE_NOT_CARRIED


def test_a_root_without_an_overlay_is_refused() -> None:
    """Without an overlay nothing tells a changed file from the image's."""
    if (
        subprocess.run(["stat", "-f", "-c", "%T", "/"], capture_output=True, text=True, check=True).stdout
        == "overlayfs\n"
    ):
        pytest.skip("this machine's root is an overlay itself")
    with pytest.raises(Refused) as caught, container_overlay(os.getpid()):
        pass
    assert caught.value.reason is Reason.NO_OVERLAY


def test_an_upper_directory_that_is_not_mounted_here_is_refused(tmp_path: Path) -> None:
    """An agent that does not see the runtime's directories says which one it needs."""
    elsewhere = str(tmp_path / "work")
    with (
        container(tmp_path) as pid,
        pytest.raises(Refused, match="upper") as caught,
        container_overlay(pid, host_root=elsewhere),
    ):
        pass
    assert caught.value.reason is Reason.NO_OVERLAY


def test_side_files_of_criu_are_carried(tmp_path: Path) -> None:
    """A link file in a tmpfs of the container is saved, and put back as it was; one that is there stays."""
    kept = tmp_path / "kept"
    kept.mkdir()
    script = "f=/vol/link_remap.3; echo -n semaphore > $f; /bin/busybox chown 5:6 $f; /bin/busybox chmod 640 $f"
    with container(tmp_path, script=script) as pid, directory(f"/proc/{pid}/root") as root, directory(kept) as out:
        path = Path(f"/proc/{pid}/root/vol/link_remap.3")
        os.utime(path, ns=(1, 1_700_000_000_000_000_001))
        files = save_links(root, [b"/vol/link_remap.3"], out)
        assert [(f.path, f.file, f.mode, f.uid, f.gid) for f in files] == [(b"vol/link_remap.3", "side-1", 0o640, 5, 6)]
        assert put_back_links(files, out, root) == []
        for _ in range(2):
            path.unlink()
            made = put_back_links(files, out, root)
            status = path.stat()
            assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o640, 5, 6)
            assert status.st_mtime_ns == 1_700_000_000_000_000_001
            assert path.read_text() == "semaphore"
        remove_links(made, root)
        remove_links(made, root)
        assert not path.exists()
        path.symlink_to("/bin/busybox")
        with pytest.raises(CaptureFailed):
            save_links(root, [b"vol/link_remap.3"], out, prefix="again-")
