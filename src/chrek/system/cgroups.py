"""Control groups, version 1 and 2: where a process is, and putting another one there.

A process is in one group of each hierarchy. On a version 1 host there are many hierarchies, on a
version 2 host one; on a hybrid host both. Everything here treats all of them alike.
Source: cgroups(7).
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from chrek.system import mounts, procfs


@dataclass(frozen=True)
class Hierarchy:
    """A mounted hierarchy: the controllers it is known by (``""`` for version 2), where, and its root there."""

    controllers: str
    point: Path
    root: str


def hierarchies() -> list[Hierarchy]:
    """Return the mounted hierarchies, each once."""
    found: dict[str, Hierarchy] = {}
    for mount in mounts.mounts(os.getpid()):
        if mount.kind == "cgroup2":
            found.setdefault("", Hierarchy("", Path(mount.point), mount.root))
        elif mount.kind == "cgroup":
            for name in _names(mount.super_options):
                found.setdefault(name, Hierarchy(name, Path(mount.point), mount.root))
    return list(found.values())


def _names(options: tuple[str, ...]) -> list[str]:
    # rw, xattr and such stand among the controllers; /proc/PID/cgroup only ever names controllers.
    return [option for option in options if option not in {"rw", "ro", "xattr", "none"}]


def memberships(pid: int) -> dict[str, str]:
    """Map each controller (``""`` for version 2) to the path of *pid*'s group; empty when it is gone."""
    found = {}
    for line in procfs.lines(pid, "cgroup"):
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            found[name] = path
    return found


def directories(pid: int) -> list[Path]:
    """Return the directory of each group *pid* is in, as mounted here."""
    paths, found = memberships(pid), {}
    for hierarchy in hierarchies():
        path = paths.get(hierarchy.controllers)
        if path is None:
            continue
        relative = os.path.relpath(path, hierarchy.root) if hierarchy.root != "/" else path.lstrip("/")
        directory = hierarchy.point / relative
        with suppress(OSError):
            info = directory.stat()
            found[(info.st_dev, info.st_ino)] = directory
    return list(found.values())


def open_members(directory: Path) -> int:
    """Open the list of a group's processes for writing; writing ``0`` moves the writer in."""
    return os.open(directory / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)


def memory_limit(pid: int) -> int | None:
    """Return the lowest memory limit above *pid* in bytes, or None when there is none."""
    lowest: int | None = None
    for directory in directories(pid):
        for level in (directory, *directory.parents):
            for name in ("memory.max", "memory.limit_in_bytes"):
                with suppress(OSError, ValueError):
                    value = int((level / name).read_text())
                    # Version 1 writes "no limit" as the largest page-aligned number.
                    if value < 1 << 60 and (lowest is None or value < lowest):
                        lowest = value
    return lowest


def memory_used(pid: int) -> int:
    """Return the memory charged to *pid*'s own group in bytes; 0 where it is not counted."""
    for directory in directories(pid):
        for name in ("memory.current", "memory.usage_in_bytes"):
            with suppress(OSError, ValueError):
                return int((directory / name).read_text())
    return 0


class OwnGroup:
    """A fresh group in every hierarchy, for one program that must not be killed with somebody else.

    Entered as a context; removing waits for nobody: a group that still has members is left, and
    `leftovers` finds it later.
    """

    PARENT = "chrek"

    def __init__(self, name: str) -> None:
        self._name = name
        self._directories: list[Path] = []
        self._descriptors: list[int] = []

    def __enter__(self) -> Self:
        for hierarchy in hierarchies():
            directory = hierarchy.point / self.PARENT / self._name
            # A hierarchy without controllers, or a read-only one, has nothing that could kill a member.
            with suppress(OSError):
                directory.mkdir(parents=True, exist_ok=True)
                _inherit_cpuset(directory)
                self._descriptors.append(open_members(directory))
                self._directories.append(directory)
        return self

    @property
    def descriptors(self) -> list[int]:
        """Descriptors to write into, one for each hierarchy."""
        return self._descriptors

    def __exit__(self, *exception: object) -> None:
        for fd in self._descriptors:
            with suppress(OSError):
                os.close(fd)
        for directory in self._directories:
            with suppress(OSError):
                directory.rmdir()
            with suppress(OSError):
                directory.parent.rmdir()


def _inherit_cpuset(directory: Path) -> None:
    """Give a new version 1 cpuset its parent's processors and memory nodes: empty ones admit nobody."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        for level in (directory.parent, directory):
            file = level / name
            if file.exists() and not file.read_text().strip():
                file.write_text((level.parent / name).read_text())
