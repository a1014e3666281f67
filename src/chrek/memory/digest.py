"""Digests of page files after they were written, and checking all of them.

For page files that CRIU wrote, and for captures that leave the digests for after the thaw: on few cores the
digest is half of the copy's cost, and the application need not stand still for it. Meanwhile the
disk works: see `writeback`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from chrek.errors import CaptureFailed, ChrekError, Reason, RestoreFailed
from chrek.memory.crew import NO_LIMITS, Crew, Limits
from chrek.memory.fill import verify_block
from chrek.memory.index import SKIPPED, Block, Index, Run, pack_runs
from chrek.memory.ranges import PAGE, Range
from chrek.memory.shard import Folders, PageReader, page_files, write_failed
from chrek.memory.task import Buffer
from chrek.memory.writeback import Writeback
from chrek.memory.zeros import nonzero_spans


def digest(
    index: Index,
    folders: Folders,
    *,
    only: AbstractSet[int] | None = None,
    write_zeros: Sequence[Range] | None = None,
    limits: Limits = NO_LIMITS,
) -> Index:
    """Return *index* with the digests that its page files have now, of all blocks or *only* of those with these numbers.

    Given *write_zeros*, the runs also lose the pages that hold only zeros, so that a fill does not write them,
    except in those ranges (what is not private anonymous memory).

    Raises:
        CaptureFailed: ``WRITE_FAILED`` (a file cannot be read back), ``TIMEOUT``, ``CAPTURE_INTERRUPTED``.
    """
    if only is not None and not only:
        return index
    digests = {block.number: index.digest(block) for block in index.blocks()}
    todo = [block for block in index.blocks() if only is None or block.number in only]
    runs: dict[int, bytes] = {}

    def one(block: Block, buffer: Buffer) -> None:
        with buffer.view[: block.length] as view:
            digests[block.number] = index.algorithm.of(view)
        if write_zeros is not None:
            runs[block.number] = pack_runs(_without_zeros(index, block, buffer, write_zeros))

    try:
        with page_files(index, folders) as reader, Writeback(reader.descriptors):
            _each_block(todo, index, reader, one, limits, failure=CaptureFailed, cancelled=Reason.CAPTURE_INTERRUPTED)
    except CaptureFailed:
        raise
    except OSError as error:
        raise write_failed("", error) from error
    except ChrekError as error:
        raise CaptureFailed(Reason.WRITE_FAILED, error.message) from error
    done = replace(index, digests=b"".join(digests[number] for number in range(len(digests))))
    if write_zeros is None:
        return done
    ends: list[int] = []
    for number in range(len(runs)):
        ends.append((ends[-1] if ends else 0) + len(runs[number]) // len(pack_runs([(0, 0, 0)])))
    return replace(done, ends=tuple(ends), runs=b"".join(runs[number] for number in range(len(runs))))


def verify(index: Index, folders: Folders, *, limits: Limits = NO_LIMITS) -> None:
    """Check every block of every page file.

    Raises:
        RestoreFailed: ``CORRUPT`` with file and block, ``FILL_FAILED`` (cannot be read), ``TIMEOUT``.
        Refused: ``CORRUPT``; a file is missing or has another size.
    """
    with page_files(index, folders) as reader:
        _each_block(
            index.blocks(),
            index,
            reader,
            lambda block, buffer: verify_block(index, block, buffer),
            limits,
            failure=RestoreFailed,
            cancelled=Reason.FILL_FAILED,
        )


def _each_block(
    blocks: Iterable[Block],
    index: Index,
    reader: PageReader,
    step: Callable[[Block, Buffer], None],
    limits: Limits,
    *,
    failure: type[ChrekError],
    cancelled: Reason,
) -> None:
    crew = Crew(limits, failure=failure, interrupted=cancelled)
    left = iter(blocks)
    lock = threading.Lock()

    def body() -> None:
        with Buffer(index.block_size) as buffer:
            while True:
                crew.check()
                with lock:
                    block = next(left, None)
                if block is None:
                    return
                reader.read(block, buffer)
                step(block, buffer)
                crew.advance(block.length)

    crew.run(limits.threads(len(index.ends)), body)


def _without_zeros(index: Index, block: Block, buffer: Buffer, write_zeros: Sequence[Range]) -> Iterator[Run]:
    offset = 0
    for address, pages, process in index.runs_of(block):
        if process == SKIPPED or _touches(write_zeros, index, process, address, pages):
            yield address, pages, process
        else:
            at = 0
            for first, count in nonzero_spans(buffer, offset, pages):
                if first > at:
                    yield 0, first - at, SKIPPED
                yield address + first * PAGE, count, process
                at = first + count
            if at < pages:
                yield 0, pages - at, SKIPPED
        offset += pages * PAGE


def _touches(ranges: Sequence[Range], index: Index, process: int, address: int, pages: int) -> bool:
    pid = index.pids[process]
    end = address + pages * PAGE
    return any(span.pid == pid and span.start < end and address < span.end for span in ranges)
