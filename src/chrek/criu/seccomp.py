"""Seccomp filters in the images: every thread must come back under all filters that PID 1 has.

CRIU's ``seccomp.img`` holds the programs, and each thread names the one to be installed first; a program's
``prev`` is the number of the next one. The kernel asks all filters of a chain and takes the strictest answer
(seccomp(2)), so a chain that contains every program of PID 1's is at least as strict as PID 1; what more it has (the
init's own filter, the application's sandbox) does no harm. Programs are the same if they mean the same (see
`chrek.system.bpf`): one profile does not always give the same bytes.

Where all threads of a process have the same chain, CRIU writes it for the first thread only and marks its filters:
installing one with that mark gives all filters so far to every thread of the process (SECCOMP_FILTER_FLAG_TSYNC).

Runtimes build a profile's program from the profile *and the container's capabilities* (containerd's RuntimeDefault
allows ``mount`` where CAP_SYS_ADMIN is held), so containers of one image with different capabilities have different
programs. That is refused like any other difference. Where the user allows it, PID 1's programs are put before the
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
from chrek.system.bpf import Meanings
from chrek.system.filters import INSTRUCTION, seccomp_filters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chrek.criu.messages import Core
    from chrek.system.ids import HostPid
    from chrek.system.procfs import Status

IMAGE = "seccomp.img"
_MAGIC = 0x64413049
"""SECCOMP_MAGIC of ``criu/include/magic.h``."""
_FILTER = 2
_TSYNC, _LOG, _SPEC_ALLOW = 1, 2, 4
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
        self._bases: dict[int | None, int] = {}
        self._meanings = Meanings()
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

    def check(self, process: int, core: Core, leader: Core | None = None) -> None:
        """Check one thread; *leader* is the first thread of its process, None for that one itself.

        Raises:
            Refused: ``PRIVILEGE_EXCEEDED``, it lacks a filter of PID 1's; ``CORRUPT``, its chain is none.
        """
        chain = self._chain(process, core, leader)
        if len(chain) < self._needed:
            raise exceeded(process, f"{len(chain)} seccomp filters", f"{self._needed}", cure=CURE)
        missing = len(self._missing(chain))
        if missing:
            raise exceeded(process, f"{len(chain)} seccomp filters", f"{missing} that are not among them", cure=CURE)

    def add(self, process: int, core: Core, leader: Core | None = None) -> bool:
        """Put PID 1's filters before those of a thread that lacks one; return whether that was needed.

        A thread that has those of its process gets PID 1's with them, when they are added to the first thread.

        Raises:
            Refused: ``CORRUPT``, its chain is none.
        """
        if not self._missing(self._chain(process, core, leader)) or (leader is not None and self._shared(process, leader)):
            return False
        assert core.thread is not None
        first = core.thread.seccomp_filter if core.thread.seccomp_mode == _FILTER else None
        core.thread.seccomp_mode, core.thread.seccomp_filter = _FILTER, self._base(first)
        return True

    def write(self) -> None:
        """Write the image anew, if filters were added."""
        if self._bases:
            magic = struct.pack("<II", COMMON_MAGIC, _MAGIC)
            image: Image[Seccomp] = Image(IMAGE, magic, [Seccomp(self._filters).encode()])
            image.write(self._directory)

    def _base(self, following: int | None) -> int:
        """Return the number of the first of PID 1's filters, appended to the image's, after which *following* comes."""
        if following not in self._bases:
            start, last = len(self._filters), len(self._programs) - 1
            for number, program in enumerate(self._programs):
                after = following if number == last else start + number + 1
                self._filters.append(SeccompFilter(program=program, previous=after))
            self._bases[following] = start
        return self._bases[following]

    def _missing(self, chain: list[int]) -> list[bytes]:
        have = {bytes(self._filters[number].program) for number in chain}
        missing = [program for program in self._programs if program not in have]
        if missing:
            forms = {self._meanings.of(program) for program in have}
            missing = [program for program in missing if self._meanings.of(program) not in forms]
        return missing

    def _chain(self, process: int, core: Core, leader: Core | None) -> list[int]:
        """Return the numbers of the filters that a thread will run under, in the order they are installed."""
        assert core.thread is not None
        own = self._own_chain(process, core)
        shared = self._shared(process, leader) if leader is not None else []
        if shared and core.thread.seccomp_mode:
            # The kernel would then give the chain to nobody, not even to the first thread, and CRIU go on.
            raise Refused(Reason.CORRUPT, f"Process {process} has seccomp filters beside those of its process.")
        return shared or own

    def _shared(self, process: int, leader: Core) -> list[int]:
        """Return the filters of a first thread that are given to all others."""
        chain = self._own_chain(process, leader)
        while chain and not (self._filters[chain[-1]].flags or 0) & _TSYNC:
            chain.pop()
        return chain

    def _own_chain(self, process: int, core: Core) -> list[int]:
        assert core.thread is not None
        if core.task is not None and (core.task.old_seccomp_mode is not None or core.task.old_seccomp_filter is not None):
            # Old images had it there. CRIU lets it win over the thread's own, and no capture of ours writes it.
            raise Refused(Reason.CORRUPT, f"Process {process} has its seccomp mode in an outdated place.")
        found: list[int] = []
        position = core.thread.seccomp_filter if core.thread.seccomp_mode == _FILTER else None
        while position is not None:
            # In a circle CRIU would go on for ever.
            if position >= len(self._filters) or len(found) > len(self._filters):
                raise Refused(Reason.CORRUPT, f"images/{IMAGE}: the filters of process {process} have no first one.")
            self._require_program(position)
            found.append(position)
            position = self._filters[position].previous
        return found

    def _require_program(self, position: int) -> None:
        entry = self._filters[position]
        size = len(entry.program)
        if not 0 < size <= _LONGEST or size % INSTRUCTION:
            raise Refused(Reason.CORRUPT, f"images/{IMAGE}: filter {position} has {size} bytes, which is no program.")
        if (entry.flags or 0) & ~(_TSYNC | _LOG | _SPEC_ALLOW):
            raise Refused(Reason.CORRUPT, f"images/{IMAGE}: filter {position} has unknown flags {entry.flags:#x}.")


def _read(directory: int) -> list[SeccompFilter]:
    """Return the filters of the image's first entry, which is the only one that CRIU reads."""
    if IMAGE not in os.listdir(directory):
        return []
    return [entry for image in read_all(directory, IMAGE, Seccomp)[:1] for entry in image.filters]
