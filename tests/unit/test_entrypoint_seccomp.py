"""The filter against io_uring and MPTCP, run instruction by instruction for every call of every architecture."""

from __future__ import annotations

import errno

import pytest

from chrek.system.seccomp import (
    AUDIT_ARCHES,
    CAP_SYS_ADMIN,
    RET_ALLOW,
    RET_ENOSYS,
    RET_EPROTONOSUPPORT,
    SOCKET,
    changes_nothing_else,
    program,
)


def run(arch: int, number: int, protocol: int = 0) -> int:
    """Interpret the filter as the kernel's BPF does; return its answer."""
    instructions = program()
    position, accumulator = 0, 0
    data = {0: number, 4: arch, 32: protocol}
    while True:
        code, if_true, if_false, operand = instructions[position]
        position += 1
        if code == 0x20:
            accumulator = data[operand]
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x06:
            return operand
        else:
            holds = {0x15: accumulator == operand, 0x35: accumulator >= operand, 0x25: accumulator > operand}[code]
            position += if_true if holds else if_false


@pytest.mark.parametrize("arch", AUDIT_ARCHES.values(), ids=AUDIT_ARCHES)
def test_three_calls_are_answered_and_no_other(arch: int) -> None:
    """Of all numbers, with and without the x32 bit, only io_uring's three get ENOSYS."""
    for base in (0, 0x40000000):
        blocked = [number for number in range(2000) if run(arch, base | number) != RET_ALLOW]
        assert blocked == [425, 426, 427]
    assert run(arch, 425) == RET_ENOSYS
    assert RET_ENOSYS & 0xFFFF == errno.ENOSYS


@pytest.mark.parametrize("name", SOCKET)
def test_a_socket_of_mptcp_is_not_supported(name: str) -> None:
    """Of all calls with that number as third argument only socket(2) is answered, and it only for that number."""
    arch, mptcp = AUDIT_ARCHES[name], 262
    for number in range(1000):
        if number in range(425, 428):
            continue
        expected = RET_EPROTONOSUPPORT if number == SOCKET[name] else RET_ALLOW
        assert run(arch, number, mptcp) == expected
    assert all(run(arch, SOCKET[name], protocol) == RET_ALLOW for protocol in range(1000) if protocol != mptcp)
    assert RET_EPROTONOSUPPORT & 0xFFFF == errno.EPROTONOSUPPORT


@pytest.mark.parametrize("arch", [0, 0xFFFFFFFF, 0x80000016])
def test_an_unknown_architecture_is_let_through(arch: int) -> None:
    """Where the numbers mean other things nothing is answered."""
    assert all(run(arch, number) == RET_ALLOW for number in range(2000))


def test_sys_admin_is_enough() -> None:
    """With CAP_SYS_ADMIN effective a filter changes nothing else."""
    assert changes_nothing_else(1 << CAP_SYS_ADMIN)
