"""Putting memory back into processes whose mappings CRIU has made, with many threads.

Each thread reads one block into memory of its own, checks its digest there, and copies those same bytes to the
processes. The file is never mapped: whoever can write to it could change a mapping between check and copy, and
one that shrinks would kill this program with SIGBUS. The extra copy costs 0.07 s a GB against 0.5 s for the
kernel's part (new pages in the target) and 0.6 s for the digest (2-core EPYC, Linux 6.18, seconds of one core).

A fill that fails has written part of the memory: the caller must then kill the processes.
"""

from __future__ import annotations

import enum
import errno
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from chrek.errors import Reason, RestoreFailed
from chrek.memory.crew import NO_LIMITS, Crew, Limits
from chrek.memory.index import SKIPPED, Block, Index
from chrek.memory.ranges import PAGE
from chrek.memory.shard import Folders, PageReader, page_files
from chrek.memory.task import AccessError, Buffer, Piece, Task, tasks
from chrek.system.ids import HostPid, NsPid

SAMPLE: Final = 16
"""``sampled`` checks one block of this many, from a random one on."""


class Verify(enum.Enum):
    """Which blocks are checked against their digests before they are written to memory."""

    FULL = "full"
    SAMPLED = "sampled"
    OFF = "off"


@dataclass(frozen=True)
class Filled:
    """What a fill did, in bytes and seconds."""

    written: int
    verified: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes written a second."""
        return self.written / self.seconds if self.seconds else 0.0


class _Queue:
    """The blocks, in the order of the files; used by all threads.

    Neighbouring blocks go to different threads at nearly the same time, so each file is read as a whole from
    its start: what read-ahead of the kernel and `prefetch` expect.
    """

    def __init__(self, index: Index, verify: Verify) -> None:
        self._blocks = index.blocks()
        self._lock = threading.Lock()
        self._step = {Verify.FULL: 1, Verify.SAMPLED: SAMPLE, Verify.OFF: 0}[verify]
        self._first = random.randrange(SAMPLE)  # noqa: S311  which blocks, not a secret
        self.verified = 0

    def take(self) -> tuple[Block, bool] | None:
        with self._lock:
            block = next(self._blocks, None)
            if block is None:
                return None
            check = self._step > 0 and (block.number + self._first) % self._step == 0
            if check:
                self.verified += block.length
            return block, check


def fill(
    index: Index,
    folders: Folders,
    *,
    host_pids: Mapping[NsPid, HostPid],
    verify: Verify = Verify.FULL,
    limits: Limits = NO_LIMITS,
) -> Filled:
    """Copy all that *index* holds into the processes of *host_pids*.

    Raises:
        Refused: ``CORRUPT``, before anything is written: a page file is missing or has another size.
        RestoreFailed: ``CORRUPT`` or ``FILL_FAILED`` with process, address, file and block; ``TIMEOUT``.
    """
    started = time.monotonic()
    reached = [_reach(pid, host_pids) for pid in index.pids]
    queue = _Queue(index, verify)
    crew = Crew(limits, failure=RestoreFailed, interrupted=Reason.FILL_FAILED)
    with page_files(index, folders) as reader, tasks(reached) as opened:
        crew.run(limits.threads(len(index.ends)), lambda: _copy(crew, queue, index, reader, opened))
    return Filled(written=crew.done, verified=queue.verified, seconds=time.monotonic() - started)


def _reach(pid: NsPid, host_pids: Mapping[NsPid, HostPid]) -> HostPid:
    if pid not in host_pids:
        raise RestoreFailed(Reason.FILL_FAILED, f"Process {pid} of the checkpoint was not restored.")
    return host_pids[pid]


def _copy(crew: Crew, queue: _Queue, index: Index, reader: PageReader, opened: list[Task]) -> None:
    """Fill block after block until there are none left: the body of a thread."""
    with Buffer(index.block_size) as buffer:
        crew.check()
        while (taken := queue.take()) is not None:
            block, check = taken
            reader.read(block, buffer)
            if check:
                verify_block(index, block, buffer)
            crew.advance(_write(index, block, buffer, opened))
            crew.check()


def verify_block(index: Index, block: Block, buffer: Buffer) -> None:
    """Check that the start of *buffer* holds what *block* must.

    Raises:
        RestoreFailed: ``CORRUPT``.
    """
    with buffer.view[: block.length] as view:
        if index.algorithm.of(view) != index.digest(block):
            where = f"{block.file.path}, bytes {block.offset} to {block.offset + block.length}"
            raise RestoreFailed(Reason.CORRUPT, f"{where}, is damaged: its digest is wrong.")


def _write(index: Index, block: Block, buffer: Buffer, opened: list[Task]) -> int:
    """Copy the runs of a block from *buffer* to their processes; return the bytes copied."""
    offset = copied = start = 0
    owner = SKIPPED
    pieces: list[Piece] = []
    for address, pages, process in index.runs_of(block):
        if process != owner:
            copied += _write_pieces(block, owner, pieces, buffer, start, opened)
            owner, pieces, start = process, [], offset
        pieces.append((address, pages * PAGE))
        offset += pages * PAGE
    return copied + _write_pieces(block, owner, pieces, buffer, start, opened)


def _write_pieces(
    block: Block, owner: int, pieces: list[Piece], buffer: Buffer, offset: int, opened: list[Task]
) -> int:
    if owner == SKIPPED or not pieces:
        return 0
    try:
        opened[owner].write(pieces, buffer, offset)
    except AccessError as error:
        why = "it has ended" if error.errno == errno.ESRCH else error
        text = f"Memory of process {error.pid} at {error.address:#x} could not be written ({block.file.path}, byte "
        raise RestoreFailed(Reason.FILL_FAILED, f"{text}{block.offset + offset}): {why}.") from error
    return sum(length for _, length in pieces)
