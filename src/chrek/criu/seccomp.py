"""Seccomp filters in the images: every thread must come back under all filters that PID 1 has.

CRIU's ``seccomp.img`` holds the programs, each with the number of the one installed before it, and each thread
names the last of its chain. The kernel asks all filters of a chain and takes the strictest answer (seccomp(2)), so
a chain that contains every program of PID 1's is at least as strict as PID 1; what more it has (the init's own
filter, the application's sandbox) does no harm. Programs are compared byte by byte: whether one program is as
strict as another cannot be told.

Runtimes build a profile's program from the profile *and the container's capabilities* (containerd's RuntimeDefault
allows ``mount`` where CAP_SYS_ADMIN is held), so containers of one image with different capabilities have different
programs. That is refused like any other difference. Where the user allows it, PID 1's programs are put beneath the
chains that lack them: as if the runtime had installed them first, which only ever forbids more.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from chrek.criu.capabilities import exceeded
from chrek.criu.images import COMMON_MAGIC, Image, read_all
from chrek.criu.messages import Seccomp, SeccompFilter
from chrek.errors import Reason, Refused
from chrek.system.filters import INSTRUCTION, seccomp_filters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chrek.criu.messages import Core
    from chrek.system.ids import HostPid
    from chrek.system.procfs import Status

IMAGE = "seccomp.img"
_MAGIC = 0x64413049
"""SECCOMP_MAGIC of ``criu/include/magic.h``."""
_DISABLED, _FILTER = 0, 2
_LONGEST = 4096 * INSTRUCTION
"""BPF_MAXINSNS."""

CURE = (
    "Give both containers the same seccomp profile and the same capabilities, from which runtimes make the filter; or"
    " allow PRIVILEGE_EXCEEDED, which puts this container's filters on the restored processes as well."
)


class Filters:
    """The filters of the images, and those of PID 1 that every thread must have.

    Attributes:
        warnings: what could not be compared.
    """

    def __init__(self, directory: int, needed: int, programs: Sequence[bytes] | None) -> None:
        self._directory = directory
        self._needed = needed
        self._programs = programs or ()
        self._filters = _read(directory)
        self._added = -1
        self.warnings: list[str] = []

    @classmethod
    def of(cls, directory: int, pid1: HostPid, limit: Status) -> Filters:
        """Return the filters of the images and of PID 1; where the kernel does not show its programs, their number counts."""
        needed = limit.seccomp_filters if limit.seccomp == _FILTER else 0
        try:
            return cls(directory, needed, seccomp_filters(pid1) if needed else ())
        except OSError as error:
            found = cls(directory, needed, None)
            words = f"PID 1's {needed} seccomp filters could only be counted, not compared: {error.strerror or error}"
            found.warnings.append(words)
            return found

    def check(self, process: int, core: Core) -> None:
        """Check one thread.

        Raises:
            Refused: ``PRIVILEGE_EXCEEDED``, it lacks a filter of PID 1's; ``CORRUPT``, its chain is none.
        """
        chain = self._chain(process, core)
        if len(chain) < self._needed:
            raise exceeded(process, f"{len(chain)} seccomp filters", f"{self._needed}", cure=CURE)
        missing = len(self._missing(chain))
        if missing:
            raise exceeded(process, f"{len(chain)} seccomp filters", f"{missing} that are not among them", cure=CURE)

    def add(self, process: int, core: Core) -> bool:
        """Put PID 1's filters beneath those of a thread that lacks one; return whether that was needed.

        Raises:
            Refused: ``CORRUPT``, its chain is none.
        """
        chain = self._chain(process, core)
        if not self._missing(chain):
            return False
        assert core.thread is not None
        if chain:
            base = self._base()
            self._filters[chain[-1]].previous = base
        else:
            core.thread.seccomp_mode, core.thread.seccomp_filter = _FILTER, self._base()
        return True

    def write(self) -> None:
        """Write the image anew, if filters were added."""
        if self._added >= 0:
            magic = struct.pack("<II", COMMON_MAGIC, _MAGIC)
            image: Image[Seccomp] = Image(IMAGE, magic, [Seccomp(self._filters).encode()])
            image.write(self._directory)

    def _base(self) -> int:
        """Return the number of the last of PID 1's filters, which are appended to the image's."""
        if self._added < 0:
            for number, program in enumerate(self._programs):
                self._filters.append(
                    SeccompFilter(program=program, previous=len(self._filters) - 1 if number else None)
                )
            self._added = len(self._filters) - 1
        return self._added

    def _missing(self, chain: list[int]) -> list[bytes]:
        have = {bytes(self._filters[number].program) for number in chain}
        return [program for program in self._programs if program not in have]

    def _chain(self, process: int, core: Core) -> list[int]:
        """Return the numbers of a thread's filters, the last installed first."""
        assert core.thread is not None
        if core.task is not None and (
            core.task.old_seccomp_mode is not None or core.task.old_seccomp_filter is not None
        ):
            # Old images had it there. CRIU lets it win over the thread's own, and no capture of ours writes it.
            raise Refused(Reason.CORRUPT, f"Process {process} has its seccomp mode in an outdated place.")
        found: list[int] = []
        position = core.thread.seccomp_filter if core.thread.seccomp_mode == _FILTER else None
        while position is not None:
            # In a circle CRIU would go on for ever.
            if position >= len(self._filters) or len(found) > len(self._filters):
                raise Refused(Reason.CORRUPT, f"images/{IMAGE}: the filters of process {process} have no first one.")
            size = len(self._filters[position].program)
            if not 0 < size <= _LONGEST or size % INSTRUCTION:
                raise Refused(
                    Reason.CORRUPT, f"images/{IMAGE}: filter {position} has {size} bytes, which is no program."
                )
            found.append(position)
            position = self._filters[position].previous
        return found


def _read(directory: int) -> list[SeccompFilter]:
    """Return the filters of the image's first entry, which is the only one that CRIU reads."""
    if IMAGE not in os.listdir(directory):
        return []
    return [entry for image in read_all(directory, IMAGE, Seccomp)[:1] for entry in image.filters]
