"""An index for pages that CRIU has written itself, so that a plain dump is filled in parallel too.

CRIU's ``pages-N.img`` is page data and nothing else, in the order of the entries of the pagemap image that
names it: exactly a page file. Nothing is copied; the index points into the image.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from chrek.artifact import FASTEST
from chrek.errors import CaptureFailed, Reason
from chrek.memory.capture import BLOCK_SIZE
from chrek.memory.crew import NO_LIMITS, Limits
from chrek.memory.digest import digest
from chrek.memory.index import SKIPPED, FileKind, Index, PageFile, RunTable
from chrek.memory.ranges import PAGE, PageRun, in_order
from chrek.memory.shard import Folders


def adopt_pages_images(
    images: Mapping[int, Sequence[PageRun]],
    folders: Folders,
    *,
    block_size: int = BLOCK_SIZE,
    limits: Limits = NO_LIMITS,
) -> Index:
    """Return the index of pages that lie in ``pages-N.img``, N being the keys.

    What of an image no run names is left to CRIU. Pages of anonymous memory that hold only zeros are found
    while the digests are computed, and skipped. An image without runs is left out.

    Raises:
        CaptureFailed: ``DUMP_FAILED`` (an image is shorter than its runs), ``WRITE_FAILED`` (cannot be read),
            ``TIMEOUT``, ``CAPTURE_INTERRUPTED``.
        ValueError: runs overlap, in memory or in the file, or the images' directory was not given.
    """
    if folders.images is None:
        raise ValueError("the images' directory is needed")
    spans = in_order(run.span for runs in images.values() for run in runs)
    pids = sorted({span.pid for span in spans})
    numbers = {pid: number for number, pid in enumerate(pids)}
    files: list[PageFile] = []
    ends: list[int] = []
    packed = b""
    for number, runs in images.items():
        if not runs:
            continue
        file = PageFile(FileKind.PAGES_IMAGE, number, _size(folders.images, number))
        table = RunTable(block_size)
        at = 0
        for run in sorted(runs, key=lambda run: run.offset):
            if run.offset < at or run.offset % PAGE:
                raise ValueError(f"runs of {file.path} overlap or are not aligned at byte {run.offset}")
            _skip(table, run.offset - at)
            table.add(run.span.start, run.span.length // PAGE, numbers[run.span.pid])
            at = run.offset + run.span.length
        if at > file.size:
            raise CaptureFailed(Reason.DUMP_FAILED, f"{file.path} has {file.size} bytes; its pagemap needs {at}.")
        _skip(table, file.size - at)
        own, own_ends = table.finish()
        before = ends[-1] if ends else 0
        ends.extend(before + end for end in own_ends)
        files.append(file)
        packed += own
    index = Index(
        block_size=block_size,
        files=tuple(files),
        pids=tuple(pids),
        ends=tuple(ends),
        algorithm=FASTEST,
        digests=bytes(FASTEST.size * len(ends)),
        runs=packed,
    )
    return digest(index, folders, write_zeros=[span for span in spans if not span.anonymous], limits=limits)


def _skip(table: RunTable, length: int) -> None:
    if length:
        table.add(0, length // PAGE, SKIPPED)


def _size(folder: int, number: int) -> int:
    name = f"pages-{number}.img"
    try:
        size = os.stat(name, dir_fd=folder, follow_symlinks=False).st_size
    except OSError as error:
        raise CaptureFailed(Reason.WRITE_FAILED, f"memory/{name} cannot be read: {error.strerror}.") from error
    if size % PAGE:
        raise CaptureFailed(Reason.DUMP_FAILED, f"memory/{name} has {size} bytes, no whole number of pages.")
    return size
