"""The init's end of the mailbox that `chrek.system.mailbox` describes."""

from __future__ import annotations

import binascii
import json
import os

from chrek.errors import Reason
from chrek.system.initpublish import LETTER_MAX, high
from chrek.system.record import record

KINDS = ("claim", "alive", "ready", "restored", "failed", "log")


@record
class Letter:
    """One letter; fields that its kind does not have are empty."""

    kind: str
    token: str
    by: str = ""
    root: int = 0
    reason: Reason = Reason.RESTORE_FAILED
    message: str = ""
    data: bytes = b""


class Letterbox:
    """A pipe whose write end others open through ``/proc``; until a claim is granted it stays open here."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.reading, self.writing = high(reading), high(writing)
        os.close(reading)
        os.close(writing)
        os.set_blocking(self.reading, False)
        self._buffer = b""
        self._granted = False

    def grant(self) -> None:
        """Close the own write end: from now on the pipe ends when its last writer does."""
        if not self._granted:
            os.close(self.writing)
            self._granted = True

    def close(self) -> None:
        """Take no letters any more: every write fails from now on."""
        if self.reading >= 0:
            os.close(self.reading)
            self.reading = -1
        self.grant()

    def read(self) -> tuple[list[Letter], bool]:
        """Return the letters that have come, and whether no further one can come."""
        ended = False
        while True:
            try:
                data = os.read(self.reading, 65536)
            except BlockingIOError:
                break
            if not data:
                ended = True
                break
            self._buffer += data
            if len(self._buffer) > 1 << 20:
                break
        *lines, self._buffer = self._buffer.split(b"\n")
        self._buffer = self._buffer[-LETTER_MAX:]
        letters = [_letter(line) for line in lines]
        return [letter for letter in letters if letter is not None], ended


def _letter(line: bytes) -> Letter | None:
    """Return the letter on a line, or None if it is none."""
    try:
        fields = json.loads(line)
        if fields["kind"] not in KINDS or not isinstance(fields["token"], str):
            return None
        root = fields.get("root", 0)
        reason = str(fields.get("reason", ""))
        return Letter(
            kind=fields["kind"],
            token=fields["token"],
            by=_printable(fields.get("by", "")),
            root=root if type(root) is int and root > 1 else 0,
            reason=Reason.__members__.get(reason, Reason.RESTORE_FAILED),
            message=_printable(fields.get("message", "")),
            data=binascii.a2b_base64(fields.get("data", "")),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _printable(text: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text))
