"""What a seccomp filter means, in a form in which equal filters are equal.

Runtimes do not build one profile into one program: containerd 2.2 puts the checks for the architectures into an
order that Go's maps give it, so that of 40 containers of one pod with the profile RuntimeDefault 11 had other bytes
than the rest *(measured)*. So a program (bpf(4), "classic" BPF) is followed for every architecture and every number of
a system call that it makes a difference for; what then still depends on the call's arguments is kept as a tree of
comparisons. Two programs with the same outcome are the same filter.

This decides in one direction only: equal forms are equal filters, while equal filters may have other forms. What is
not understood (arithmetic that libseccomp never writes) stands for itself, byte by byte.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

_LOAD, _JUMP, _AND, _RETURN = 0x20, 0x05, 0x54, 0x06
_EQUAL, _GREATER, _GREATER_EQUAL, _ANY_BIT = 0x15, 0x25, 0x35, 0x45
_JUMPS = {_EQUAL, _GREATER, _GREATER_EQUAL, _ANY_BIT}
_NUMBER, _ARCH = 0, 4
"""Offsets in ``struct seccomp_data``."""
_ALL = 1 << 32
_HIGH = 1 << 28
"""Lowest bit of a number that is asked for alone: the x32 calls of x86-64 have bit 30."""
_OTHER = -1
"""Stands for every architecture that a program does not name."""
_PATIENCE = 100_000
"""Most steps for one program; containerd's RuntimeDefault takes 2,700, in 2 ms on a 2-core machine."""

Form = object


class _NotUnderstood(Exception):
    """The program does what is not modelled here."""


@dataclass(frozen=True)
class _Value:
    """What the accumulator holds: a word of the call's data, maybe masked."""

    offset: int = -1
    mask: int = _ALL - 1


class Meanings:
    """Turns programs into comparable forms; those of one instance can be compared with each other."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[object, ...], int] = {}
        self._known: dict[bytes, Form] = {}

    def of(self, program: bytes) -> Form:
        """Return the form of a program."""
        if program not in self._known:
            try:
                self._known[program] = _Reader(program, self._nodes).form()
            except (_NotUnderstood, RecursionError, IndexError, struct.error):
                self._known[program] = program
        return self._known[program]


@dataclass
class _Region:
    """System calls from *low* up to but without *high*, but for those in *without*."""

    low: int
    high: int
    without: dict[int, int] = field(default_factory=dict)


_Later = list[tuple[int, _Value, _Region]]
"""Where to go on, with what in the accumulator, for which numbers."""


class _Reader:
    """Follows one program."""

    def __init__(self, program: bytes, nodes: dict[tuple[object, ...], int]) -> None:
        self._code = list(struct.iter_unpack("<HBBI", program))
        self._nodes = nodes
        self._steps = 0
        self._arches: set[int] = set()

    def form(self) -> Form:
        # Whatever architecture makes a difference is compared with on the way that one takes which is none of them.
        other = self._numbers(_OTHER)
        by_arch = {arch: self._numbers(arch) for arch in sorted(self._arches)}
        return other, frozenset((arch, found) for arch, found in by_arch.items() if found != other)

    def _numbers(self, arch: int) -> tuple[tuple[int, int], ...]:
        """Return for an architecture where the outcome changes as the number of the call grows, and to what."""
        pieces: dict[int, int] = {}
        waiting: _Later = [(0, _Value(), _Region(0, _ALL))]
        while waiting:
            self._follow(*waiting.pop(), arch, pieces, waiting)
        merged: list[tuple[int, int]] = []
        for start, outcome in sorted(pieces.items()):
            if not merged or merged[-1][1] != outcome:
                merged.append((start, outcome))
        return tuple(merged)

    def _follow(
        self, at: int, value: _Value, region: _Region, arch: int, pieces: dict[int, int], waiting: _Later
    ) -> None:
        """Follow a whole region of numbers to its outcome; single ones on the way, and other regions later."""
        while True:
            code, yes, no, k = self._step(at)
            if code == _RETURN or (code in _JUMPS and value.offset not in (_NUMBER, _ARCH)):
                self._write(region, self._outcome(at, value, arch, None, {}), pieces)
                return
            if code not in _JUMPS or value.offset == _ARCH:
                at, value = self._plain(at, value, arch)
                continue
            if value.mask != _ALL - 1:
                raise _NotUnderstood
            if code == _EQUAL:
                if region.low <= k < region.high and k not in region.without:
                    region.without[k] = self._outcome(at + 1 + yes, value, arch, k, {})
                at += 1 + no
                continue
            border = _next_bit(region, k) if code == _ANY_BIT else k + 1 if code == _GREATER else k
            if region.low < border < region.high:
                waiting.append((at, value, _Region(border, region.high, dict(region.without))))
                region.high = border
            at += 1 + (yes if _holds(code, region.low, k) else no)

    def _write(self, region: _Region, outcome: int, pieces: dict[int, int]) -> None:
        pieces[region.low] = outcome
        for number, own in region.without.items():
            if region.low <= number < region.high:
                pieces[number] = own
                if number + 1 < region.high and number + 1 not in region.without:
                    pieces[number + 1] = outcome

    def _step(self, at: int) -> tuple[int, int, int, int]:
        self._steps += 1
        if self._steps > _PATIENCE:
            raise _NotUnderstood
        return self._code[at]

    def _plain(self, at: int, value: _Value, arch: int) -> tuple[int, _Value]:
        """Do one instruction that does not depend on number or arguments."""
        code, yes, no, k = self._code[at]
        if code == _LOAD:
            return at + 1, _Value(k)
        if code == _AND:
            return at + 1, _Value(value.offset, value.mask & k)
        if code == _JUMP:
            return at + 1 + k, value
        if code in _JUMPS and value.offset == _ARCH:
            if value.mask != _ALL - 1 or code != _EQUAL:
                raise _NotUnderstood
            self._arches.add(k)
            return at + 1 + (yes if arch == k else no), value
        raise _NotUnderstood

    def _outcome(self, at: int, value: _Value, arch: int, number: int | None, seen: dict[tuple[int, _Value], int]) -> int:
        """Return the node that is reached with this number; None: with all numbers of a region."""
        start = (at, value)
        if start in seen:
            return seen[start]
        while True:
            code, yes, no, k = self._step(at)
            if code == _RETURN:
                node = self._node("return", k)
                break
            if code in _JUMPS and value.offset != _ARCH:
                if value.offset == _NUMBER:
                    if number is None:
                        raise _NotUnderstood
                    at += 1 + (yes if _holds(code, number & value.mask, k) else no)
                    continue
                if value.offset < 0:
                    raise _NotUnderstood
                then = self._outcome(at + 1 + yes, value, arch, number, seen)
                otherwise = self._outcome(at + 1 + no, value, arch, number, seen)
                node = then if then == otherwise else self._node(code, value, k, then, otherwise)
                break
            at, value = self._plain(at, value, arch)
        seen[start] = node
        return node

    def _node(self, *what: object) -> int:
        return self._nodes.setdefault(what, len(self._nodes))


def _next_bit(region: _Region, bit: int) -> int:
    """Return where in a region a high bit changes its value, or where the region ends."""
    if bit & (bit - 1) or bit < _HIGH:
        raise _NotUnderstood
    return min((region.low // bit + 1) * bit, region.high)


def _holds(code: int, left: int, right: int) -> bool:
    if code == _EQUAL:
        return left == right
    if code == _GREATER:
        return left > right
    return left >= right if code == _GREATER_EQUAL else bool(left & right)
