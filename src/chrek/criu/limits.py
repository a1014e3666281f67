"""How CRIU may read the limits of another user's processes without CAP_SYS_RESOURCE.

A dump asks for every limit of every process: ``dump_task_rlimits`` of ``criu/cr-dump.c`` calls prlimit64(2). The
kernel (``check_prlimit_permission`` of ``kernel/sys.c``) lets it if the caller has CAP_SYS_RESOURCE in the process's
user namespace, or if the caller's *real* user and group ids are the real, effective and saved ones of the process.
It does not look at the caller's effective ids. So where that capability is missing, as in some virtual machines and
nested containers, CRIU is started with the application's real ids; its effective and saved ids stay root's, and with
them its capabilities. A restore needs nothing of that: there each process sets its own limits.

An application whose processes have several users cannot be dumped this way: there is one real id for all. It is refused.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chrek.errors import Reason, Refused
from chrek.system import procfs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chrek.system.ids import HostPid

_SYS_RESOURCE = 24


def reading_ids(processes: Iterable[HostPid]) -> tuple[int, int] | None:
    """Return the real user and group id with which the limits of all these can be read, None if root's do.

    Raises:
        Refused: ``NOT_SUPPORTED_HERE``; they belong to several users.
    """
    own = procfs.status(os.getpid())
    if own is None or own.capabilities["CapEff"] >> _SYS_RESOURCE & 1:
        return None
    states = [state for pid in processes if (state := procfs.status(pid)) is not None]
    users = {uid for state in states for uid in state.uids[:3]}
    groups = {gid for state in states for gid in state.gids[:3]}
    if not states:
        return None
    if len(users) > 1 or len(groups) > 1:
        listed = f"users {sorted(users)} and groups {sorted(groups)}"
        message = f"The application's processes belong to {listed}; without CAP_SYS_RESOURCE CRIU can dump those of one only."
        cure = "Give the capturing program CAP_SYS_RESOURCE, which root on an ordinary machine has, or run all of it as one user."
        raise Refused(Reason.NOT_SUPPORTED_HERE, message, cure=cure)
    found = users.pop(), groups.pop()
    return None if found == (0, 0) else found
