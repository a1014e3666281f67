"""Names that come from outside and become paths: checkpoint ids, paths inside a checkpoint, times.

Each is checked once, here, by one pattern that leaves no second spelling for the same thing: there is
nothing to normalise, so nothing can differ after normalisation.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Final

from chrek.errors import Reason, UsageError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_COMPONENT = re.compile(r"[A-Za-z0-9._+=,@:-]{1,255}", re.ASCII)
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,6})?Z", re.ASCII)

MAX_PATH: Final = 1024
MAX_DEPTH: Final = 16


def is_checkpoint_id(text: str) -> bool:
    """Whether *text* is an id of the form ``[A-Za-z0-9][A-Za-z0-9._-]{0,62}``."""
    return _ID.fullmatch(text) is not None


def checkpoint_id(text: str) -> str:
    """Return *text* if it is a checkpoint id.

    Raises:
        UsageError: ``BAD_ID``.
    """
    if not is_checkpoint_id(text):
        raise UsageError(Reason.BAD_ID, f"{text[:80]!r} is not a checkpoint id.")
    return text


def check_file_path(path: str) -> None:
    """Check a path inside a checkpoint.

    Raises:
        ValueError: it is absolute, leaves the checkpoint, or has a character that no file of ours has.
    """
    components = path.split("/")
    if len(path) > MAX_PATH or len(components) > MAX_DEPTH:
        raise ValueError(f"the path {path[:80]!r} is too long or too deep")
    for component in components:
        if component in {".", ".."} or _COMPONENT.fullmatch(component) is None:
            raise ValueError(f"{path[:80]!r} is not a relative path of plain names")


def timestamp(moment: float) -> str:
    """Return a Unix time in seconds as RFC 3339 text in UTC, to the millisecond."""
    text = dt.datetime.fromtimestamp(moment, dt.UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def unix_time(text: str) -> float:
    """Return the Unix time in seconds of a time that `timestamp` wrote.

    Raises:
        ValueError: it is not of that form, or no such time exists.
    """
    if _TIME.fullmatch(text) is None:
        raise ValueError(f"{text[:40]!r} is not a time like 2026-01-31T12:00:00.000Z")
    return dt.datetime.fromisoformat(text).timestamp()
