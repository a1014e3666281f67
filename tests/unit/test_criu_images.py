"""Image files: read, edited, written; whatever is wrong with one is a damaged checkpoint and nothing else."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chrek.criu import images, pagemaps
from chrek.criu.credentials import read_first, read_tree
from chrek.criu.images import COMMON_MAGIC, Image, matching, read_all, read_bytes, read_one
from chrek.criu.messages import GhostFile, PagemapEntry, PagemapHead, PstreeEntry
from chrek.errors import Reason, Refused

T = TypeVar("T")

SLOW_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[int]:
    """Return a descriptor of an empty directory."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def process(pid: int) -> PstreeEntry:
    """Return one process of a tree, with threads."""
    return PstreeEntry(pid=pid, ppid=1, pgid=pid, sid=1, threads=[pid, pid + 1])


def tree_image() -> bytes:
    """Return the bytes of a small ``pstree.img``."""
    magic = struct.pack("<II", COMMON_MAGIC, 0x50273030)
    return Image("pstree.img", magic, [process(10).encode(), process(20).encode()]).encode()


def is_corrupt(error: Refused) -> bool:
    """Whether the error is about a damaged checkpoint and names the image."""
    return error.reason is Reason.CORRUPT and "images/" in str(error)


def unless_corrupt(read: Callable[[], T]) -> T | None:
    """Return what was read, None where it was refused as damaged; every other exception comes out."""
    try:
        return read()
    except Refused as error:
        if not is_corrupt(error):
            raise
        return None


def test_round_trip(place: int) -> None:
    """A written image has the magic words and entries it was made of, and reads the same."""
    image: Image[PstreeEntry] = Image("pstree.img", struct.pack("<II", COMMON_MAGIC, 7), [process(10).encode()])
    image.write(place)
    again: Image[PstreeEntry] = Image.read(place, "pstree.img")
    assert again == image
    assert list(again.decode(PstreeEntry)) == [process(10)]
    image.write(place, "other.img")
    assert read_bytes(place, "other.img") == read_bytes(place, "pstree.img")


def test_one_magic_word(place: int, tmp_path: Path) -> None:
    """An image whose first word is its own kind's has no second one."""
    (tmp_path / "inventory.img").write_bytes(struct.pack("<II", 0x58313116, 2) + b"\x08\x01")
    image: Image[PstreeEntry] = Image.read(place, "inventory.img")
    assert len(image.magic) == 4
    assert len(image.entries) == 1


def test_rewriting_a_longer_image(place: int) -> None:
    """Nothing of the old contents stays behind a shorter image."""
    Image("x.img", b"1234", [b"a long entry"]).write(place)
    Image("x.img", b"1234", [b"b"]).write(place)
    assert read_bytes(place, "x.img") == b"1234" + struct.pack("<I", 1) + b"b"


def test_truncated_everywhere(place: int, tmp_path: Path) -> None:
    """An image cut at any byte is refused as damaged, or ends at a whole entry."""
    whole = tree_image()
    ends = {8, 8 + 4 + len(process(10).encode()), len(whole)}
    for length in range(len(whole)):
        (tmp_path / "pstree.img").write_bytes(whole[:length])
        found = unless_corrupt(lambda: read_all(place, "pstree.img", PstreeEntry))
        if length in ends or 4 <= length < 8:
            assert found == [process(10)][: length > 8]
        else:
            assert found is None


def test_every_length_flipped(place: int, tmp_path: Path) -> None:
    """An entry's length with any bit flipped is refused as damaged, or frames other entries that decode."""
    whole = tree_image()
    second = 8 + 4 + len(process(10).encode())
    for at in (8, second):
        for bit in range(32):
            data = bytearray(whole)
            data[at + bit // 8] ^= 1 << bit % 8
            (tmp_path / "pstree.img").write_bytes(data)
            with pytest.raises(Refused) as caught:
                read_all(place, "pstree.img", PstreeEntry)
            assert is_corrupt(caught.value)


@SLOW_FIXTURE
@given(data=st.data())
def test_damaged_bytes(place: int, tmp_path: Path, data: st.DataObject) -> None:
    """An image with changed bytes is read or refused; no other exception comes out of the readers of trees."""
    damaged = bytearray(tree_image())
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    (tmp_path / "pstree.img").write_bytes(damaged)
    tree = unless_corrupt(lambda: read_tree(place))
    assert tree is None or tree.root in tree.pids


@SLOW_FIXTURE
@given(data=st.data())
def test_damaged_pagemaps(place: int, tmp_path: Path, data: st.DataObject) -> None:
    """A pagemap with changed bytes, or cut short, is read or refused as damaged."""
    entries = [PagemapHead(pages_id=1).encode(), PagemapEntry(vaddr=4096, compat_nr_pages=1, flags=4).encode()]
    damaged = bytearray(Image("", struct.pack("<II", COMMON_MAGIC, 0x56084025), entries).encode())
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    (tmp_path / "pagemap-7.img").write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    found = unless_corrupt(lambda: pagemaps.read(place))
    assert found is None or [each.pid for each in found] == [7]


def test_pagemap_without_a_head(place: int, tmp_path: Path) -> None:
    """A pagemap that has no entry at all is damaged."""
    (tmp_path / "pagemap-7.img").write_bytes(struct.pack("<II", COMMON_MAGIC, 0x56084025))
    with pytest.raises(Refused) as caught:
        pagemaps.read(place)
    assert is_corrupt(caught.value)


def test_ghost_image(place: int, tmp_path: Path) -> None:
    """A ghost file's first entry is read, what follows it is not looked at, and a cut one is damaged."""
    entry = GhostFile(uid=0, gid=0, mode=0o100644).encode()
    whole = struct.pack("<III", COMMON_MAGIC, 0x52583605, len(entry)) + entry
    (tmp_path / "ghost-file-1.img").write_bytes(whole + b"raw data of the file")
    assert [ghost.mode for ghost in read_first(place, "ghost-file-1.img")] == [0o100644]
    os.truncate(tmp_path / "ghost-file-1.img", images.MAX_IMAGE_BYTES * 4)
    assert len(list(read_first(place, "ghost-file-1.img"))) == 1
    for length in range(len(whole)):
        (tmp_path / "ghost-file-1.img").write_bytes(whole[:length])
        with pytest.raises(Refused) as caught:
            list(read_first(place, "ghost-file-1.img"))
        assert is_corrupt(caught.value)


def test_no_entry(place: int, tmp_path: Path) -> None:
    """An image of one entry that has none is damaged."""
    (tmp_path / "x.img").write_bytes(struct.pack("<II", COMMON_MAGIC, 1))
    with pytest.raises(Refused, match="it has no entry"):
        read_one(place, "x.img", PstreeEntry)


def test_what_is_no_file(place: int, tmp_path: Path) -> None:
    """A missing image, a link, a directory and a FIFO are damaged images; nobody waits for the FIFO."""
    (tmp_path / "link.img").symlink_to("/proc/self/status")
    (tmp_path / "directory.img").mkdir()
    os.mkfifo(tmp_path / "fifo.img")
    for name in ("missing.img", "link.img", "directory.img", "fifo.img"):
        with pytest.raises(Refused) as caught:
            Image.read(place, name)
        assert is_corrupt(caught.value)
        with pytest.raises(Refused):
            list(read_first(place, name))


def test_too_large(place: int, tmp_path: Path) -> None:
    """A file larger than any image is refused before it is read."""
    (tmp_path / "x.img").touch()
    os.truncate(tmp_path / "x.img", images.MAX_IMAGE_BYTES + 1)
    with pytest.raises(Refused, match="more than an image can have"):
        read_bytes(place, "x.img")


def test_writing_through_a_link(place: int, tmp_path: Path) -> None:
    """A link in an image's place is not written through."""
    (tmp_path / "target").write_bytes(b"keep")
    (tmp_path / "x.img").symlink_to("target")
    with pytest.raises(OSError, match="symbolic"):
        Image("x.img", b"1234", []).write(place)
    assert (tmp_path / "target").read_bytes() == b"keep"


def test_matching(place: int, tmp_path: Path) -> None:
    """Images are found by their whole name and returned in the order of their numbers."""
    for name in ("core-10.img", "core-9.img", "core-9.img.new", "xcore-1.img", "core-.img"):
        (tmp_path / name).touch()
    assert list(matching(place, r"core-(\d+)\.img").items()) == [(9, "core-9.img"), (10, "core-10.img")]
