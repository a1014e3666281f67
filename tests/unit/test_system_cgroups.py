"""Where a process is in the control groups; nothing is made here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chrek.system import cgroups


def test_memberships() -> None:
    """A process is in one group of each hierarchy, as /proc says."""
    found = cgroups.memberships(os.getpid())
    text = Path("/proc/self/cgroup").read_text()
    assert found
    assert all(f"{path}\n" in text and path.startswith("/") for path in found.values())
    assert ("" in found) == ("0::/" in text)


def test_directories_have_this_process() -> None:
    """The directory of each group, as it is mounted here, lists this process."""
    found = cgroups.directories(os.getpid())
    if not found:
        pytest.skip("no control groups are mounted")
    for directory in found:
        assert str(os.getpid()) in (directory / "cgroup.procs").read_text().split()


def test_a_process_that_is_gone() -> None:
    """A process that is no more is in no group, and has no limit and no memory."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    assert cgroups.memberships(pid) == {}
    assert cgroups.directories(pid) == []
    assert cgroups.memory_limit(pid) is None
    assert cgroups.memory_used(pid) == 0


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("rw", "cpu", "cpuacct"), ["cpu", "cpuacct"]),
        (("rw", "xattr", "name=systemd"), ["name=systemd"]),
        (("ro", "none", "memory"), ["memory"]),
    ],
)
def test_controllers_of_version_1(options: tuple[str, ...], names: list[str]) -> None:
    """A hierarchy of version 1 is known by its controllers, or by its name."""
    assert cgroups._names(options) == names


def test_limit_and_use() -> None:
    """A limit is one that a file somewhere above this process gives, and what is used is below it."""
    limit, used = cgroups.memory_limit(os.getpid()), cgroups.memory_used(os.getpid())
    assert used >= 0
    assert limit is None or used <= limit < 1 << 60


def test_hierarchies_are_listed_once() -> None:
    """No two hierarchies have the same controllers, and each is mounted."""
    found = cgroups.hierarchies()
    assert len({each.controllers for each in found}) == len(found)
    assert all(each.point.is_dir() and each.root.startswith("/") for each in found)
