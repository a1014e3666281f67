"""The private view of images: copies and mounts that nobody else sees or can change."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.criu import private
from chrek.criu.private import private_images
from chrek.errors import Reason, Refused

NOBODY = 65534
CONTENTS = {
    "core-1.img": b"core",
    "pages-1.img": b"pages" * 5000,
    "pages-2.img": b"",
    "ghost-file-a.img": b"ghost",
    "files.img": b"files" * 300_000,
}


@pytest.fixture
def images(tmp_path: Path) -> Iterator[int]:
    """Return a directory with images."""
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def read(directory: int, name: str) -> bytes:
    """Return the contents of an image, opened as CRIU does."""
    fd = os.open(name, os.O_RDONLY, dir_fd=directory)
    with open(fd, "rb") as file:
        return file.read()


def replace(images: int, name: str, content: bytes) -> None:
    """Put another file in the place of an image."""
    fd = os.open("new", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=images)
    os.write(fd, content)
    os.close(fd)
    os.rename("new", name, src_dir_fd=images, dst_dir_fd=images)


def test_what_is_seen_stays(images: int) -> None:
    """Every image is there with its contents; what is exchanged or added afterwards is not seen, nor are changes of ours."""
    with private_images(images) as place:
        again = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_DIRECTORY)
        for name in CONTENTS:
            replace(images, name, b"forged")
        replace(images, "mountpoints-1.img", b"forged")
        for directory in (place, again):
            assert sorted(os.listdir(directory)) == sorted(CONTENTS)
            assert {name: read(directory, name) for name in CONTENTS} == CONTENTS
        replace(place, "core-1.img", b"reduced")
        assert read(again, "core-1.img") == b"reduced"
        assert read(images, "core-1.img") == b"forged"
        os.close(again)
        assert "chrek-images" not in Path("/proc/self/mounts").read_text()


def test_an_image_that_is_written_to(images: int) -> None:
    """Writing into an image in the store changes nothing in ours."""
    with private_images(images) as place:
        fd = os.open("core-1.img", os.O_WRONLY | os.O_TRUNC, dir_fd=images)
        os.write(fd, b"forged")
        os.close(fd)
        assert read(place, "core-1.img") == b"core"


@pytest.mark.parametrize("bulk", [True, False])
def test_without_mounting(images: int, bulk: bool) -> None:
    """Where this program may not mount, everything is copied, and the copies are gone afterwards."""
    if not bulk:
        for name in CONTENTS:
            if not name.startswith(("core", "files")):
                os.unlink(name, dir_fd=images)
    expected = {name: CONTENTS[name] for name in os.listdir(images)}
    with tempfile.TemporaryDirectory() as scratch:
        if os.geteuid() == 0:
            os.chown(scratch, NOBODY, NOBODY)
            os.fchown(images, NOBODY, NOBODY)
            for name in expected:
                os.chown(name, NOBODY, NOBODY, dir_fd=images)
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setgid(NOBODY)
                    os.setuid(NOBODY)
                with private_images(images, scratch) as place:
                    same = {name: read(place, name) for name in os.listdir(place)} == expected
                    there = bool(os.listdir(scratch))
                os._exit(0 if same and there and not os.listdir(scratch) else 2)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "bulk link"])
def test_what_is_no_image(images: int, kind: str) -> None:
    """Anything but a regular file is refused, and nothing is followed or waited for."""
    name = "pages-9.img" if kind == "bulk link" else "core-9.img"
    if kind.endswith("link"):
        os.symlink("/etc/passwd", name, dir_fd=images)
    elif kind == "fifo":
        os.mkfifo(name, dir_fd=images)
    else:
        os.mkdir(name, dir_fd=images)
    with pytest.raises(Refused) as caught, private_images(images):
        pass
    assert caught.value.reason is Reason.CORRUPT


def test_too_much(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that would fill the memory are refused."""
    monkeypatch.setattr(private, "MAX_BYTES", 1 << 20)
    with pytest.raises(Refused, match="more than 1048576 bytes") as caught, private_images(images):
        pass
    assert caught.value.reason is Reason.CORRUPT
