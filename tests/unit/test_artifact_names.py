"""Ids, paths and times that come from outside."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrek.artifact import checkpoint_id, timestamp, unix_time
from chrek.artifact.names import check_file_path
from chrek.errors import Reason, UsageError


@pytest.mark.parametrize("text", ["a", "0", "abc123def456", "A-b_c.d", "a" * 63, "a..b"])
def test_ids_of_the_contracts_form_are_taken(text: str) -> None:
    """An id is what the contract's pattern says."""
    assert checkpoint_id(text) == text


@pytest.mark.parametrize(
    "text", ["", ".", "..", ".hidden", "-a", "_a", "a/b", "../a", "a\0", "a\n", "ä", "٣", "a" * 64, "a b", "/a"]
)
def test_everything_else_is_no_id(text: str) -> None:
    """Nothing that could become another path passes."""
    with pytest.raises(UsageError) as caught:
        checkpoint_id(text)
    assert caught.value.reason is Reason.BAD_ID


@pytest.mark.parametrize("path", ["a", "images/core-1.img", "a/b/c", "..a", "a..", "x=y,z@h:1+2", "/".join("a" * 16)])
def test_plain_relative_paths_are_taken(path: str) -> None:
    """Files of a checkpoint have plain names."""
    check_file_path(path)


@pytest.mark.parametrize(
    "path",
    ["", "/", "/etc/passwd", "..", "a/..", "../a", "a/../b", ".", "a/./b", "a//b", "a/", "a\0b", "a\nb", "a b", "ä",
     "\udcff", "a\\b", "a" * 256, "/".join("a" * 17), "/".join(["a" * 200] * 6)],
)  # fmt: skip
def test_paths_that_leave_or_have_two_spellings_are_refused(path: str) -> None:
    """No absolute path, no dots, no empty component, no character outside the set, not too long or deep."""
    with pytest.raises(ValueError, match="path"):
        check_file_path(path)


@given(st.integers(0, 4_000_000_000_000))
def test_times_survive_to_the_millisecond(milliseconds: int) -> None:
    """A time written is the time read."""
    assert round(unix_time(timestamp(milliseconds / 1000)) * 1000) == milliseconds


@pytest.mark.parametrize(
    "text", ["", "2026-01-31", "2026-01-31T12:00:00", "2026-01-31T12:00:00+00:00", "2026-02-31T12:00:00Z", "x" * 99]
)
def test_times_without_the_one_form_are_refused(text: str) -> None:
    """Only RFC 3339 in UTC with a Z is a time."""
    with pytest.raises(ValueError, match=r"time|day"):
        unix_time(text)
