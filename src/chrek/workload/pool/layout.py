"""Which bytes of GPU memory are in which file, and the index that says so.

Memory is cut into blobs of up to 64 MiB (one file) of blocks of 8 MiB (one digest). A blob's name is
made from its blocks' digests: equal contents have equal names, so the same weights in two checkpoints
are one file, and a blob that is already there need not be written.
Many files and not one: writers to one file wait for its inode lock (one file 1.5 GB/s from 16 threads,
16 files 10 to 16 GB/s on tmpfs). A blob never crosses regions, so that its contents do not depend on
what lies beside them. Blocks of zeros are in no file.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from chrek.workload.pool.digest import STEP
from chrek.workload.pool.errors import PoolError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FORMAT: Final = 1
BLOCK: Final = 8 << 20
"""Bytes of a digest: 60 GB are 7500 blocks, an index of 0.3 MB, and 20 ms of Python."""
BLOB: Final = 64 << 20
BLOBS: Final = "blobs"
INDEX: Final = "index.json"


class Region(NamedTuple):
    """A range of GPU memory that is saved: device ordinal, address, bytes (a multiple of 16)."""

    device: int
    address: int
    size: int


@dataclass
class Block:
    """Bytes of a region; `digest` is None for zeros (and, with SHA-256, until they are copied)."""

    address: int
    size: int
    digest: bytes | None = None
    zero: bool = False


class Piece(NamedTuple):
    """Bytes of a block that cross the link together; `offset` is where they are in the blob's file."""

    block: Block
    address: int
    size: int
    offset: int
    last: bool
    """Whether the block ends here."""


@dataclass
class Blob:
    """The blocks of one file, in order; blocks of zeros take no room in it."""

    device: int
    blocks: list[Block]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(block.size for block in self.blocks if not block.zero)

    def pieces(self, size: int) -> Iterator[Piece]:
        """What is in the file, in order, in pieces of at most `size` bytes that never cross blocks."""
        offset = 0
        for block in self.blocks:
            if block.zero:
                continue
            for start in range(0, block.size, size):
                length = min(size, block.size - start)
                yield Piece(block, block.address + start, length, offset + start, start + length == block.size)
            offset += block.size

    @property
    def name(self) -> str:
        """SHA-256 over the digests and sizes of the blocks in the file; all digests must be known."""
        name = hashlib.sha256()
        for block in self.blocks:
            if not block.zero:
                name.update((block.digest or b"") + block.size.to_bytes(8, "little"))
        return name.hexdigest()


@dataclass
class Index:
    """A saved pool: its regions, its blobs, how its digests were made, and whose memory it is."""

    pool: str
    digest: str
    regions: list[Region]
    blobs: list[Blob] = field(default_factory=list)
    pid: int = field(default_factory=os.getpid)

    @property
    def size(self) -> int:
        """Bytes of GPU memory that the index describes."""
        return sum(region.size for region in self.regions)

    def stored(self) -> Iterator[Blob]:
        """The blobs that are files."""
        return (blob for blob in self.blobs if blob.size)

    def to_json(self) -> str:
        """The index as it is written beside the blobs."""
        value = {
            "format": FORMAT,
            "pool": self.pool,
            "pid": self.pid,
            "digest": self.digest,
            "regions": [[region.device, f"{region.address:#x}", region.size] for region in self.regions],
            "blobs": [
                {
                    "name": blob.name if blob.size else None,
                    "device": blob.device,
                    "address": f"{blob.blocks[0].address:#x}",
                    "blocks": [[b.size, None if b.zero else (b.digest or b"").hex()] for b in blob.blocks],
                }
                for blob in self.blobs
            ],
        }
        return json.dumps(value, separators=(",", ":")) + "\n"


def plan(regions: Iterable[Region]) -> list[Blob]:
    """Cut regions into blobs of blocks; raises `PoolError` for sizes or addresses that do not fit."""
    blobs: list[Blob] = []
    for region in regions:
        if region.size <= 0 or region.size % STEP or region.address % STEP:
            raise PoolError(f"a region of {region.size} bytes at {region.address:#x} is not a multiple of {STEP}")
        for start in range(0, region.size, BLOB):
            end = min(region.size, start + BLOB)
            cuts = range(start, end, BLOCK)
            blocks = [Block(region.address + cut, min(BLOCK, end - cut)) for cut in cuts]
            blobs.append(Blob(region.device, blocks))
    return blobs


def from_json(text: str) -> Index:
    """Read an index; raises `PoolError` for anything that `to_json` would not have written."""
    try:
        value: dict[str, Any] = json.loads(text)
        if value["format"] != FORMAT:
            raise PoolError(f"the index has format {value['format']}; this ChReK reads {FORMAT}")
        index = Index(
            pool=str(value["pool"]),
            digest=str(value["digest"]),
            regions=[Region(int(d), int(a, 16), int(s)) for d, a, s in value["regions"]],
            blobs=[_blob(blob) for blob in value["blobs"]],
            pid=int(value["pid"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PoolError(f"the index cannot be read: {error!r}") from error
    if json.loads(index.to_json()) != value or _shape(index.blobs) != _shape(plan(index.regions)):
        raise PoolError("the index contradicts itself: names, digests, sizes and regions do not belong together")
    return index


def _shape(blobs: list[Blob]) -> list[tuple[int, list[tuple[int, int]]]]:
    return [(blob.device, [(block.address, block.size) for block in blob.blocks]) for blob in blobs]


def _blob(value: dict[str, Any]) -> Blob:
    address, blocks = int(value["address"], 16), []
    for size, digest in value["blocks"]:
        blocks.append(Block(address, int(size), None if digest is None else bytes.fromhex(digest), digest is None))
        address += int(size)
    return Blob(int(value["device"]), blocks)
