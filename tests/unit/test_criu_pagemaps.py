"""The split of an image directory, and the arithmetic of page runs, against sets of pages."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrek.criu import pagemaps
from chrek.criu.images import COMMON_MAGIC, Image, read_all
from chrek.criu.messages import Core, Memory, PagemapEntry, PagemapHead, Rseq, TaskCore, ThreadCore, Vma
from chrek.criu.pagemaps import PAGE, PE_PARENT, PE_PRESENT, Split
from chrek.errors import CaptureFailed, Reason
from chrek.system.ids import NsPid
from chrek.system.runs import Run, RunSet, intersect, subtract, union

PE_LAZY = 2
PID = NsPid(7)
SPACE = 40

PAGES = st.sets(st.integers(0, SPACE - 1))


def runs(pages: set[int]) -> list[Run]:
    """Return sorted runs that do not touch of the pages."""
    found: list[Run] = []
    for page in sorted(pages):
        if found and sum(found[-1]) == page * PAGE:
            found[-1] = (found[-1][0], found[-1][1] + PAGE)
        else:
            found.append((page * PAGE, PAGE))
    return found


def pages_of(stretches: list[Run]) -> set[int]:
    """Return the pages of runs, none of which is empty or overlaps another one."""
    found = [page for start, length in stretches for page in range(start // PAGE, (start + length) // PAGE)]
    assert all(length > 0 for _, length in stretches)
    assert len(found) == len(set(found))
    return set(found)


def cut(pages: set[int], alone: set[int]) -> list[Run]:
    """Return runs of the pages, those of `alone` being runs of their own: neighbours may touch."""
    return sorted(runs(pages - alone) + [(page * PAGE, PAGE) for page in pages & alone])


# --- arithmetic -------------------------------------------------------------------------------------


@given(PAGES, PAGES)
def test_intersect(first: set[int], second: set[int]) -> None:
    """The intersection has the pages of both, in order."""
    found = intersect(runs(first), runs(second))
    assert pages_of(found) == first & second
    assert found == sorted(found)


@given(PAGES, PAGES)
def test_subtract(first: set[int], second: set[int]) -> None:
    """The difference has the pages of the first that are not in the second, in order."""
    found = subtract(runs(first), runs(second))
    assert pages_of(found) == first - second
    assert found == sorted(found)


@given(st.lists(st.tuples(st.integers(0, SPACE), st.integers(1, 6))))
def test_union(stretches: list[tuple[int, int]]) -> None:
    """The union of any runs, overlapping and unsorted ones too, has each page once, in as few runs as can be."""
    wanted = {page for start, count in stretches for page in range(start, start + count)}
    assert union((start * PAGE, count * PAGE) for start, count in stretches) == runs(wanted)


@given(PAGES, PAGES, st.integers(0, SPACE), st.integers(0, 12))
def test_run_set(pages: set[int], alone: set[int], start: int, count: int) -> None:
    """Inside and outside part any stretch between them, whether or not runs of the set touch each other."""
    owned = RunSet(cut(pages, alone))
    stretch = set(range(start, start + count))
    inside, outside = owned.inside(start * PAGE, count * PAGE), owned.outside(start * PAGE, count * PAGE)
    assert pages_of(inside) == stretch & pages
    assert pages_of(outside) == stretch - pages
    assert inside == sorted(inside)
    assert outside == sorted(outside)


def test_a_byte_range_that_is_no_page() -> None:
    """The arithmetic is by bytes: a stretch may begin and end within runs."""
    assert RunSet([(10, 10), (20, 5)]).inside(15, 7) == [(15, 5), (20, 2)]
    assert RunSet([(10, 10)]).outside(5, 20) == [(5, 5), (20, 5)]
    assert RunSet([]).outside(5, 1) == [(5, 1)]


# --- image directories ------------------------------------------------------------------------------


def page(number: int) -> bytes:
    """Return the contents of a page: its number, all over."""
    return struct.pack("<I", number) * (PAGE // 4)


@dataclass
class Place:
    """A synthetic image directory, and one to move old page images to."""

    path: Path
    fd: int
    aside: int

    def pagemap(self, entries: list[tuple[int, int, int]], *, pid: int = PID, pages_id: int = 3) -> None:
        """Write a process's pagemap of (first page, count, flags), and the page image that belongs to it."""
        image: Image[PagemapEntry] = Image(f"pagemap-{pid}.img", struct.pack("<II", COMMON_MAGIC, 0x56084025), [])
        image.entries = [PagemapHead(pages_id=pages_id).encode()]
        data = b""
        for first, count, flags in entries:
            entry = PagemapEntry(vaddr=first * PAGE, compat_nr_pages=count, nr_pages=count, flags=flags)
            image.entries.append(entry.encode())
            if flags & PE_PRESENT:
                data += b"".join(page(number) for number in range(first, first + count))
        image.write(self.fd)
        (self.path / f"pages-{pages_id}.img").write_bytes(data)

    def split(self, moved: dict[NsPid, list[Run]], *, aside: bool) -> Split:
        """Split the directory; memory that CRIU left is read from pages with their number all over."""
        return pagemaps.split(
            self.fd, pagemaps.read(self.fd), moved, self.read_pages, aside=self.aside if aside else None
        )

    @staticmethod
    def read_pages(pid: NsPid, start: int, length: int) -> bytes:
        """Read the process's memory."""
        assert pid == PID
        return b"".join(page(number) for number in range(start // PAGE, (start + length) // PAGE))

    def kept(self) -> dict[int, bytes]:
        """Return what the directory's images say that each page has: by page number."""
        (process,) = pagemaps.read(self.fd)
        data = (self.path / f"pages-{process.pages_id}.img").read_bytes()
        found, offset = {}, 0
        for entry in process.entries:
            assert entry.flags == PE_PRESENT
            assert entry.nr_pages == entry.compat_nr_pages
            for number in range(entry.pages):
                found[entry.vaddr // PAGE + number] = data[offset : offset + PAGE]
                offset += PAGE
        assert offset == len(data)
        return found

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Return inode and time of change of each image."""
        return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in self.path.iterdir()}


@contextmanager
def directories(path: Path) -> Iterator[Place]:
    """Make the two directories."""
    found = []
    for name in ("images", "aside"):
        (path / name).mkdir(parents=True)
        found.append(os.open(path / name, os.O_RDONLY | os.O_DIRECTORY))
    yield Place(path / "images", *found)
    for fd in found:
        os.close(fd)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Return an empty image directory."""
    with directories(tmp_path) as found:
        yield found


@given(dumped=PAGES, moved=PAGES)
def test_plain_split(tmp_path_factory: pytest.TempPathFactory, dumped: set[int], moved: set[int]) -> None:
    """After a plain dump each page is either kept with its contents, or found aside at the offset that is named."""
    with directories(tmp_path_factory.mktemp("split")) as place:
        place.pagemap([(start // PAGE, length // PAGE, PE_PRESENT) for start, length in runs(dumped)])
        before = place.stamps()
        result = place.split({PID: runs(moved)}, aside=True)
        assert place.kept() == {number: page(number) for number in dumped - moved}
        adopted = {}
        changed = bool(dumped & moved)
        for pid, address, length, pages_id, offset in result.adopted:
            assert (pid, pages_id) == (PID, 3)
            data = (place.path.parent / "aside/pages-3.img").read_bytes()[offset : offset + length]
            for number in range(length // PAGE):
                adopted[address // PAGE + number] = data[number * PAGE : (number + 1) * PAGE]
        assert adopted == {number: page(number) for number in dumped & moved}
        assert (place.stamps() == before) is not changed


@given(left=PAGES, moved=PAGES)
def test_lazy_split(tmp_path_factory: pytest.TempPathFactory, left: set[int], moved: set[int]) -> None:
    """After a lazy dump what is not moved is read from the process and becomes part of the images."""
    with directories(tmp_path_factory.mktemp("split")) as place:
        present = {SPACE + 1, SPACE + 2}
        entries = [(start // PAGE, length // PAGE, PE_LAZY) for start, length in runs(left)]
        place.pagemap([*entries, (SPACE + 1, 2, PE_PRESENT)])
        assert {pid: pages_of(own) for pid, own in pagemaps.lazy_runs(pagemaps.read(place.fd)).items()} == {PID: left}
        result = place.split({PID: runs(moved)}, aside=False)
        assert place.kept() == {number: page(number) for number in (left - moved) | present}
        assert result.adopted == []
        assert result.moved == {PID: runs(moved)}
        assert not list((place.path.parent / "aside").iterdir())
        assert sorted(place.stamps()) == ["pagemap-7.img", "pages-3.img"]


def test_nothing_moved_writes_nothing(place: Place) -> None:
    """A process of which nothing is moved keeps its image files as they are."""
    place.pagemap([(1, 4, PE_PRESENT), (9, 1, PE_PRESENT)])
    before = place.stamps()
    assert place.split({}, aside=True).moved == {PID: []}
    assert place.stamps() == before


def test_a_lazy_dump_that_moves_all_keeps_its_pages(place: Place) -> None:
    """Where every page that CRIU left is moved, the page image is not written again, only the pagemap."""
    place.pagemap([(1, 4, PE_LAZY), (9, 1, PE_PRESENT)])
    before = place.stamps()
    place.split({PID: [(1 * PAGE, 4 * PAGE)]}, aside=False)
    assert place.stamps()["pages-3.img"] == before["pages-3.img"]
    assert place.kept() == {9: page(9)}


def test_processes_are_split_alone(place: Place) -> None:
    """Each process's runs come out of its own page image; another process's files stay."""
    place.pagemap([(1, 4, PE_PRESENT)])
    place.pagemap([(1, 4, PE_PRESENT)], pid=8, pages_id=4)
    before = place.stamps()
    result = place.split({NsPid(8): [(2 * PAGE, PAGE)]}, aside=True)
    assert result.adopted == [(8, 2 * PAGE, PAGE, 4, PAGE)]
    after = place.stamps()
    assert [name for name in before if before[name] != after[name]] != []
    assert all(before[name] == after[name] for name in ("pagemap-7.img", "pages-3.img"))


def test_a_page_image_that_is_too_short(place: Place) -> None:
    """A page image with fewer pages than its pagemap says fails the capture."""
    place.pagemap([(1, 4, PE_PRESENT)])
    os.truncate(place.path / "pages-3.img", 2 * PAGE)
    with pytest.raises(CaptureFailed, match="shorter than its pagemap") as caught:
        place.split({PID: [(1 * PAGE, PAGE)]}, aside=True)
    assert caught.value.reason is Reason.WRITE_FAILED


def test_what_is_in_a_parent_is_not_lazy(place: Place) -> None:
    """Runs whose pages are in an earlier dump were not left in the process."""
    place.pagemap([(1, 1, PE_PARENT), (2, 1, 0), (3, 1, PE_LAZY), (4, 1, PE_PRESENT)])
    assert pagemaps.lazy_runs(pagemaps.read(place.fd)) == {PID: [(2 * PAGE, PAGE), (3 * PAGE, PAGE)]}


def area(first: int, count: int, *, status: int = 1 << 9, flags: int = 0x22) -> Vma:
    """Return a virtual memory area: private and anonymous, where nothing else is said."""
    end = (first + count) * PAGE
    return Vma(start=first * PAGE, end=end, offset=0, shmid=0, protection=3, flags=flags, status=status)


@pytest.mark.parametrize(
    ("other", "movable"),
    [
        ({}, True),
        ({"status": 1 << 7}, False),  # a shared file
        ({"status": 1 << 8}, False),  # shared and anonymous
        ({"flags": 0x22 | 0x100}, False),  # a stack
        ({"flags": 0x22 | 0x2000}, False),  # locked
        ({"flags": 0x22 | 0x40000}, False),  # huge pages
    ],
)
def test_movable_areas(place: Place, other: dict[str, int], movable: bool) -> None:
    """Only dumped pages of private anonymous areas are moved, and of none that grows, is locked or has huge pages."""
    place.pagemap([(1, 8, PE_PRESENT), (20, 2, PE_LAZY)])
    image: Image[Memory] = Image(f"mm-{PID}.img", struct.pack("<II", COMMON_MAGIC, 0x57492820), [])
    areas = [area(0, 4), area(4, 3, **other), area(20, 5)]
    # The rest of ``mm_entry`` is required of writers: twelve numbers and the auxiliary vector.
    numbers = b"".join(bytes([number << 3, 0]) for number in range(1, 12))
    image.entries = [numbers + Memory(exe_file_id=1, vmas=areas).encode()]
    image.write(place.fd)
    wanted = [(1 * PAGE, 3 * PAGE), *([(4 * PAGE, 3 * PAGE)] if movable else [])]
    processes = pagemaps.read(place.fd)
    assert pagemaps.movable_runs(place.fd, processes, minimum=PAGE) == {PID: wanted}
    assert pagemaps.movable_runs(place.fd, processes, minimum=3 * PAGE + 1) == {PID: []}


def write_core(place: Place, thread: int, rseq: Rseq | None) -> None:
    """Write a thread's core image."""
    core = Core(machine=1, task=None, thread=ThreadCore(rseq=rseq))
    Image(f"core-{thread}.img", struct.pack("<II", COMMON_MAGIC, 0x55053847), [core.encode()]).write(place.fd)


def test_rseq_pages(place: Place) -> None:
    """The pages of every thread's rseq area are named, both where it crosses a boundary, each once."""
    write_core(place, 7, Rseq(abi_pointer=5 * PAGE + 64, abi_size=32, **rseq_rest()))
    write_core(place, 8, Rseq(abi_pointer=9 * PAGE - 16, abi_size=32, **rseq_rest()))
    write_core(place, 9, Rseq(abi_pointer=5 * PAGE + 128, abi_size=32, **rseq_rest()))
    write_core(place, 10, Rseq(abi_pointer=0, abi_size=0, **rseq_rest()))
    write_core(place, 11, None)
    found = pagemaps.rseq_runs(place.fd, {PID: [7, 8, 9, 10, 11], NsPid(11): [11]})
    assert found == {PID: [(number * PAGE, PAGE) for number in (5, 8, 9)], NsPid(11): []}


def rseq_rest() -> dict[str, bytes]:
    """Return the signature, a field that is not declared here."""
    return {"unknown": b"\x18\x01"}


def test_the_skeleton_keeps_the_head(place: Place) -> None:
    """A rewritten pagemap still names the page image that belongs to it."""
    place.pagemap([(1, 4, PE_PRESENT)], pages_id=12)
    place.split({PID: [(1 * PAGE, PAGE)]}, aside=True)
    assert read_all(place.fd, f"pagemap-{PID}.img", PagemapHead)[0].pages_id == 12


def test_a_dead_task_has_no_rseq(place: Place) -> None:
    """A core without a thread's part has no rseq area."""
    core = Core(machine=1, task=TaskCore(state=6, comm="x"))
    Image("core-7.img", struct.pack("<II", COMMON_MAGIC, 0x55053847), [core.encode()]).write(place.fd)
    assert pagemaps.rseq_runs(place.fd, {PID: [7]}) == {PID: []}
