"""Arithmetic on ranges of memory, against sets of pages."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chrek.memory import PAGE, Range, in_order, subtract
from chrek.memory.ranges import USER_TOP
from chrek.system.ids import NsPid

# A busy machine is no failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def disjoint(draw: st.DrawFn) -> list[Range]:
    """Draw ranges of two processes that do not overlap."""
    found = []
    for pid in (1, 2):
        at = 0
        for _ in range(draw(st.integers(0, 6))):
            at += draw(st.integers(0, 5))
            length = draw(st.integers(1, 6))
            found.append(Range(NsPid(pid), at * PAGE, length * PAGE, anonymous=draw(st.booleans())))
            at += length
    return draw(st.permutations(found))


@st.composite
def any_ranges(draw: st.DrawFn) -> list[Range]:
    """Draw ranges that may overlap."""
    numbers = st.tuples(st.integers(1, 2), st.integers(0, 40), st.integers(1, 9))
    return [Range(NsPid(pid), at * PAGE, length * PAGE) for pid, at, length in draw(st.lists(numbers, max_size=8))]


def pages(ranges: list[Range]) -> list[tuple[int, int]]:
    """Return process and page number of all pages."""
    return [(span.pid, page) for span in ranges for page in range(span.start // PAGE, span.end // PAGE)]


@unhurried
@given(disjoint(), any_ranges())
def test_subtract_leaves_exactly_the_other_pages(ranges: list[Range], taken: list[Range]) -> None:
    """What is left is every page that was not taken, once, in order."""
    left = subtract(ranges, taken)
    assert pages(left) == sorted(set(pages(ranges)) - set(pages(taken)))
    assert left == in_order(left)


@unhurried
@given(disjoint())
def test_subtract_keeps_what_a_range_is(ranges: list[Range]) -> None:
    """The pieces of a range are anonymous if the range was."""
    middle = [Range(span.pid, span.start, PAGE) for span in ranges]
    anonymous = set(pages([span for span in ranges if span.anonymous]))
    assert set(pages([s for s in subtract(ranges, middle) if s.anonymous])) <= anonymous
    assert not set(pages([s for s in subtract(ranges, middle) if not s.anonymous])) & anonymous


def test_overlap_is_an_error() -> None:
    """Ranges of one process that overlap are not put in order; of two processes they may."""
    one = Range(NsPid(1), 0, 2 * PAGE)
    with pytest.raises(ValueError, match="overlap"):
        in_order([Range(NsPid(1), PAGE, PAGE), one])
    in_order([Range(NsPid(2), PAGE, PAGE), one])


@pytest.mark.parametrize(
    ("start", "length"), [(1, PAGE), (0, 0), (0, -PAGE), (0, PAGE + 1), (-PAGE, PAGE), (USER_TOP, PAGE)]
)
def test_what_is_no_range(start: int, length: int) -> None:
    """A range is a positive number of whole pages in user space."""
    with pytest.raises(ValueError, match="is not"):
        Range(NsPid(1), start, length)
