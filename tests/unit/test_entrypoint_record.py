"""The light frozen record behaves as the dataclass that type checkers take it for."""

from __future__ import annotations

import pytest

from chrek.system.record import changed, record


@record
class Point:
    """A point."""

    x: int
    y: int = 0


def test_construction_equality_and_repr() -> None:
    """Fields are given by name; defaults, equality, hash and repr are those of a frozen dataclass."""
    assert Point(x=1) == Point(x=1, y=0)
    assert Point(x=1) != Point(x=2)
    assert hash(Point(x=1)) == hash(Point(x=1))
    assert repr(Point(x=1)) == "Point(x=1, y=0)"


def test_it_is_frozen() -> None:
    """A field can be neither set nor deleted; a changed copy can be made."""
    point = Point(x=1)
    with pytest.raises(AttributeError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del point.x
    assert changed(point, y=5) == Point(x=1, y=5)


def test_wrong_fields_are_refused() -> None:
    """A missing or an unknown field is a TypeError."""
    with pytest.raises(TypeError):
        Point()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Point(x=1, z=2)  # type: ignore[call-arg]
