"""Arithmetic on runs of addresses: which parts of some lie in others, and which do not.

Both sides of the split of a process's memory need it, what CRIU keeps and what ChReK moves.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

Run = tuple[int, int]
"""A stretch of addresses: start and length in bytes."""


class RunSet:
    """Runs that are sorted and do not overlap, cut out by address in logarithmic time."""

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self._runs = list(runs)
        self._starts = [start for start, _ in self._runs]

    def inside(self, start: int, length: int) -> list[Run]:
        """Return what of the set lies in the given stretch."""
        end = start + length
        found: list[Run] = []
        index = max(bisect.bisect_right(self._starts, start) - 1, 0)
        while index < len(self._runs) and self._runs[index][0] < end:
            low, high = max(start, self._runs[index][0]), min(end, sum(self._runs[index]))
            if low < high:
                found.append((low, high - low))
            index += 1
        return found

    def outside(self, start: int, length: int) -> list[Run]:
        """Return what of the given stretch is not in the set."""
        found: list[Run] = []
        at, end = start, start + length
        for low, size in self.inside(start, length):
            if low > at:
                found.append((at, low - at))
            at = low + size
        if at < end:
            found.append((at, end - at))
        return found


def intersect(first: Iterable[Run], second: Iterable[Run]) -> list[Run]:
    """Return what lies in both; each argument is sorted and does not overlap itself."""
    others = RunSet(second)
    return [run for start, length in first for run in others.inside(start, length)]


def subtract(first: Iterable[Run], second: Iterable[Run]) -> list[Run]:
    """Return what of *first* is not in *second*; each is sorted and does not overlap itself."""
    others = RunSet(second)
    return [run for start, length in first for run in others.outside(start, length)]


def union(runs: Iterable[Run]) -> list[Run]:
    """Return the runs sorted, with touching and overlapping ones joined."""
    result: list[Run] = []
    for start, length in sorted(runs):
        if result and start <= sum(result[-1]):
            result[-1] = (result[-1][0], max(sum(result[-1]), start + length) - result[-1][0])
        else:
            result.append((start, length))
    return result
