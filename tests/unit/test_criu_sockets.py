"""TCP connections in the images: pairs on the loopback interface stay, what leads outside is closed."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.criu.images import COMMON_MAGIC, Image, read_all, read_bytes
from chrek.criu.messages import File, InetSocket, RegularFile
from chrek.criu.sockets import close_foreign_connections

INET, REGULAR = 4, 1
ESTABLISHED, SYN_SENT, CLOSE_WAIT, CLOSE, LISTEN = 1, 2, 8, 7, 10
UNKNOWN = b"\x98\x06\x07"


def address(text: str) -> list[int]:
    """Return an address as CRIU has it: words in network byte order, as this machine reads them."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    packed = socket.inet_pton(family, text)
    return list(struct.unpack(f"={len(packed) // 4}I", packed))


def connection(
    number: int,
    source: tuple[str, int],
    destination: tuple[str, int],
    *,
    state: int = ESTABLISHED,
    kind: int = socket.SOCK_STREAM,
    protocol: int = socket.IPPROTO_TCP,
) -> File:
    """Return an open socket."""
    inet = InetSocket(
        id=number, ino=0xAB00 + number, family=socket.AF_INET, type=kind, protocol=protocol, state=state, flags=2,
        source_port=source[1], destination_port=destination[1], backlog=0,
        source=address(source[0]), destination=address(destination[0]), shutdown=1, unknown=UNKNOWN,
    )  # fmt: skip
    return File(type=INET, id=number, inet=inet)


class Place:
    """An image directory with open files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def write(self, *files: File) -> None:
        """Write ``files.img``, and a stream image for each socket."""
        Image("files.img", struct.pack("<II", COMMON_MAGIC, 1), [file.encode() for file in files]).write(self.fd)
        for file in files:
            if file.inet is not None:
                (self.path / f"tcp-stream-{file.inet.ino:x}.img").touch()

    def sockets(self) -> list[InetSocket]:
        """Return the sockets of ``files.img``."""
        return [file.inet for file in read_all(self.fd, "files.img", File) if file.inet]

    def streams(self) -> set[int]:
        """Return the numbers of the sockets that have a stream image."""
        names = [file.name for file in self.path.iterdir() if file.name.startswith("tcp-stream-")]
        return {int(name[len("tcp-stream-") : -len(".img")], 16) - 0xAB00 for name in names}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Return an empty image directory."""
    found = Place(tmp_path)
    yield found
    os.close(found.fd)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_a_pair_inside_stays(place: Place, host: str) -> None:
    """A loopback connection that has both its ends in the tree is left as it is, and nothing is written."""
    place.write(connection(1, (host, 5000), (host, 40000)), connection(2, (host, 40000), (host, 5000)))
    before = read_bytes(place.fd, "files.img")
    assert close_foreign_connections(place.fd) == 0
    assert read_bytes(place.fd, "files.img") == before
    assert place.streams() == {1, 2}


def test_a_pair_of_both_families_stays(place: Place) -> None:
    """A client of IPv4 and the socket that a server of both families accepted for it are the two ends of one pair."""
    mapped, plain = "::ffff:127.0.0.1", "127.0.0.1"
    place.write(connection(1, (mapped, 5000), (mapped, 40000)), connection(2, (plain, 40000), (plain, 5000)))
    assert close_foreign_connections(place.fd) == 0
    assert place.streams() == {1, 2}


@pytest.mark.parametrize("host", ["10.1.2.3", "128.0.0.127", "::2", "1::1", "::ffff:10.0.0.1", "2001:db8::1"])
def test_a_pair_at_another_address_is_closed(place: Place, host: str) -> None:
    """A connection at the pod's own address is closed although both ends are in the tree: the next pod has another."""
    place.write(connection(1, (host, 5000), (host, 40000)), connection(2, (host, 40000), (host, 5000)))
    assert close_foreign_connections(place.fd) == 2
    assert place.streams() == set()


def test_a_foreign_end_is_closed(place: Place) -> None:
    """A connection to outside becomes a socket that is not connected nor bound; its stream image goes, its rest stays."""
    place.write(connection(1, ("10.0.0.5", 8000), ("10.9.9.9", 51000)))
    assert close_foreign_connections(place.fd) == 1
    (found,) = place.sockets()
    assert (found.state, found.source_port, found.destination_port, found.shutdown) == (CLOSE, 0, 0, None)
    assert (found.source, found.destination) == ([0], [0])
    assert (found.id, found.ino, found.flags, found.unknown) == (1, 0xAB01, 2, UNKNOWN)
    assert place.streams() == set()


def test_a_loopback_connection_to_another_tree_is_closed(place: Place) -> None:
    """A loopback connection whose other end is some other process's is foreign, too."""
    place.write(
        connection(1, ("127.0.0.1", 5000), ("127.0.0.1", 40000)),
        connection(2, ("127.0.0.1", 5000), ("127.0.0.1", 40001)),
        connection(3, ("127.0.0.1", 40001), ("127.0.0.1", 5000)),
    )
    assert close_foreign_connections(place.fd) == 1
    assert place.streams() == {2, 3}


@pytest.mark.parametrize("state", [ESTABLISHED, SYN_SENT, CLOSE_WAIT])
def test_every_state_of_a_connection(place: Place, state: int) -> None:
    """A connection that is being made or ended is a connection."""
    place.write(connection(1, ("10.0.0.5", 8000), ("10.9.9.9", 51000), state=state))
    assert close_foreign_connections(place.fd) == 1


@pytest.mark.parametrize(
    "file",
    [
        connection(1, ("10.0.0.5", 8000), ("0.0.0.0", 0), state=LISTEN),
        connection(1, ("0.0.0.0", 0), ("0.0.0.0", 0), state=CLOSE),
        connection(1, ("10.0.0.5", 8000), ("10.9.9.9", 53), kind=socket.SOCK_DGRAM, protocol=socket.IPPROTO_UDP),
        connection(1, ("10.0.0.5", 8000), ("10.9.9.9", 53), protocol=132),
    ],
    ids=["listening", "closed", "udp", "sctp"],
)
def test_what_is_no_connection(place: Place, file: File) -> None:
    """Sockets that listen or are closed, and those of other protocols, are left as they are."""
    place.write(file)
    assert close_foreign_connections(place.fd) == 0


def test_other_files_stay(place: Place) -> None:
    """Other entries of the image keep their bytes and their place; a stream image that is not there is no error."""
    plain = File(type=REGULAR, id=9, regular=RegularFile(id=9, flags=0, position=3, name="/x"), unknown=UNKNOWN)
    place.write(plain, connection(1, ("10.0.0.5", 8000), ("10.9.9.9", 51000)), plain)
    (place.path / "tcp-stream-ab01.img").unlink()
    assert close_foreign_connections(place.fd) == 1
    image: Image[File] = Image.read(place.fd, "files.img")
    assert [image.entries[0], image.entries[2]] == [plain.encode()] * 2
