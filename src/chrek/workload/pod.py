"""The environment of the container this process is in now.

A restored process carries the environment it was checkpointed with. What the new container was given
stands in that of its PID 1.
"""

from __future__ import annotations

import os
from typing import Dict, Optional  # noqa: UP035 - Python 3.9


def environment() -> Optional[Dict[str, str]]:  # noqa: UP006, UP045 - Python 3.9
    """Return the environment of PID 1, or None where it may not be read (another user's, or no /proc)."""
    try:
        with open("/proc/1/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return None
    pairs = (os.fsdecode(entry).partition("=") for entry in reversed(entries))
    return {name: value for name, equals, value in pairs if equals}
