"""Finding pages that are not all zeros."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chrek.memory.ranges import PAGE
from chrek.memory.task import Buffer
from chrek.memory.zeros import nonzero_spans

# Words that the fast test looks at, and some that it does not.
PLACES = (0, 1, 8, 536, 2064, 4088, 4095, 2500)


def set_pages(spans: list[tuple[int, int]]) -> set[int]:
    """Return the page numbers in spans."""
    return {page for first, count in spans for page in range(first, first + count)}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from((*PLACES, None)), min_size=1, max_size=40), st.integers(0, 3))
def test_exactly_the_nonzero_pages_are_found(places: list[int | None], skip: int) -> None:
    """A page with a single byte set anywhere is kept, every other one is not, at any offset in the buffer."""
    with Buffer((len(places) + skip) * PAGE) as buffer:
        buffer.view[: skip * PAGE] = b"\xff" * (skip * PAGE)
        for page, place in enumerate(places, skip):
            if place is not None:
                buffer.view[page * PAGE + place] = 1
        spans = nonzero_spans(buffer, skip * PAGE, len(places))
    assert set_pages(spans) == {page for page, place in enumerate(places) if place is not None}
    assert all(before[0] + before[1] < after[0] for before, after in itertools.pairwise(spans))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 8))
def test_short_gaps_are_kept(present: list[bool], min_gap: int) -> None:
    """Every nonzero page is kept, and only runs of at least the given number of zero pages are dropped."""
    with Buffer(len(present) * PAGE) as buffer:
        for page, here in enumerate(present):
            if here:
                buffer.view[page * PAGE + 777] = 1
        kept = set_pages(nonzero_spans(buffer, 0, len(present), min_gap=min_gap))
    dropped = "".join("." if page in kept else "z" for page in range(len(present)))
    assert {page for page, here in enumerate(present) if here} <= kept
    assert all(len(run) >= min_gap for run in dropped.split(".") if run)
    if min_gap == 1:
        assert kept == {page for page, here in enumerate(present) if here}


@pytest.mark.parametrize("count", [1, 2, 1024])
def test_all_zero_and_all_dense(count: int) -> None:
    """Zero memory gives nothing, dense memory one span."""
    with Buffer(count * PAGE) as buffer:
        assert nonzero_spans(buffer, 0, count) == []
        buffer.view[:] = b"\1" * len(buffer.view)
        assert nonzero_spans(buffer, 0, count) == [(0, count)]
