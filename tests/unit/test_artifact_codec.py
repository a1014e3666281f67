"""Dataclasses to JSON and back, strictly by their type hints."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NewType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrek.artifact import strictjson
from chrek.artifact.codec import Bounds, decode, encode, open_section
from chrek.errors import Reason, Refused

Number = NewType("Number", int)


@dataclass(frozen=True)
class Inner:
    name: str
    number: Number = Number(0)


@open_section
@dataclass(frozen=True)
class Loose:
    text: str = ""


@dataclass(frozen=True)
class Outer:
    inner: Inner
    flag: bool
    ratio: float
    raw: bytes = b""
    kind: Literal["a", "b"] = "a"
    maybe: Inner | None = None
    words: tuple[str, ...] = ()
    table: Mapping[str, Inner] = field(default_factory=dict)
    narrow: Annotated[int, Bounds(-1, 10)] = 0
    loose: Loose = Loose()

    def __post_init__(self) -> None:
        if self.narrow == 7:
            raise ValueError("seven is not allowed")


# The low surrogates are bytes of file names that are not UTF-8.
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF))
_INNERS = st.builds(Inner, _TEXTS, st.integers(0, 2**63 - 1).map(Number))
_OUTERS = st.builds(
    Outer,
    _INNERS,
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.binary(),
    st.sampled_from(["a", "b"]),
    st.none() | _INNERS,
    st.lists(_TEXTS).map(tuple),
    st.dictionaries(_TEXTS, _INNERS),
    st.integers(-1, 10).filter(lambda number: number != 7),
)
_SMALLEST: dict[str, Any] = {"inner": {"name": "n"}, "flag": True, "ratio": 1}


@given(_OUTERS)
def test_every_value_comes_back_equal(value: Outer) -> None:
    """Encoding, writing, reading and decoding gives the same value."""
    text = strictjson.render(encode(value))
    assert decode(Outer, strictjson.parse(text, document="x"), document="x") == value


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_arbitrary_json_is_decoded_or_refused(value: object) -> None:
    """No JSON value, whatever its shape, makes the decoder fail in any other way than by refusing."""
    with contextlib.suppress(Refused):
        decode(Outer, value, document="x")


@given(_OUTERS, st.data())
def test_one_member_of_another_type_is_refused_or_still_valid(value: Outer, data: st.DataObject) -> None:
    """A document in which one member was replaced by something else never crashes the decoder."""
    members = encode(value)
    name = data.draw(st.sampled_from(sorted(members)))
    members[name] = data.draw(st.none() | st.integers() | st.text() | st.lists(st.integers()) | st.just({"x": 1}))
    with contextlib.suppress(Refused):
        assert isinstance(decode(Outer, members, document="x"), Outer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inner": {"name": 3}}, "inner.name: 3 is not a string"),
        ({"inner": []}, "inner: a list is not an object"),
        ({"inner": {"name": "n", "number": -1}}, "inner.number: -1 is not an integer from 0 to"),
        ({"inner": {"name": "n", "number": True}}, "inner.number: True is not an integer"),
        ({"inner": {}}, "inner: the key 'name' is missing"),
        ({"flag": 1}, "flag: 1 is not true or false"),
        ({"ratio": "1"}, "ratio: '1' is not a number"),
        ({"ratio": float("inf")}, "ratio: inf is not a finite number"),
        ({"raw": "!!!"}, "raw: '!!!' is not base64"),
        ({"raw": "Zg"}, "raw: 'Zg' is not base64"),
        ({"kind": "c"}, "kind: 'c' is not one of a, b"),
        ({"maybe": None}, "maybe: None is not an object"),
        ({"words": ["a", 1]}, "words[1]: 1 is not a string"),
        ({"words": "ab"}, "words: 'ab' is not a list"),
        ({"table": {"k": {"name": "n", "x": 1}}}, "table.k: the key 'x' is not known; allowed are name, number"),
        ({"narrow": 11}, "narrow: 11 is not an integer from -1 to 10"),
        ({"narrow": 7}, "the document: seven is not allowed"),
        ({"other": 1}, "the document: the key 'other' is not known"),
        ({"inner": {"name": "n" * 300_000}}, "inner.name: 300000 is not a string with a length from 0 to"),
        ({"words": [""] * 200_001}, "words: 200001 is not a list with a length"),
    ],
)
def test_an_error_names_the_place_the_value_and_what_is_allowed(change: dict[str, Any], words: str) -> None:
    """Each kind of wrong member is named by its path in the document."""
    with pytest.raises(Refused) as caught:
        decode(Outer, _SMALLEST | change, document="manifest.json")
    assert caught.value.reason is Reason.CORRUPT
    assert caught.value.message.startswith("manifest.json: ")
    assert words in caught.value.message


def test_unknown_keys_are_ignored_in_open_sections_only() -> None:
    """A newer writer may add keys where a section only informs."""
    assert decode(Outer, _SMALLEST | {"loose": {"text": "t", "new": {}}}, document="x").loose == Loose("t")


def test_messages_stay_short_whatever_the_value() -> None:
    """A hostile value does not fill the log."""
    with pytest.raises(Refused) as caught:
        decode(Outer, _SMALLEST | {"kind": "x" * 100_000, "flag": True}, document="x")
    assert len(caught.value.message) < 300
