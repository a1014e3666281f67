"""Letters that arrive in the mailbox, and whatever else is written there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from chrek.entrypoint.letterbox import Letter, Letterbox
from chrek.errors import Reason


@pytest.fixture
def box() -> Iterator[Letterbox]:
    """Give an open mailbox."""
    letterbox = Letterbox()
    yield letterbox
    letterbox.close()


def test_letters_arrive_in_order(box: Letterbox) -> None:
    """Several letters of one read are all there, with their fields."""
    os.write(box.writing, b'{"kind": "claim", "token": "t", "by": "me"}\n{"kind": "ready", "token": "t", "root": 7}\n')
    letters, ended = box.read()
    assert letters == [Letter(kind="claim", token="t", by="me"), Letter(kind="ready", token="t", root=7)]
    assert not ended


def test_half_a_line_waits_for_the_rest(box: Letterbox) -> None:
    """A letter counts when its line has ended."""
    os.write(box.writing, b'{"kind": "alive", ')
    assert box.read() == ([], False)
    os.write(box.writing, b'"token": "t"}\n')
    assert box.read()[0] == [Letter(kind="alive", token="t")]


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"{", b"[]", b"null", b"\xff", b"[" * 3000, b'{"kind": "x", "token": "t"}', b'{"kind": "alive"}'),
        *(b'{"kind": "log", "token": "t", "data": 7}', b'{"kind": [], "token": "t"}', b'{"kind": "log", "token": 1}'),
    ],
)
def test_what_is_no_letter_is_skipped(box: Letterbox, line: bytes) -> None:
    """Anything else on a line is dropped, and the next letter is read."""
    os.write(box.writing, line + b'\n{"kind": "alive", "token": "t"}\n')
    assert box.read()[0] == [Letter(kind="alive", token="t")]


@pytest.mark.parametrize("root", [b"0", b"1", b"-5", b"true", b'"7"', b"1.5"])
def test_a_root_that_cannot_be_is_none(box: Letterbox, root: bytes) -> None:
    """Process 1 and everything that is no process id is not taken for a tree's root."""
    os.write(box.writing, b'{"kind": "ready", "token": "t", "root": ' + root + b"}\n")
    assert box.read()[0] == [Letter(kind="ready", token="t")]


def test_text_is_made_printable(box: Letterbox) -> None:
    """What a letter says goes to a log: control characters do not; an unknown reason becomes the general one."""
    os.write(box.writing, b'{"kind": "failed", "token": "t", "reason": "X", "message": "a\\u001b[1m\\nb"}\n')
    assert box.read()[0] == [Letter(kind="failed", token="t", reason=Reason.RESTORE_FAILED, message="a [1m b")]


def test_after_the_grant_the_last_writer_ends_it(box: Letterbox) -> None:
    """The end of the claimer is seen at once; before a claim nothing ends."""
    writer = os.open(f"/proc/self/fd/{box.writing}", os.O_WRONLY)
    assert box.read() == ([], False)
    box.grant()
    assert box.read() == ([], False)
    os.close(writer)
    assert box.read() == ([], True)
