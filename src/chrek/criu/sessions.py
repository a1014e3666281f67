"""Daemons in the images: processes of a session whose leader is gone.

CRIU brings such a process back as the child of a helper that leads the session and then ends. It takes
for granted that the orphan then falls to the root of the tree, which is so only when that root is PID 1
of its namespace; ours would lose it to the container's init, and a later capture would miss it. So the
topmost process of such a session is made the session's new leader in the images: it keeps its place in the tree,
and what changes is the number of a session and of a process group that nobody led any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chrek.criu.images import Image
from chrek.criu.messages import PstreeEntry

if TYPE_CHECKING:
    from collections.abc import Mapping


def adopt_leaderless_sessions(directory: int) -> list[int]:
    """Rewrite ``pstree.img`` so; return the processes that became leaders.

    Raises:
        Refused: ``CORRUPT``.
        OSError: the image cannot be written.
    """
    image: Image[PstreeEntry] = Image.read(directory, "pstree.img")
    entries = list(image.decode(PstreeEntry))
    leaders = new_leaders(entries)
    if leaders:
        image.entries = [entry.encode() for entry in entries]
        image.write(directory)
    return leaders


def new_leaders(entries: list[PstreeEntry]) -> list[int]:
    """Give processes of leaderless sessions new ones, in place; parents come before their children."""
    by_pid = {entry.pid: entry for entry in entries}
    lost = {entry.sid for entry in entries if entry.sid and entry.sid not in by_pid}
    moved: dict[int, int] = {}  # process -> the session it had
    leaders = []
    for entry in entries:
        if entry.sid not in lost:
            continue
        session = entry.sid
        parent = by_pid.get(entry.ppid)
        if parent is not None and moved.get(parent.pid) == session:
            entry.sid = parent.sid
            entry.pgid = _group(entry, parent, by_pid)
        else:
            entry.sid = entry.pgid = entry.pid
            leaders.append(entry.pid)
        moved[entry.pid] = session
    return leaders


def _group(entry: PstreeEntry, parent: PstreeEntry, by_pid: Mapping[int, PstreeEntry]) -> int:
    """Return the process group in the new session: one that is led by a living process of it, else the parent's."""
    leader = by_pid.get(entry.pgid)
    return entry.pgid if leader is not None and leader.sid in (parent.sid, entry.sid) else parent.pgid
