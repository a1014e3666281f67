"""Finding the pages of a buffer that are not all zeros, with few steps of Python a page.

Dense memory is told apart by one word of each page, read by the interpreter's own C loops (8 µs for 1024 pages);
only pages whose sampled words are all zero are compared whole, run by run, outside the interpreter's lock.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from operator import or_

from chrek.memory.ranges import PAGE
from chrek.memory.task import Buffer

_WORDS = PAGE // 8
_LANES = (_WORDS - 1, 67, 258)
_ZEROS = re.compile(rb"\0+")

Span = tuple[int, int]
"""First page and number of pages, counted from the start of the piece looked at."""


def nonzero_spans(buffer: Buffer, offset: int, pages: int, *, min_gap: int = 1) -> list[Span]:
    """Return the pages that are to be kept of *pages* pages from byte *offset* on.

    Runs of fewer than *min_gap* zero pages are kept too.
    """
    first, end = offset // 8, (offset + pages * PAGE) // 8
    words = buffer.words[first:end:_WORDS].tolist()
    if all(words):
        return [(0, pages)]
    for lane in _LANES:
        words = list(map(or_, words, buffer.words[first + lane : end : _WORDS].tolist()))
    spans: list[Span] = []
    at = 0
    for start, stop in _zero_spans(buffer, offset, bytes(map(bool, words)), min_gap):
        if start > at:
            spans.append((at, start - at))
        at = stop
    if at < pages:
        spans.append((at, pages - at))
    return spans


def _zero_spans(buffer: Buffer, offset: int, flags: bytes, min_gap: int) -> Iterator[Span]:
    """Yield first page and end of each run of zero pages, joined and long enough."""
    start = stop = -1
    for match in _ZEROS.finditer(flags):
        if match.end() - match.start() < min_gap:
            continue
        for low, high in _confirmed(buffer, offset, match.start(), match.end()):
            if low == stop:
                stop = high
                continue
            if stop - start >= min_gap:
                yield start, stop
            start, stop = low, high
    if stop > start and stop - start >= min_gap:
        yield start, stop


def _confirmed(buffer: Buffer, offset: int, low: int, high: int) -> Iterator[Span]:
    """Yield the zero pages among candidates whose first words are zero, halving where some are not."""
    if buffer.is_repeated(offset + low * PAGE, (high - low) * PAGE):
        yield low, high
    elif high - low > 1:
        middle = (low + high) // 2
        yield from _confirmed(buffer, offset, low, middle)
        yield from _confirmed(buffer, offset, middle, high)


def total(spans: list[Span]) -> int:
    """Return the number of pages in all spans."""
    return sum(pages for _, pages in spans)
