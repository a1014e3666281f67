"""Which format this process writes: the newest, or an older one for readers that know no newer.

An image keeps the bundle that it was built with, and a pod of it that restores itself reads with that bundle, however new
the agent is that captures. So the init says which format its bundle reads, and the agent has its worker write no newer
one, by this variable. Every format is read, whatever is written.

The formats differ in how blocks of bulk data are digested: 1 knows SHA-256 alone, and no name for it.
"""

from __future__ import annotations

import os
from typing import Final

from chrek.errors import Reason, UsageError
from chrek.system.initpublish import READS_FORMAT

FORMAT_VERSION: Final = READS_FORMAT
"""The newest format, and the newest that is read."""
VARIABLE: Final = "CHREK_WRITE_FORMAT"


def _asked() -> int:
    value = os.environ.get(VARIABLE, str(FORMAT_VERSION))
    if value not in map(str, range(1, FORMAT_VERSION + 1)):
        message = f"{VARIABLE} is {value[:80]!r}."
        raise UsageError(
            Reason.BAD_VALUE, message, cure=f"Set it to a format from 1 to {FORMAT_VERSION}, or not at all."
        )
    return int(value)


WRITTEN: Final = _asked()
"""What this process writes."""
