"""Pieces of a process's address space.

A range is named by the process id inside the application's PID namespace: that id is what CRIU's images
and the checkpoint know, and it is the same before and after a restore. The ids by which this program
reaches the processes are handed in beside it, for each call anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from chrek.system.ids import NsPid

PAGE: Final = 4096
"""Bytes in a page: x86-64 has no other base page size."""

USER_TOP: Final = (1 << 56) - PAGE
"""End of the highest user mapping: Linux, arch/x86/include/asm/page_64_types.h, TASK_SIZE_MAX with five levels."""

MAX_PID: Final = 1 << 22
"""PID_MAX_LIMIT of 64-bit Linux (proc_sys_kernel(5), pid_max)."""


@dataclass(frozen=True, order=True)
class Range:
    """A page-aligned piece of one process's memory; *start* and *length* in bytes.

    Pages of an *anonymous* private range that hold only zeros need not be stored: a new mapping reads as
    zeros. For a mapped file's private pages that is false.
    """

    pid: NsPid
    start: int
    length: int
    anonymous: bool = True

    def __post_init__(self) -> None:
        if self.start % PAGE or self.length % PAGE or self.length <= 0:
            raise ValueError(f"{self.start:#x}+{self.length:#x} is not a whole number of pages")
        if not 0 <= self.start < self.start + self.length <= USER_TOP:
            raise ValueError(f"{self.start:#x}+{self.length:#x} is not in user space")

    @property
    def end(self) -> int:
        """First address after the range."""
        return self.start + self.length


@dataclass(frozen=True)
class PageRun:
    """Pages that lie in an existing pages image: *span* from byte *offset* of the image on."""

    span: Range
    offset: int


def in_order(ranges: Iterable[Range]) -> list[Range]:
    """Return the ranges sorted by process and address.

    Raises:
        ValueError: two of them overlap.
    """
    ordered = sorted(ranges)
    for before, after in itertools.pairwise(ordered):
        if before.pid == after.pid and before.end > after.start:
            raise ValueError(f"ranges of process {after.pid} overlap at {after.start:#x}")
    return ordered
