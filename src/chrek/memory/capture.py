"""Copying the memory of frozen processes into shards, with many threads.

Each thread owns one shard and takes the next block's worth of addresses whenever it is free, so that dense
and empty regions even out by themselves. It reads them into its buffer, throws the zero pages out, writes whole
blocks, and digests them or leaves that for after the thaw. Nothing is preallocated (zeros make the size unknown),
nothing is read back, and the memory of the copying program is two blocks a thread whatever the size of what it copies.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from chrek.artifact import FASTEST
from chrek.errors import CaptureFailed, Reason
from chrek.memory.crew import NO_LIMITS, Crew, Limits
from chrek.memory.index import Index, PageFile
from chrek.memory.ranges import PAGE, Range, in_order
from chrek.memory.shard import ShardWriter
from chrek.memory.task import AccessError, Piece, Task, tasks
from chrek.memory.zeros import nonzero_spans
from chrek.system.ids import HostPid, NsPid

BLOCK_SIZE: Final = 2 << 20
"""Bytes in a block: from 0.5 to 8 MiB the copy's cost is the same (1.34 s of one core a GB with the digest, 0.72
without; 2-core EPYC, tmpfs), so what counts is that 16 threads with two blocks each stay at 64 MB."""

MANY_RUNS: Final = 50_000
"""From this many runs in a shard on, holes of less than 64 KiB are stored: the index stays small at any size."""

_WIDE_GAP = 16


@dataclass(frozen=True)
class Captured:
    """What a capture wrote: the index (not yet on disk), and figures in bytes and seconds.

    *undigested* are the numbers of the blocks whose digests are still to be computed.
    """

    index: Index
    undigested: frozenset[int]
    scanned: int
    zero: int
    seconds: float

    @property
    def stored(self) -> int:
        """Bytes in the shards."""
        return self.index.size

    @property
    def rate(self) -> float:
        """Bytes of memory copied a second, zeros included."""
        return self.scanned / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Job:
    """A block's worth of addresses of one process."""

    process: int
    anonymous: bool
    pieces: list[Piece]
    length: int


class _Plan:
    """Hands out jobs in the order of processes and addresses; used by all threads."""

    def __init__(self, ranges: list[Range], pids: list[NsPid], size: int) -> None:
        self._jobs = _jobs(ranges, {pid: number for number, pid in enumerate(pids)}, size)
        self._lock = threading.Lock()

    def take(self) -> _Job | None:
        with self._lock:
            return next(self._jobs, None)


def _jobs(ranges: list[Range], numbers: Mapping[NsPid, int], size: int) -> Iterator[_Job]:
    pieces: list[Piece] = []
    room = size
    last: Range | None = None
    for whole in ranges:
        if last is not None and pieces and (last.pid, last.anonymous) != (whole.pid, whole.anonymous):
            yield _Job(numbers[last.pid], last.anonymous, pieces, size - room)
            pieces, room = [], size
        last = whole
        start = whole.start
        while start < whole.end:
            length = min(room, whole.end - start)
            pieces.append((start, length))
            start += length
            room -= length
            if not room:
                yield _Job(numbers[whole.pid], whole.anonymous, pieces, size)
                pieces, room = [], size
    if last is not None and pieces:
        yield _Job(numbers[last.pid], last.anonymous, pieces, size - room)


def capture(
    ranges: Iterable[Range],
    *,
    host_pids: Mapping[NsPid, HostPid],
    folder: int,
    digest: bool = True,
    block_size: int = BLOCK_SIZE,
    limits: Limits = NO_LIMITS,
) -> Captured:
    """Copy *ranges* of frozen processes into shards in the directory *folder* (``memory/``).

    With *digest* off only blocks whose write waited for the disk are digested; `chrek.memory.digest` computes the others
    after the thaw.
    The caller writes the index with `write_index`, and flushes the files when it publishes.

    Raises:
        CaptureFailed: ``NO_SPACE``, ``WRITE_FAILED``, ``MEMORY_UNREADABLE``, ``TIMEOUT``, ``CAPTURE_INTERRUPTED``.
        ValueError: ranges overlap.
    """
    started = time.monotonic()
    ordered = in_order(ranges)
    pids = sorted({span.pid for span in ordered})
    reached = [_reach(pid, host_pids) for pid in pids]
    total = sum(span.length for span in ordered)
    plan = _Plan(ordered, pids, block_size)
    crew = Crew(limits, failure=CaptureFailed, interrupted=Reason.CAPTURE_INTERRUPTED)
    with tasks(reached) as opened, ExitStack() as stack:
        writers: list[ShardWriter] = []
        lock = threading.Lock()

        def body() -> None:
            with lock:
                writer = ShardWriter(folder, len(writers), block_size, digest=digest)
                stack.callback(writer.close)
                writers.append(writer)
            _copy(crew, plan, opened, writer)

        crew.run(limits.threads(-(-total // block_size)), body)
        index, undigested = _index(writers, pids, block_size)
    seconds = time.monotonic() - started
    return Captured(index=index, undigested=undigested, scanned=total, zero=total - index.size, seconds=seconds)


def _reach(pid: NsPid, host_pids: Mapping[NsPid, HostPid]) -> HostPid:
    if pid not in host_pids:
        raise CaptureFailed(Reason.MEMORY_UNREADABLE, f"Process {pid} of the application is not there any more.")
    return host_pids[pid]


def _copy(crew: Crew, plan: _Plan, opened: list[Task], writer: ShardWriter) -> None:
    """Copy jobs into one shard until there are none left: the body of a thread."""
    crew.check()
    while (job := plan.take()) is not None:
        try:
            opened[job.process].read(job.pieces, writer.buffer, writer.filled)
        except AccessError as error:
            why = "it has ended" if error.errno == errno.ESRCH else error
            text = f"Memory of process {error.pid} at {error.address:#x} could not be read: {why}."
            raise CaptureFailed(Reason.MEMORY_UNREADABLE, text) from error
        writer.accept(_keep(job, writer))
        crew.advance(job.length)
        crew.check()
    writer.finish()


def _keep(job: _Job, writer: ShardWriter) -> int:
    """Drop the zero pages of what was read and note the runs; return the bytes that are left."""
    if not job.anonymous:
        spans = [(0, job.length // PAGE)]
    else:
        gap = _WIDE_GAP if len(writer.runs) > MANY_RUNS else 1
        spans = nonzero_spans(writer.buffer, writer.filled, job.length // PAGE, min_gap=gap)
    kept = 0
    for first, pages in spans:
        writer.buffer.move(writer.filled + kept, writer.filled + first * PAGE, pages * PAGE)
        kept += pages * PAGE
    _note(job, spans, writer)
    return kept


def _note(job: _Job, spans: list[tuple[int, int]], writer: ShardWriter) -> None:
    """Record at which addresses the kept pages lie: both lists are in order, so one walk over both does."""
    pieces = iter(job.pieces)
    at = end = base = 0
    for first, pages in spans:
        start, stop = first * PAGE, (first + pages) * PAGE
        while start < stop:
            while start >= end:
                base, length = next(pieces)
                at, end = end, end + length
            part = min(stop, end) - start
            writer.runs.add(base + start - at, part // PAGE, job.process)
            start += part


def _index(writers: list[ShardWriter], pids: list[NsPid], block_size: int) -> tuple[Index, frozenset[int]]:
    files: list[PageFile] = []
    ends: list[int] = []
    digests: list[bytes | None] = []
    runs = bytearray()
    used = 0
    for writer in writers:
        if not writer.file.size:
            continue
        packed, own = writer.runs.finish()
        files.append(writer.file)
        ends.extend(used + end for end in own)
        used += len(writer.runs)
        digests += writer.digests
        runs += packed
    index = Index(
        block_size=block_size,
        files=tuple(files),
        pids=tuple(pids),
        ends=tuple(ends),
        algorithm=FASTEST,
        digests=b"".join(digest or bytes(FASTEST.size) for digest in digests),
        runs=bytes(runs),
    )
    return index, frozenset(number for number, digest in enumerate(digests) if digest is None)
