"""Which pages CRIU carries itself and which ChReK moves: the split of an image directory.

A dump leaves, for each process, a list of page runs (``pagemap-PID.img``) and the bytes of those that it
wrote (``pages-N.img``, in the same order). `split` decides about each run and leaves a *skeleton*: the
same images with the moved runs dropped, which an unmodified ``criu restore`` accepts and rebuilds with
empty memory there. Three kinds of page stay with CRIU:

- what it does not hold as private memory (shared, file-backed, locked, huge pages);
- pages that a parent and a child share copy-on-write: only CRIU can restore the sharing, and it does
  so only for pages it restores itself;
- pages with a thread's rseq area: the kernel writes into them at registration, and a later fill would
  put a stale CPU number back.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chrek.criu.images import Image, matching, read_one
from chrek.criu.messages import Core, Memory, PagemapEntry, PagemapHead
from chrek.errors import CaptureFailed, Reason
from chrek.system.ids import NsPid
from chrek.system.runs import Run, RunSet, intersect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

PAGE = 4096

PE_PARENT, PE_PRESENT = 1, 4
"""Flags of a pagemap entry (``criu/include/image.h``); a lazy dump marks what it left with 2, or with nothing."""

_VMA_ANON_PRIVATE = 1 << 9
_MAP_GROWSDOWN, _MAP_LOCKED, _MAP_HUGETLB = 0x100, 0x2000, 0x40000

@dataclass
class Process:
    """The page runs of one process.

    Attributes:
        image: the pagemap image, its head the first entry.
        pages_id: number of the ``pages-N.img`` that holds its pages.
        entries: the runs in CRIU's order, which is by address.
    """

    pid: NsPid
    image: Image[PagemapEntry]
    pages_id: int
    entries: list[PagemapEntry]


@dataclass
class Split:
    """What `split` decided.

    Attributes:
        moved: for each process, the runs that ChReK moves.
        adopted: for a plain dump, where in which ``pages-N.img`` each moved run lies:
            (process, address, length, N, offset).
    """

    moved: dict[NsPid, list[Run]] = field(default_factory=dict)
    adopted: list[tuple[NsPid, int, int, int, int]] = field(default_factory=list)


def read(directory: int) -> list[Process]:
    """Read the pagemaps of all processes in an image directory.

    Raises:
        Refused: ``CORRUPT``.
    """
    found = []
    for pid, name in matching(directory, r"pagemap-(\d+)\.img").items():
        image: Image[PagemapEntry] = Image.read(directory, name)
        head = read_one(directory, name, PagemapHead)
        found.append(Process(NsPid(pid), image, head.pages_id, list(image.decode(PagemapEntry, 1))))
    return found


def lazy_runs(processes: Iterable[Process]) -> dict[NsPid, list[Run]]:
    """Return, for each process, the runs whose pages CRIU left where they are (a lazy dump's)."""
    return {
        process.pid: [(entry.vaddr, entry.pages * PAGE) for entry in process.entries if _is_lazy(entry)]
        for process in processes
    }


def movable_runs(directory: int, processes: Iterable[Process], *, minimum: int) -> dict[NsPid, list[Run]]:
    """Return, for each process, the dumped runs of private anonymous memory that a fill can put back.

    Runs shorter than *minimum* bytes stay with CRIU.
    """
    result = {}
    for process in processes:
        areas = _private_areas(directory, process.pid)
        runs = [(e.vaddr, e.pages * PAGE) for e in process.entries if (e.flags or 0) & PE_PRESENT]
        result[process.pid] = [run for run in intersect(runs, areas) if run[1] >= minimum]
    return result


def rseq_runs(directory: int, threads: Mapping[NsPid, Iterable[int]]) -> dict[NsPid, list[Run]]:
    """Return, for each process, the pages that hold its threads' rseq areas."""
    result: dict[NsPid, list[Run]] = {}
    for pid, members in threads.items():
        pages = set()
        for thread in members:
            for core in Image[Core].read(directory, f"core-{thread}.img").decode(Core):
                rseq = core.thread.rseq if core.thread else None
                if rseq is not None and rseq.abi_pointer:
                    last = rseq.abi_pointer + max(rseq.abi_size or 0, 1) - 1
                    pages |= {rseq.abi_pointer // PAGE, last // PAGE}
        result[pid] = [(page * PAGE, PAGE) for page in sorted(pages)]
    return result


def split(
    directory: int,
    processes: Iterable[Process],
    moved: Mapping[NsPid, list[Run]],
    read_pages: Callable[[NsPid, int, int], bytes],
    *,
    aside: int | None,
) -> Split:
    """Rewrite the pagemaps and page images so that the *moved* runs are no longer in them.

    *read_pages* reads a process's memory (process, address, length) for pages that CRIU left where
    they are and that must stay with it; it is not called for a plain dump. A page image that loses
    pages is moved to the directory *aside*, under its name: its moved runs are named in
    `Split.adopted`. Without *aside* (a lazy dump) there is nothing in it that the new one lacks.

    Raises:
        CaptureFailed: ``WRITE_FAILED``.
    """
    result = Split()
    for process in processes:
        runs = moved.get(process.pid, [])
        result.moved[process.pid] = runs
        try:
            _rewrite(directory, process, runs, read_pages, result, aside)
        except OSError as error:
            message = f"pages of process {process.pid}: {error.strerror} ({error.filename or 'images'})."
            raise CaptureFailed(Reason.WRITE_FAILED, message) from error
    return result


def _rewrite(
    directory: int,
    process: Process,
    moved: list[Run],
    read_pages: Callable[[NsPid, int, int], bytes],
    result: Split,
    aside: int | None,
) -> None:
    movable = RunSet(moved)
    kept: list[PagemapEntry] = []
    pieces: list[tuple[PagemapEntry, Run, int | None]] = []
    offset, changed = 0, False
    for entry in process.entries:
        whole = (entry.vaddr, entry.pages * PAGE)
        present = bool((entry.flags or 0) & PE_PRESENT)
        position = offset if present else None
        stays = movable.outside(*whole)
        if present:
            offset += whole[1]
            for start, length in movable.inside(*whole):
                at = offset - whole[1] + start - whole[0]
                result.adopted.append((process.pid, start, length, process.pages_id, at))
        changed |= (not present and bool(stays)) or (present and stays != [whole])
        for run in stays:
            pieces.append((entry, run, None if position is None else position + run[0] - whole[0]))
            kept.append(_entry(run))
    name = f"pages-{process.pages_id}.img"
    if changed:
        _write_pages(directory, name, process.pid, pieces, read_pages, aside)
    if changed or len(kept) != len(process.entries):
        process.image.entries[1:] = [entry.encode() for entry in kept]
        process.image.write(directory)


def _write_pages(
    directory: int,
    name: str,
    pid: NsPid,
    pieces: list[tuple[PagemapEntry, Run, int | None]],
    read_pages: Callable[[NsPid, int, int], bytes],
    aside: int | None,
) -> None:
    fresh = f"{name}.new"
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    old = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        with open(os.open(fresh, flags, 0o600, dir_fd=directory), "wb") as file:
            for _, (start, length), position in pieces:
                if position is None:
                    file.write(read_pages(pid, start, length))
                else:
                    file.flush()
                    _copy(old, position, file.fileno(), length)
    finally:
        os.close(old)
    if aside is None:
        os.unlink(name, dir_fd=directory)
    else:
        os.rename(name, name, src_dir_fd=directory, dst_dir_fd=aside)
    os.rename(fresh, name, src_dir_fd=directory, dst_dir_fd=directory)


def _copy(source: int, offset: int, target: int, length: int) -> None:
    while length:
        done = os.sendfile(target, source, offset, length)
        if not done:
            raise OSError(5, "the page image is shorter than its pagemap says")
        offset, length = offset + done, length - done


def _entry(run: Run) -> PagemapEntry:
    # Readers before 4.2 know field 2 only, later ones prefer field 5: both are set.
    pages = run[1] // PAGE
    return PagemapEntry(vaddr=run[0], compat_nr_pages=pages & 0xFFFFFFFF, nr_pages=pages, flags=PE_PRESENT)


def _is_lazy(entry: PagemapEntry) -> bool:
    return not (entry.flags or 0) & (PE_PRESENT | PE_PARENT)


def _private_areas(directory: int, pid: NsPid) -> list[Run]:
    unmovable = _MAP_GROWSDOWN | _MAP_LOCKED | _MAP_HUGETLB
    for memory in Image[Memory].read(directory, f"mm-{pid}.img").decode(Memory):
        return [
            (area.start, area.end - area.start)
            for area in memory.vmas
            if area.status & _VMA_ANON_PRIVATE and not area.flags & unmovable
        ]
    return []
