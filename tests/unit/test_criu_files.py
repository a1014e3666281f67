"""Standard streams in the images may be other files at the restore."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.criu.files import loosen_external_files
from chrek.criu.images import COMMON_MAGIC, Image, read_all, read_bytes
from chrek.criu.messages import File, RegularFile

UNKNOWN = b"\x98\x06\x07"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[int]:
    """Return a descriptor of an empty image directory."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def regular(flags: int, *, external: bool | None = True) -> File:
    """Return an open file at position 5."""
    file = RegularFile(
        id=1, flags=flags, position=5, name="/log", mnt_id=-1, size=9, external=external, mode=0o100644, unknown=UNKNOWN
    )
    return File(type=1, id=1, regular=file)


def write(place: int, *files: File) -> None:
    """Write ``files.img``."""
    Image("files.img", struct.pack("<II", COMMON_MAGIC, 1), [file.encode() for file in files]).write(place)


@pytest.mark.parametrize("access", [os.O_WRONLY, os.O_RDWR])
def test_a_stream_that_is_written(place: int, access: int) -> None:
    """An external file that is written is appended to; size, type and O_NOFOLLOW are forgotten, the rest stays."""
    write(place, regular(access | os.O_NOFOLLOW | os.O_CLOEXEC))
    assert loosen_external_files(place) == 1
    (file,) = read_all(place, "files.img", File)
    assert file.regular == RegularFile(
        id=1, flags=access | os.O_APPEND | os.O_CLOEXEC, position=0, name="/log", mnt_id=-1, external=True, unknown=UNKNOWN
    )


def test_a_stream_that_is_read(place: int) -> None:
    """An external file that is only read keeps its position and is not appended to."""
    write(place, regular(os.O_RDONLY | os.O_NOFOLLOW))
    assert loosen_external_files(place) == 1
    (file,) = read_all(place, "files.img", File)
    assert file.regular is not None
    assert (file.regular.flags, file.regular.position, file.regular.size) == (os.O_RDONLY, 5, None)


@pytest.mark.parametrize("external", [None, False])
def test_files_of_the_container(place: int, external: bool | None) -> None:
    """Files of the container itself stay strict, and an image without external ones is not written."""
    write(place, regular(os.O_WRONLY | os.O_NOFOLLOW, external=external), File(type=4, id=2))
    before = read_bytes(place, "files.img")
    assert loosen_external_files(place) == 0
    assert read_bytes(place, "files.img") == before
