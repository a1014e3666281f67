"""Frozen dataclasses to JSON values and back, checked against their type hints.

The classes are the schema: what a field may hold is what its annotation says, and nothing else is
accepted. Understood are ``int``, ``float``, ``bool``, ``str``, ``bytes`` (base64), ``None`` in unions,
``Literal``, ``tuple[T, ...]``, ``Mapping[str, T]``, ``NewType`` and nested dataclasses; a field can be
narrowed with ``Annotated[T, Bounds(...)]``. Rules that span fields belong into ``__post_init__``, which
raises ``ValueError``.

An error names the place inside the document, the value found, and what is allowed there. A key that
no field names is an error, except in a class decorated with `open_section`, where it is ignored: such
sections only inform, so an older reader loses nothing by not knowing a key. A field whose value is
``None`` is left out.

Not a general serialiser: it knows no inheritance, no unions of classes, no cycles.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NewType, TypeVar, Union

from chrek.errors import Reason, Refused

T = TypeVar("T")

_OPEN_MARK: Final = "__open_section__"
_SHOWN: Final = 80


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Limits of a number's value, or of the length of anything that has one."""

    low: int
    high: int


# A manifest's integers are sizes, counts and ids: none is negative unless a field says so.
_INTEGER: Final = Bounds(0, 2**63 - 1)
# Linux allows one argument 128 KiB; a path has 4 KiB.
_STRING: Final = Bounds(0, 256 << 10)
_BYTES: Final = Bounds(0, 24 << 20)
_MEMBERS: Final = Bounds(0, 200_000)


class _Wrong(Exception):
    def __init__(self, place: str, problem: str) -> None:
        super().__init__(place, problem)
        self.place = place
        self.problem = problem


def open_section(kind: type[T]) -> type[T]:
    """Class decorator: unknown keys in this section are ignored instead of refused."""
    setattr(kind, _OPEN_MARK, True)
    return kind


def decode(kind: type[T], value: object, *, document: str) -> T:
    """Build a *kind* (a dataclass) from a parsed JSON *value*.

    Raises:
        Refused: ``CORRUPT``; the message names *document*, the place in it, the value and what is allowed.
    """
    try:
        return typing.cast("T", _decode(kind, value, "", None))
    except _Wrong as wrong:
        place = wrong.place.lstrip(".") or "the document"
        raise Refused(Reason.CORRUPT, f"{document}: {place}: {wrong.problem}.") from wrong


def encode(value: object) -> Any:  # noqa: ANN401 - a JSON value
    """Return the JSON value for a dataclass, or for anything that a field of one may hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        members = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: encode(member) for name, member in members if member is not None}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, Mapping):
        return {str(name): encode(member) for name, member in value.items()}
    if isinstance(value, tuple):
        return [encode(member) for member in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} has no form in JSON")


# One line for each kind of type hint: split up, the list of what is understood would be in two places.
def _decode(kind: Any, value: object, place: str, bounds: Bounds | None) -> object:  # noqa: ANN401 - a type hint
    if isinstance(kind, NewType):
        return _decode(kind.__supertype__, value, place, bounds)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, place)
    origin = typing.get_origin(kind)
    if origin is Annotated:
        inner, *notes = typing.get_args(kind)
        return _decode(inner, value, place, next((note for note in notes if isinstance(note, Bounds)), bounds))
    if origin is Literal:
        return _literal(typing.get_args(kind), value, place)
    if origin in {Union, types.UnionType}:
        return _optional(typing.get_args(kind), value, place, bounds)
    if origin is tuple:
        return _tuple(typing.get_args(kind), value, place, bounds or _MEMBERS)
    if origin is Mapping:
        return _mapping(typing.get_args(kind), value, place, bounds or _MEMBERS)
    return _scalar(kind, value, place, bounds)


def _scalar(kind: Any, value: object, place: str, bounds: Bounds | None) -> object:  # noqa: ANN401 - a type hint
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return _within(bounds or _INTEGER, value, value, place, "an integer")
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise _Wrong(place, f"{value} is not a finite number")
        return float(value)
    if kind is str and isinstance(value, str):
        return _within(bounds or _STRING, len(value), value, place, "a string with a length")
    if kind is bytes and isinstance(value, str):
        return _within(bounds or _BYTES, len(value) // 4 * 3, _base64(value, place), place, "base64 with a length")
    if kind not in _NAMES:
        raise TypeError(f"{place}: the codec does not know {kind!r}")
    raise _Wrong(place, f"{_show(value)} is not {_NAMES[kind]}")


_NAMES: Final[dict[object, str]] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    bytes: "a string of base64",
}


def _dataclass(kind: Any, value: object, place: str) -> object:  # noqa: ANN401 - a type hint
    if not isinstance(value, dict):
        raise _Wrong(place, f"{_show(value)} is not an object")
    hints, required = _fields(kind)
    unknown = value.keys() - hints.keys()
    if unknown and not getattr(kind, _OPEN_MARK, False):
        raise _Wrong(place, f"the key {_show(min(unknown))} is not known; allowed are {', '.join(hints)}")
    missing = required - value.keys()
    if missing:
        raise _Wrong(place, f"the key {min(missing)!r} is missing")
    members = {
        name: _decode(hint, value[name], f"{place}.{name}", None) for name, hint in hints.items() if name in value
    }
    try:
        return kind(**members)
    except ValueError as error:
        raise _Wrong(place, str(error)) from error


@functools.lru_cache(maxsize=256)
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:  # noqa: ANN401 - a type hint
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    required = frozenset(
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    return {field.name: hints[field.name] for field in fields}, required


def _optional(kinds: tuple[Any, ...], value: object, place: str, bounds: Bounds | None) -> object:
    others = [kind for kind in kinds if kind is not types.NoneType]
    if len(others) != 1:
        raise TypeError(f"{place}: the codec knows no union but T | None")
    # A value that is none is left out; a null in the text would be a second way to say the same.
    return _decode(others[0], value, place, bounds)


def _literal(allowed: tuple[object, ...], value: object, place: str) -> object:
    if isinstance(value, str) and value in allowed:
        return value
    raise _Wrong(place, f"{_show(value)} is not one of {', '.join(map(str, allowed))}")


def _tuple(kinds: tuple[Any, ...], value: object, place: str, bounds: Bounds) -> tuple[object, ...]:
    if len(kinds) != 2 or kinds[1] is not Ellipsis:
        raise TypeError(f"{place}: the codec knows no tuple but tuple[T, ...]")
    if not isinstance(value, list):
        raise _Wrong(place, f"{_show(value)} is not a list")
    _within(bounds, len(value), value, place, "a list with a length")
    return tuple(_decode(kinds[0], member, f"{place}[{index}]", None) for index, member in enumerate(value))


def _mapping(kinds: tuple[Any, ...], value: object, place: str, bounds: Bounds) -> dict[str, object]:
    if kinds[0] is not str:
        raise TypeError(f"{place}: the codec knows no mapping but Mapping[str, T]")
    if not isinstance(value, dict):
        raise _Wrong(place, f"{_show(value)} is not an object")
    _within(bounds, len(value), value, place, "an object with a length")
    return {name: _decode(kinds[1], member, f"{place}.{name[:_SHOWN]}", None) for name, member in value.items()}


def _base64(text: str, place: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise _Wrong(place, f"{_show(text)} is not base64") from error


def _within(bounds: Bounds, measure: int, value: object, place: str, what: str) -> object:
    if bounds.low <= measure <= bounds.high:
        return value
    raise _Wrong(place, f"{measure} is not {what} from {bounds.low} to {bounds.high}")


def _show(value: object) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
