"""Open descriptors of kinds that CRIU cannot dump, found by asking the kernel what they are.

A socket's kind is not in /proc: an MPTCP socket, which Go's `net` makes for every listener since Go 1.24, stands there as
any socket does. So each socket is borrowed for a moment (pidfd_getfd(2)) and asked. Of anonymous inodes only those
are refused that CRIU certainly does not know: what a GPU's driver has open, the driver's own checkpoint closes.
"""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING, Final

from chrek.system.syscalls import syscall

if TYPE_CHECKING:
    from chrek.system.ids import HostPid
    from chrek.system.procfs import Descriptor

_NETLINK, _PACKET = 16, 17
_FAMILIES: Final = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, _NETLINK, _PACKET}
"""What CRIU 4 dumps (criu/sockets.c, dump_socket)."""
_IP, _UDPLITE = 0, 136
_PROTOCOLS: Final = {_IP, socket.IPPROTO_TCP, socket.IPPROTO_UDP, _UDPLITE}
"""Of its stream and datagram sockets of the internet families (criu/sk-inet.c, can_dump_ipproto)."""
_SO_PROTOCOL: Final = 38

_PROTOCOL_NAMES: Final = {
    262: "an MPTCP socket",
    132: "an SCTP socket",
    int(socket.IPPROTO_ICMP): "an ICMP socket",
    int(socket.IPPROTO_ICMPV6): "an ICMPv6 socket",
}
_FAMILY_NAMES: Final = {38: "a socket of the kernel's cryptography (AF_ALG)", 40: "a vsock socket", 44: "an XDP socket"}

_ANONYMOUS: Final = re.compile(
    r"anon_inode:\[?(userfaultfd|perf_event|bpf-prog|bpf_link|bpf_iter|kvm-\w+|vfio-\w+|landlock-ruleset|seccomp notify)"
)


def undumpable(pid: HostPid, file: Descriptor) -> str | None:
    """Return what *file* of *pid* is, if CRIU has no way to dump that; None if it has, or the file is gone."""
    match = _ANONYMOUS.match(file.target)
    if match:
        return f"an open {match.group(1)}"
    if not file.target.startswith("socket:"):
        return None
    try:
        borrowed = _borrow(pid, file.number)
    except OSError:
        return None  # closed meanwhile, or not to be borrowed: CRIU will say what it thinks of it
    with borrowed:
        return _socket(borrowed)


def _borrow(pid: HostPid, number: int) -> socket.socket:
    process = os.pidfd_open(pid)
    try:
        return socket.socket(fileno=syscall("pidfd_getfd", process, number, 0))
    finally:
        os.close(process)


def _socket(borrowed: socket.socket) -> str | None:
    family, kind = int(borrowed.family), int(borrowed.type)
    if family not in _FAMILIES:
        return _FAMILY_NAMES.get(family, f"a socket of family {family}")
    if family in (socket.AF_INET, socket.AF_INET6) and kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        protocol = borrowed.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL)
        if protocol not in _PROTOCOLS:
            return _PROTOCOL_NAMES.get(protocol, f"a socket of protocol {protocol}")
    return None
