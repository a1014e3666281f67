"""Ranges of memory: what is one, and their order."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chrek.memory import PAGE, Range, in_order
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


@unhurried
@given(disjoint())
def test_in_order_sorts_and_changes_nothing(ranges: list[Range]) -> None:
    """The same ranges come out, by process and address, whatever order they came in."""
    ordered = in_order(ranges)
    assert sorted(ordered) == sorted(ranges)
    assert [(span.pid, span.start) for span in ordered] == sorted((span.pid, span.start) for span in ranges)


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
