"""CRIU's image files: read, edit, write.

An image is a magic number (or two) and then entries, each a 32-bit length and a protobuf message
(``criu/image.c``, ``criu/protobuf.c``). `Image` keeps the magic as it was found, so that a rewritten
file is one CRIU accepts.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from chrek.errors import Reason, Refused
from chrek.system.protobuf import Message, WireError

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMON_MAGIC = 0x54564319
"""First word of every image but ``inventory`` and the raw ones."""

MAX_IMAGE_BYTES = 1 << 30
"""No metadata image comes near: 20,000 VMAs are 1.2 MB. A bound for hostile directories."""

M = TypeVar("M", bound=Message)


def _corrupt(name: str, what: str) -> Refused:
    return Refused(Reason.CORRUPT, f"images/{name}: {what}.")


def open_regular(directory: int, name: str) -> int:
    """Open the image *name* for reading in the directory behind the descriptor; no link is followed.

    Raises:
        Refused: ``CORRUPT``, when it is not a regular file.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except OSError as error:
        raise _corrupt(name, f"cannot be opened ({error.strerror})") from error
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise _corrupt(name, "it is no regular file")


def read_bytes(directory: int, name: str) -> bytes:
    """Read the image *name* in the directory behind the descriptor; no link is followed.

    Raises:
        Refused: ``CORRUPT``, when it is not a regular file of sane size.
    """
    with open(open_regular(directory, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_IMAGE_BYTES:
            raise _corrupt(name, f"{size} bytes are more than an image can have")
        try:
            return file.read(MAX_IMAGE_BYTES + 1)
        except OSError as error:
            raise _corrupt(name, f"cannot be read ({error.strerror})") from error


@dataclass
class Image(Generic[M]):
    """One image file: its magic words and its entries, still encoded."""

    name: str
    magic: bytes
    entries: list[bytes]

    @classmethod
    def read(cls, directory: int, name: str) -> Image[M]:
        """Read and split the image.

        Raises:
            Refused: ``CORRUPT``, when it is not made of whole entries.
        """
        data = read_bytes(directory, name)
        if len(data) < 4:
            raise _corrupt(name, "it is too short for an image")
        words = 2 if struct.unpack_from("<I", data)[0] == COMMON_MAGIC else 1
        magic, offset, entries = data[: 4 * words], 4 * words, []
        while offset < len(data):
            if offset + 4 > len(data):
                raise _corrupt(name, f"an entry is cut short at byte {offset}")
            size = struct.unpack_from("<I", data, offset)[0]
            offset += 4
            if offset + size > len(data):
                raise _corrupt(name, f"an entry of {size} bytes at {offset} runs past the end")
            entries.append(data[offset : offset + size])
            offset += size
        return cls(name, magic, entries)

    def decode(self, schema: type[M], start: int = 0) -> Iterator[M]:
        """Decode the entries from *start* on.

        Raises:
            Refused: ``CORRUPT``, when one is not such a message.
        """
        for number, entry in enumerate(self.entries[start:], start):
            try:
                yield schema.decode(entry)
            except (WireError, ValueError) as error:
                raise _corrupt(self.name, f"entry {number}: {error}") from error

    def encode(self) -> bytes:
        """Return the file's bytes."""
        return self.magic + b"".join(struct.pack("<I", len(entry)) + entry for entry in self.entries)

    def write(self, directory: int, name: str | None = None) -> None:
        """Write the file into the directory, replacing one that is there."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name or self.name, flags, 0o600, dir_fd=directory)
        with open(fd, "wb") as file:
            file.write(self.encode())


def read_one(directory: int, name: str, schema: type[M]) -> M:
    """Read an image that holds a single entry.

    Raises:
        Refused: ``CORRUPT``.
    """
    image: Image[M] = Image.read(directory, name)
    for entry in image.decode(schema):
        return entry
    raise _corrupt(name, "it has no entry")


def read_all(directory: int, name: str, schema: type[M]) -> list[M]:
    """Read every entry of an image.

    Raises:
        Refused: ``CORRUPT``.
    """
    image: Image[M] = Image.read(directory, name)
    return list(image.decode(schema))


def matching(directory: int, pattern: str) -> dict[int, str]:
    """Return {number: name} of the images named like *pattern*, whose one group is the number."""
    compiled = re.compile(pattern)
    found = {}
    for name in os.listdir(directory):
        match = compiled.fullmatch(name)
        if match:
            found[int(match.group(1))] = name
    return dict(sorted(found.items()))
