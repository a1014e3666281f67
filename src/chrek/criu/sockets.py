"""TCP connections in the images: pairs inside the tree stay, the others become closed sockets.

CRIU's ``tcp-established`` and ``tcp-close`` hold for all connections alike. An engine keeps loopback
connections between its own processes, which must survive; its clients' connections cannot: the new
pod has another address and the client's end is long gone. So everything is dumped as established, and
what has its other end outside the tree is rewritten as a socket that is not connected: the application
gets an error from it, and its event loop a hang-up.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from chrek.criu.images import Image
from chrek.criu.messages import File

if TYPE_CHECKING:
    from chrek.criu.messages import InetSocket

_SOCK_STREAM, _IPPROTO_TCP = 1, 6
_TCP_CLOSE, _TCP_LISTEN = 7, 10
_INETSK = 4
_MAPPED = [0, 0, 0xFFFF0000]
"""First words of ``::ffff:a.b.c.d``."""

_End = tuple[tuple[int, ...], int]


def close_foreign_connections(directory: int) -> int:
    """Rewrite ``files.img`` so; return how many connections were closed.

    Raises:
        Refused: ``CORRUPT``.
        OSError: the image cannot be written.
    """
    image: Image[File] = Image.read(directory, "files.img")
    files = list(image.decode(File))
    connected = [file.inet for file in files if file.type == _INETSK and file.inet and _is_connected(file.inet)]
    ends = {(_source(socket), _destination(socket)) for socket in connected}
    closed = 0
    for number, file in enumerate(files):
        socket = file.inet
        if file.type != _INETSK or socket is None or not _is_connected(socket):
            continue
        if _is_loopback(socket.source) and (_destination(socket), _source(socket)) in ends:
            continue
        _close(socket)
        image.entries[number] = file.encode()
        with suppress(FileNotFoundError):
            os.unlink(f"tcp-stream-{socket.ino:x}.img", dir_fd=directory)
        closed += 1
    if closed:
        image.write(directory)
    return closed


def _is_connected(socket: InetSocket) -> bool:
    tcp = socket.type == _SOCK_STREAM and socket.protocol == _IPPROTO_TCP
    return tcp and socket.state not in (_TCP_CLOSE, _TCP_LISTEN)


def _close(socket: InetSocket) -> None:
    socket.state = _TCP_CLOSE
    # Without ports CRIU does not bind the socket again: the old address need not exist here.
    socket.source_port = socket.destination_port = 0
    socket.source = [0] * len(socket.source)
    socket.destination = [0] * len(socket.destination)
    socket.shutdown = None


def _source(socket: InetSocket) -> _End:
    return _plain(socket.source), socket.source_port


def _destination(socket: InetSocket) -> _End:
    return _plain(socket.destination), socket.destination_port


def _plain(address: list[int]) -> tuple[int, ...]:
    """Return an IPv4 address as such: of a connection made by IPv4 to a server of both, one end has it mapped."""
    return tuple(address[3:] if address[:3] == _MAPPED else address)


def _is_loopback(address: list[int]) -> bool:
    """Whether the address is there in every network namespace; words are in network byte order."""
    words = _plain(address)
    return words == (0, 0, 0, 0x01000000) or (len(words) == 1 and words[0] & 0xFF == 127)
