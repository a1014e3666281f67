"""JSON is read strictly and within bounds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrek.artifact import strictjson
from chrek.errors import Reason, Refused

_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | _FLOATS
# The low surrogates are bytes of file names that are not UTF-8.
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF))
_VALUES: st.SearchStrategy[Any] = st.recursive(
    _SCALARS | _TEXTS, lambda inner: st.lists(inner) | st.dictionaries(_TEXTS, inner), max_leaves=20
)


@given(st.dictionaries(_TEXTS, _VALUES))
def test_what_is_rendered_is_read_back(value: dict[str, object]) -> None:
    """Any object of JSON values survives the way to text and back."""
    assert strictjson.parse(strictjson.render(value), document="x") == value


@pytest.mark.timeout(60)  # what took quadratic time would take hours
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": NaN}', "NaN is not allowed"),
        (b'{"a": -Infinity}', "-Infinity is not allowed"),
        (b'{"a": 1e999}', "1e999 is out of range"),
        (b'{"a": 9223372036854775808}', "out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "out of range"),
        (b"[" * 40 + b"]" * 40, "nested 40 deep"),
        (b"[" * 200_000, "nested 200000 deep"),
        (b"[" + b"0," * 1_100_000 + b"0]", "values"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"]" * 30_000_000, "values"),
        (b'{"a": "' + b'\\"' * 10_000_000, "Unterminated string"),
        (b'{"a": "' + b'\\"' * 10_000_000 + b"\\", "Unterminated string"),
        (b'"' * 30_000_000, "Extra data"),
        (b"", "Expecting value"),
        (b"{}x", "Extra data"),
        (b"\xef\xbb\xbf{}", "BOM"),
    ],
)
def test_what_a_checkpoint_may_not_hold_is_refused(text: bytes, words: str) -> None:
    """Each kind of bad text is refused as corrupt, in words; an enormous one within the test's time limit."""
    with pytest.raises(Refused) as caught:
        strictjson.parse(text, document="manifest.json")
    assert caught.value.reason is Reason.CORRUPT
    assert words in caught.value.message


def test_an_enormous_document_is_refused_by_its_length() -> None:
    """More bytes than the bound are never parsed."""
    with pytest.raises(Refused, match="bytes, more than"):
        strictjson.parse(b" " * (strictjson.MAX_BYTES + 1), document="x")


def test_brackets_in_strings_do_not_count_as_nesting() -> None:
    """A string full of brackets and quotes is a string."""
    value = {"a": '[{"' * 100}
    assert strictjson.parse(strictjson.render(value), document="x") == value
