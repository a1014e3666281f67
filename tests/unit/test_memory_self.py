"""Any pattern of memory goes into shards and comes back: this program's own memory, cleared in between."""

from __future__ import annotations

import os
import tempfile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chrek.memory import Folders, Limits, Range, capture, digest, fill, read_index, write_index
from chrek.memory.ranges import PAGE
from chrek.memory.task import Buffer
from chrek.system.ids import HostPid, NsPid

APP = NsPid(7)
PAGES = 120
SMALL = 64 << 10

pages = st.lists(st.sampled_from("zdo"), min_size=PAGES, max_size=PAGES)
pieces = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(pages, pieces, st.integers(1, 3), st.booleans())
def test_any_pattern_comes_back(kinds: list[str], gaps: list[tuple[int, int]], workers: int, during: bool) -> None:
    """Zero, dense and nearly empty pages in any ranges come back, and what is between the ranges is untouched."""
    ranges, at = [], 0
    with Buffer(PAGES * PAGE) as memory, tempfile.TemporaryDirectory() as path:
        for page, kind in enumerate(kinds):
            if kind == "d":
                memory.view[page * PAGE : (page + 1) * PAGE] = os.urandom(PAGE)
            elif kind == "o":
                memory.view[page * PAGE + 1234] = 1
        for gap, length in gaps:
            at += gap
            if at + length > PAGES:
                break
            ranges.append(Range(APP, memory.address + at * PAGE, length * PAGE))
            at += length
        before = bytes(memory.view)
        host = {APP: HostPid(os.getpid())}
        folder = os.open(path, os.O_RDONLY)
        try:
            limits = Limits(workers=workers)
            index = capture(ranges, host_pids=host, folder=folder, block_size=SMALL, digest=during, limits=limits).index
            index = index if during else digest(index, Folders(folder))
            inside = bytearray(before)
            for span in ranges:
                first = span.start - memory.address
                memory.view[first : first + span.length] = bytes(span.length)
                inside[first : first + span.length] = bytes(span.length)
            assert bytes(memory.view) == inside
            fill(read_index(folder, write_index(folder, index)), Folders(folder), host_pids=host, limits=limits)
        finally:
            os.close(folder)
        assert bytes(memory.view) == before
