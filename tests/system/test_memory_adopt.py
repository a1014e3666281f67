"""Pages that CRIU wrote itself are indexed where they lie, and filled from there."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.errors import CaptureFailed, Reason
from chrek.memory import Folders, PageRun, Range, adopt_pages_images, fill, read_index, write_index
from chrek.system.ids import HostPid, NsPid
from system.memory_child import BASE, PAGE, Child

APP, WORKER = NsPid(7), NsPid(8)
SMALL = 64 << 10


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Folders]:
    """Give the one directory in which everything lies."""
    fd = os.open(tmp_path, os.O_RDONLY)
    yield Folders(fd, fd)
    os.close(fd)


def test_pages_images_are_filled_without_a_copy(folders: Folders, tmp_path: Path) -> None:
    """Runs of two images come back; gaps between them, and zero pages of anonymous memory, are left alone."""
    noise = random.Random(1)
    first = noise.randbytes(50 * PAGE) + bytes(10 * PAGE) + noise.randbytes(40 * PAGE)
    second = noise.randbytes(20 * PAGE)
    (tmp_path / "pages-1.img").write_bytes(first)
    (tmp_path / "pages-12.img").write_bytes(second)
    images = {
        1: [
            PageRun(Range(APP, BASE, 45 * PAGE), 0),
            PageRun(Range(APP, BASE + 100 * PAGE, 12 * PAGE), 48 * PAGE),  # pages 50 to 59 of the file are zeros
            PageRun(Range(APP, BASE + 200 * PAGE, 40 * PAGE), 60 * PAGE),
        ],
        12: [PageRun(Range(WORKER, BASE, 20 * PAGE), 0)],
        13: [],
    }
    index = adopt_pages_images(images, folders, block_size=SMALL)
    index = read_index(folders.memory, write_index(folders.memory, index))
    assert list(index.entries()) == ["memory/pages-1.img", "memory/pages-12.img"]
    with Child() as app, Child() as worker:
        for child in (app, worker):
            child(f"anon(BASE, 300 * PAGE)\nput(BASE, b'old.' * {300 * PAGE // 4})")
        filled = fill(index, folders, host_pids={APP: HostPid(app.pid), WORKER: HostPid(worker.pid)})
        memory = bytes.fromhex(app("get(BASE, 300 * PAGE).hex()"))
        assert bytes.fromhex(worker("get(BASE, 20 * PAGE).hex()")) == second
    old = b"old." * (PAGE // 4)
    assert memory[: 45 * PAGE] == first[: 45 * PAGE]
    assert memory[100 * PAGE : 102 * PAGE] == first[48 * PAGE : 50 * PAGE]
    assert memory[102 * PAGE : 200 * PAGE] == old * 98
    assert memory[200 * PAGE : 240 * PAGE] == first[60 * PAGE :]
    assert filled.written == (45 + 2 + 40 + 20) * PAGE


def test_zero_pages_that_are_not_anonymous_are_written(folders: Folders, tmp_path: Path) -> None:
    """A zero page of a private file mapping is filled like any other."""
    (tmp_path / "pages-1.img").write_bytes(bytes(8 * PAGE))
    runs = [PageRun(Range(APP, BASE, 4 * PAGE), 0), PageRun(Range(APP, BASE + 9 * PAGE, 4 * PAGE, False), 4 * PAGE)]
    index = adopt_pages_images({1: runs}, folders, block_size=SMALL)
    with Child() as app:
        app("anon(BASE, 13 * PAGE)\nput(BASE, b'x' * (13 * PAGE))")
        fill(index, folders, host_pids={APP: HostPid(app.pid)})
        assert app("[get(BASE + n * PAGE, PAGE).count(0) // PAGE for n in range(13)]") == [0] * 9 + [1] * 4


def test_an_image_that_is_too_short(folders: Folders, tmp_path: Path) -> None:
    """An image with fewer pages than its pagemap says, or none at all, is an error with its name."""
    (tmp_path / "pages-1.img").write_bytes(bytes(2 * PAGE))
    (tmp_path / "pages-2.img").write_bytes(bytes(PAGE + 1))
    runs = [PageRun(Range(APP, BASE, 3 * PAGE), 0)]
    reasons = []
    for number in (1, 2, 3):
        with pytest.raises(CaptureFailed, match=rf"memory/pages-{number}\.img") as caught:
            adopt_pages_images({number: runs}, folders)
        reasons.append(caught.value.reason)
    assert reasons == [Reason.DUMP_FAILED, Reason.DUMP_FAILED, Reason.WRITE_FAILED]


def test_runs_that_cannot_be(folders: Folders, tmp_path: Path) -> None:
    """Runs that overlap in the file or in memory are a mistake of the caller."""
    (tmp_path / "pages-1.img").write_bytes(bytes(8 * PAGE))
    one = PageRun(Range(APP, BASE, 2 * PAGE), 0)
    for other in (PageRun(Range(APP, BASE + 8 * PAGE, PAGE), PAGE), PageRun(Range(APP, BASE + PAGE, PAGE), 4 * PAGE)):
        with pytest.raises(ValueError, match="overlap"):
            adopt_pages_images({1: [one, other]}, folders)
    with pytest.raises(ValueError, match="directory"):
        adopt_pages_images({1: [one]}, Folders(folders.memory))
