"""Which pages forked processes still share copy-on-write.

CRIU restores that sharing, but only for pages it restores itself: it puts a parent's page in place, forks, and
lets the child keep the inherited page where the contents are equal. Pages that a fill writes into both become
two pages, and a pre-forked server grows by its parent's size for each worker. So pages that a process shares
with its parent must stay in CRIU's images, on both sides.

Sharing between siblings whose parent has replaced its own page is lost under CRIU in any case.

Two pages are one when both processes map the same frame at the same address: ``/proc/PID/pagemap``
(Documentation/admin-guide/mm/pagemap.rst) has one 8-byte word a page, with the frame number in bits 0-54, which
reads as 0 without CAP_SYS_ADMIN. Then the contents of pages that are not mapped exclusively (bit 56) are
compared instead, which finds the same pages more slowly, and possibly some more; keeping one too many is harmless.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from chrek.errors import CaptureFailed, Reason
from chrek.memory.ranges import PAGE, Range, in_order
from chrek.memory.task import AccessError, Buffer, Piece, Task, tasks
from chrek.system.ids import HostPid, NsPid
from chrek.system.runs import RunSet, union

_FRAME: Final = (1 << 55) - 1
_EXCLUSIVE: Final = 1 << 56
_FILE: Final = 1 << 61  # a page of a file or of shared memory
_SWAPPED: Final = 1 << 62  # then the place in swap stands for the frame
_PRESENT: Final = 1 << 63
_COMPARED: Final = _FRAME | _FILE | _SWAPPED | _PRESENT

_WINDOW = 64 << 10
"""Most pages looked at in one step: 512 KiB of pagemap words of each process."""

_CLOSE = 64
"""Ranges that lie at most this many pages apart are looked at together: 20,000 small mappings, 30 steps."""

_CHUNK = 512
"""Pages compared by one memcmp before single words are looked at."""

_SET = re.compile(rb"\x01+")

Words = memoryview
Finder = Callable[[int, Words, Words], Iterator[tuple[int, int]]]


def shared_pages(
    parents: Mapping[NsPid, NsPid | None],
    ranges: Iterable[Range],
    *,
    host_pids: Mapping[NsPid, HostPid],
    by_contents: bool | None = None,
    close: int = 4,
) -> list[Range]:
    """Return the part of *ranges* that frozen processes share with their parent or with a child, in order.

    A page counts if it is in the ranges of one of the two, for whichever has it there. *parents* names each
    process's parent, or None (or one that is not in the tree). Any depth works, since CRIU hands pages down from
    each parent to its children. *by_contents* forces the slower comparison; by default it is used where this
    program may not see frame numbers.

    Pages between two runs that are at most *close* pages apart are named too: they cost CRIU less than another
    entry, and a Python program's counting of references leaves such holes by the ten thousand.

    Raises:
        CaptureFailed: ``MEMORY_UNREADABLE``; a process is gone.
    """
    mine: dict[NsPid, list[Range]] = {}
    for span in in_order(ranges):
        mine.setdefault(span.pid, []).append(span)
    blind = not _sees_frames() if by_contents is None else by_contents
    shared: dict[NsPid, list[Piece]] = {pid: [] for pid in mine}
    for child, parent in parents.items():
        if parent is None or parent not in host_pids:
            continue
        around = sorted([*mine.get(child, ()), *mine.get(parent, ())], key=lambda span: span.start)
        pieces = list(_joined(_shared_by([host_pids[child], host_pids[parent]], around, blind=blind), close))
        for pid in (child, parent):
            if pid in shared:
                shared[pid] += pieces
    found: list[Range] = []
    for pid, spans in mine.items():
        common = RunSet(union(shared[pid]))  # shared upwards and downwards, a page is there twice
        for span in spans:
            inside = common.inside(span.start, span.length)
            found.extend(replace(span, start=start, length=length) for start, length in inside)
    return found


def _sees_frames() -> bool:
    """Whether the kernel shows this program frame numbers: looked up for a page of its own."""
    with Buffer(PAGE) as page:
        page.view[0] = 1
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            word = int.from_bytes(os.pread(file.fileno(), 8, page.address // PAGE * 8), "little")
    return bool(word & _FRAME)


def _shared_by(pids: Sequence[HostPid], ranges: Sequence[Range], *, blind: bool) -> Iterator[tuple[int, int]]:
    """Yield address and length of each run of pages that two processes share, in windows around *ranges*."""
    with ExitStack() as stack:
        opened = stack.enter_context(tasks(pids))
        find: Finder = _same_frames
        if blind:
            find = _same_contents(opened, [stack.enter_context(Buffer(_CHUNK * PAGE)) for _ in opened])
        try:
            for start, length in _windows(ranges):
                words = [memoryview(task.pagemap(start, length)).cast("Q") for task in opened]
                for first, pages in find(start, words[0], words[1]):
                    yield start + first * PAGE, pages * PAGE
        except AccessError as error:
            raise CaptureFailed(Reason.MEMORY_UNREADABLE, f"Memory could not be looked at: {error}.") from error


def _windows(ranges: Sequence[Range]) -> Iterator[tuple[int, int]]:
    start = end = -1
    for span in ranges:
        if start >= 0 and span.start - end <= _CLOSE * PAGE:
            end = max(end, span.end)
        else:
            yield from _cut(start, end)
            start, end = span.start, span.end
    yield from _cut(start, end)


def _cut(start: int, end: int) -> Iterator[tuple[int, int]]:
    for at in range(start, end, _WINDOW * PAGE):
        yield at, min(_WINDOW * PAGE, end - at)


def _joined(runs: Iterable[Piece], close: int) -> Iterator[Piece]:
    """Join runs, in order of their addresses, that overlap or are at most *close* pages apart."""
    start, end = -1, -1
    for address, length in runs:
        if start >= 0 and address - end <= close * PAGE:
            end = max(end, address + length)
            continue
        if end > start:
            yield start, end - start
        start, end = address, address + length
    if end > start:
        yield start, end - start


def _same_frames(_start: int, child: Words, parent: Words) -> Iterator[tuple[int, int]]:
    """Yield first page and number of pages of each run that is mapped to the same frames in both."""
    for first in range(0, len(child), _CHUNK):
        ours, theirs = child[first : first + _CHUNK].tolist(), parent[first : first + _CHUNK].tolist()
        if ours == theirs and min(ours) >= _PRESENT and max(ours) < _PRESENT | _FILE:
            yield first, len(ours)
        elif max(ours) >= _SWAPPED and max(theirs) >= _SWAPPED:
            same = bytes(
                [
                    (mine ^ other) & _COMPARED == 0 and mine >= _SWAPPED and not mine & _FILE
                    for mine, other in zip(ours, theirs, strict=True)
                ]
            )
            for match in _SET.finditer(same):
                yield first + match.start(), match.end() - match.start()


def _same_contents(opened: Sequence[Task], buffers: Sequence[Buffer]) -> Finder:
    """Return a finder for programs that see no frame numbers."""

    def find(start: int, child: Words, parent: Words) -> Iterator[tuple[int, int]]:
        for first in range(0, len(child), _CHUNK):
            pairs = zip(child[first : first + _CHUNK], parent[first : first + _CHUNK], strict=True)
            # One of the two is enough: a huge page that the other maps in parts counts as exclusive.
            maybe = bytes(
                [
                    _is_anonymous(mine) and _is_anonymous(other) and (mine & other & _EXCLUSIVE == 0)
                    for mine, other in pairs
                ]
            )
            for match in _SET.finditer(maybe):
                at, length = start + (first + match.start()) * PAGE, (match.end() - match.start()) * PAGE
                for task, buffer in zip(opened, buffers, strict=True):
                    task.read_slowly(at, length, buffer)
                for low, pages in _equal(buffers, 0, length // PAGE):
                    yield first + match.start() + low, pages

    return find


def _is_anonymous(word: int) -> bool:
    return _PRESENT <= word < _PRESENT | _FILE


def _equal(buffers: Sequence[Buffer], low: int, high: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of equal pages between two page numbers, halving where some differ."""
    ours, theirs = (bytes(buffer.view[low * PAGE : high * PAGE]) for buffer in buffers)
    if ours == theirs:
        yield low, high - low
    elif high - low > 1:
        middle = (low + high) // 2
        yield from _equal(buffers, low, middle)
        yield from _equal(buffers, middle, high)
