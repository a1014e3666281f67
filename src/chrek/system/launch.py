"""Start a program inside a container's namespaces from outside: the caller's side of `enter`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from chrek.system import enter

if TYPE_CHECKING:
    from chrek.system.ids import HostPid

NAMESPACES = ("ipc", "uts", "net", "pid", "mnt")
"""In the order they are entered: after the mount namespace our own /proc is gone."""


@dataclass(frozen=True)
class Spec:
    """What `enter` is to do. All descriptors must be open in the caller.

    Attributes:
        program: descriptor of the file to execute.
        arguments: its argument vector, ``argv[0]`` included.
        environment: its whole environment.
        keep: descriptors the program inherits, under the numbers they have.
        namespaces: descriptors of namespaces to enter, in order.
        control_groups: descriptors of ``cgroup.procs`` files to join, opened for writing.
        keep_free: PIDs up to this one stay free for others; 0 leaves them alone.
        drop: numbers of capabilities to remove from the program's bounding set.
        real_ids: real user and group id of the program, whose other ids stay ours; empty: ours.
        open_files: RLIMIT_NOFILE to ask for; what is not allowed is taken as far as it goes.
    """

    program: int
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    keep: list[int] = field(default_factory=list)
    namespaces: list[int] = field(default_factory=list)
    control_groups: list[int] = field(default_factory=list)
    keep_free: int = 0
    drop: list[int] = field(default_factory=list)
    real_ids: list[int] = field(default_factory=list)
    open_files: int = 1 << 20


def open_namespaces(pid: HostPid) -> list[int]:
    """Open the namespaces of *pid* that differ from ours, in the order they are to be entered.

    Raises:
        OSError: the process is gone or not ours to enter.
    """
    different = []
    for name in NAMESPACES:
        theirs, ours = Path(f"/proc/{pid}/ns/{name}"), Path(f"/proc/self/ns/{name}")
        if theirs.readlink() != ours.readlink():
            different.append(os.open(theirs, os.O_RDONLY | os.O_CLOEXEC))
    return different


def start(spec: Spec, *, stderr: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """Start *spec* in a fresh helper process and return the helper, which ends as the program does."""
    passed = {spec.program, *spec.keep, *spec.namespaces, *spec.control_groups}
    command = [sys.executable, "-I", "-S", enter.__file__, json.dumps(asdict(spec))]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, pass_fds=sorted(passed), close_fds=True
    )
