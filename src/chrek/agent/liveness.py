"""Whether an application may stand still for as long as a capture takes: its liveness probe decides.

The kubelet kills what does not answer, frozen or not. How long a freeze will be is estimated from the memory
that is to be copied.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from chrek.errors import Reason, Refused
from chrek.system import initstate, procfs
from chrek.system.ids import HostPid

RATE: Final = 0.8e9
"""Bytes a second, cautious: a plain dump to a disk. A lazy one to tmpfs moved 10 to 16 GB/s on 16 cores."""
FIXED: Final = 0.3
"""Seconds for the rest: a tree of three processes stood still for 0.1 s on 2 cores."""


def predicted_freeze(pid1: HostPid) -> float:
    """Return an upper estimate of the seconds that the application of *pid1* will stand still.

    Raises:
        Refused: APP_NOT_FOUND or APP_IS_PID1.
    """
    found = [procfs.status(pid) for pid in procfs.tree(initstate.application(pid1))]
    return FIXED + sum(status.resident for status in found if status) / RATE


def check(pid1: HostPid, patience: float | None, *, allow: Collection[Reason]) -> None:
    """Refuse a capture that the liveness probe would not bear; *patience* is the probe's, in seconds.

    Raises:
        Refused: LIVENESS_TOO_TIGHT.
    """
    if patience is None or Reason.LIVENESS_TOO_TIGHT in allow:
        return
    freeze = predicted_freeze(pid1)
    if freeze > patience:
        message = (
            f"The application will stand still for about {freeze:.1f} s; its liveness probe bears {patience:.0f} s."
        )
        raise Refused(Reason.LIVENESS_TOO_TIGHT, message)
