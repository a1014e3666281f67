"""JSON as checkpoints use it: read strictly, bounded, and written one way only.

The standard library's reader accepts more than a checkpoint may hold: repeated names (the last one
wins, so two readers may see two documents), ``NaN``, numbers that overflow to infinity, and any number
of values. Whoever can write to a store could use that to exhaust the memory of whoever lists it. So
the text is bounded before it is parsed: its length, its nesting, and the number of values, counted
cheaply from its separators (a comma inside a string counts too: the bound is generous enough).
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Final, NoReturn

from chrek.errors import Reason, Refused

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BYTES: Final = 32 << 20
"""Longest document read. The digests of 1 TB in blocks of 4 MiB take 11 MB."""

MAX_DEPTH: Final = 32
"""Deepest nesting read. A manifest needs 6 levels."""

MAX_VALUES: Final = 1_000_000
"""Most values read; each costs Python up to about 100 bytes."""

MAX_INTEGER: Final = 2**63
_MAX_DIGITS: Final = 20

# Possessive, and a string that never ends is matched up to the end: otherwise each of its escaped quotes would be
# tried as a beginning, which takes hours for a hostile megabyte.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[{\]}]")


def parse(text: bytes, *, document: str) -> object:
    """Parse one JSON document in UTF-8.

    *document* names it in errors.

    Raises:
        Refused: ``CORRUPT`` when it is not JSON, or not JSON that a checkpoint may hold.
    """
    try:
        _check_bounds(text)
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise Refused(Reason.CORRUPT, f"{document} cannot be read: {error}.") from error


def render(value: Mapping[str, object]) -> bytes:
    """Return the one text that this project writes for *value*; keys stay in their order."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode("ascii")


def _check_bounds(text: bytes) -> None:
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text)} bytes, more than {MAX_BYTES}")
    values = sum(text.count(mark) for mark in (b",", b"[", b"{", b"]", b"}"))
    if values > MAX_VALUES:
        raise ValueError(f"it has about {values} values, more than {MAX_VALUES}")
    depth = deepest = 0
    for mark in _BRACKET.finditer(_STRING.sub(b"", text)):
        depth += 1 if mark[0] in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ValueError(f"it is nested {deepest} deep, more than {MAX_DEPTH}")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice[:80]!r} occurs twice in one object")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS or not -MAX_INTEGER <= int(digits) < MAX_INTEGER:
        raise ValueError(f"the integer {digits[:40]} is out of range")
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:40]} is out of range")
    return number


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")
