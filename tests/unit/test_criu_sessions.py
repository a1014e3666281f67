"""Sessions whose leader is gone get a new one in the images."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrek.criu.images import COMMON_MAGIC, Image, read_all
from chrek.criu.messages import PstreeEntry
from chrek.criu.sessions import adopt_leaderless_sessions, new_leaders


def entry(pid: int, ppid: int, pgid: int, sid: int) -> PstreeEntry:
    """Return a process."""
    return PstreeEntry(pid=pid, ppid=ppid, pgid=pgid, sid=sid, threads=[pid])


def rows(entries: list[PstreeEntry]) -> list[tuple[int, int, int, int]]:
    """Return (process, parent, group, session) of each."""
    return [(each.pid, each.ppid, each.pgid, each.sid) for each in entries]


def test_sessions_with_leaders_stay() -> None:
    """Where every session has its leader, and where the tree has the session of somebody outside, nothing changes."""
    entries = [entry(10, 1, 10, 10), entry(11, 10, 11, 11), entry(12, 11, 11, 11), entry(13, 10, 10, 10)]
    before = rows(entries)
    assert new_leaders(entries) == []
    assert rows(entries) == before


def test_session_of_nobody() -> None:
    """A session of outside (number 0) has no leader to find and stays."""
    entries = [entry(10, 1, 0, 0), entry(11, 10, 11, 0)]
    assert new_leaders(entries) == []


def test_daemon() -> None:
    """A daemon whose session leader ended becomes the leader of its session and group; its place in the tree stays."""
    entries = [entry(10, 1, 10, 10), entry(21, 10, 20, 20)]
    assert new_leaders(entries) == [21]
    assert rows(entries) == [(10, 1, 10, 10), (21, 10, 21, 21)]


def test_children_follow() -> None:
    """Children of the daemon in the same session follow it, in its group, or in one that a living process leads."""
    entries = [
        entry(10, 1, 10, 10),
        entry(21, 10, 20, 20),
        entry(22, 21, 20, 20),
        entry(23, 21, 23, 20),
        entry(24, 23, 23, 20),
        entry(25, 22, 19, 20),
    ]
    assert new_leaders(entries) == [21]
    assert rows(entries)[2:] == [(22, 21, 21, 21), (23, 21, 23, 21), (24, 23, 23, 21), (25, 22, 21, 21)]


def test_two_orphans_of_one_session() -> None:
    """Two processes of a leaderless session that are no kin have a session each."""
    entries = [entry(10, 1, 10, 10), entry(21, 10, 20, 20), entry(22, 10, 20, 20)]
    assert new_leaders(entries) == [21, 22]
    assert rows(entries)[1:] == [(21, 10, 21, 21), (22, 10, 22, 22)]


def test_a_child_of_another_session_between() -> None:
    """A process below one of another session does not follow the daemon: it has a session of its own."""
    entries = [entry(10, 1, 10, 10), entry(21, 10, 20, 20), entry(22, 21, 22, 22), entry(23, 22, 20, 20)]
    assert new_leaders(entries) == [21, 23]
    assert rows(entries)[2:] == [(22, 21, 22, 22), (23, 22, 23, 23)]


def test_the_image_is_rewritten_only_when_needed(tmp_path: Path) -> None:
    """The image holds the new sessions and everything else it held; without daemons it is not touched."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    later = b"\x98\x06\x07"  # a field of a later CRIU
    daemon = entry(21, 10, 20, 20)
    daemon.unknown = later
    entries = [entry(10, 1, 10, 10).encode(), daemon.encode()]
    Image("pstree.img", struct.pack("<II", COMMON_MAGIC, 7), entries).write(fd)
    assert adopt_leaderless_sessions(fd) == [21]
    found = read_all(fd, "pstree.img", PstreeEntry)
    assert rows(found) == [(10, 1, 10, 10), (21, 10, 21, 21)]
    assert found[1].unknown == later
    before = (tmp_path / "pstree.img").stat().st_mtime_ns
    assert adopt_leaderless_sessions(fd) == []
    assert (tmp_path / "pstree.img").stat().st_mtime_ns == before
    os.close(fd)


@given(st.data())
def test_any_tree(data: st.DataObject) -> None:
    """Afterwards every session is led by a process of the tree, as is every group that was changed, in that session."""
    entries: list[PstreeEntry] = []
    for number in range(data.draw(st.integers(1, 8))):
        parent = data.draw(st.sampled_from(entries)) if entries else None
        pid = 10 + number
        # What the kernel allows: the parent's session or, after setsid or a leader's end, one of its own.
        old = parent.sid if parent else pid
        sid = data.draw(st.sampled_from([old, pid, 100, 101]))
        kin = [each.pgid for each in entries if each.sid == sid]
        pgid = pid if sid == pid else data.draw(st.sampled_from([pid, sid, *kin]))
        entries.append(entry(pid, parent.pid if parent else 1, pgid, sid))
    before = {each.pid: (each.ppid, each.pgid, each.sid) for each in entries}
    leaders = new_leaders(entries)
    by_pid = {each.pid: each for each in entries}
    for each in entries:
        assert each.sid in by_pid
        assert by_pid[each.sid].sid == each.sid
        assert by_pid[each.sid].pgid == each.sid
        assert each.ppid == before[each.pid][0]
        if before[each.pid][2] < 100:
            assert (each.pgid, each.sid) == before[each.pid][1:]
        elif each.pgid != before[each.pid][1]:
            assert by_pid[each.pgid].sid == each.sid
    assert leaders == [each.pid for each in entries if each.sid == each.pid != before[each.pid][2]]


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1]])
def test_numbers_do_not_matter(order: list[int]) -> None:
    """Process numbers that have wrapped around change nothing: parents come before children."""
    pids = [30000, 5, 17]
    entries = [entry(pids[0], 1, 99, 99), entry(pids[order[1]], pids[0], 99, 99)]
    assert new_leaders(entries) == [30000]
    assert {each.sid for each in entries} == {30000}
