"""What ``/proc/PID/mountinfo`` says."""

from __future__ import annotations

import re
from dataclasses import dataclass

from chrek.system import procfs

_OCTAL = re.compile(r"\\([0-7]{3})")


def unescape(text: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    return _OCTAL.sub(lambda match: chr(int(match.group(1), 8)), text)


@dataclass(frozen=True)
class Mount:
    """One mount, as proc(5) describes the line.

    Attributes:
        device: ``major:minor``.
        root: the directory of the file system that is mounted.
        point: where, seen from the process's root.
        options: per-mount options (``ro`` among them).
        super_options: options of the file system (``upperdir=`` among them).
    """

    id: int
    parent: int
    device: str
    root: str
    point: str
    options: tuple[str, ...]
    kind: str
    source: str
    super_options: tuple[str, ...]

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written through this mount."""
        return "ro" in self.options or "ro" in self.super_options


def parse(line: str) -> Mount:
    """Parse one line."""
    left, _, right = line.partition(" - ")
    number, parent, device, root, point, options, *_ = left.split(" ")
    kind, source, super_options, *_ = [*right.split(" "), "", ""]
    return Mount(
        id=int(number),
        parent=int(parent),
        device=device,
        root=unescape(root),
        point=unescape(point),
        options=tuple(options.split(",")),
        kind=kind,
        source=unescape(source),
        super_options=tuple(super_options.split(",")),
    )


def mounts(pid: int) -> list[Mount]:
    """Return the mounts of *pid*'s namespace, in the order they were made; empty when it is gone."""
    return [parse(line) for line in procfs.lines(pid, "mountinfo")]
