"""Digests of small files and of blocks."""

from __future__ import annotations

import os
import random
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrek.artifact import FASTEST, Algorithm, Blocks, BlocksBuilder, FileEntry
from chrek.artifact.digest import BULK_LIMIT, hash_blocks, hash_file

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK = 64 << 10


def _open(path: Path, data: bytes) -> int:
    path.write_bytes(data)
    return os.open(path, os.O_RDONLY)


@pytest.mark.parametrize("size", [0, 1, _BLOCK - 1, _BLOCK, _BLOCK + 1, 3 * _BLOCK, 3 * _BLOCK + 5])
@pytest.mark.parametrize("workers", [1, 3])
def test_blocks_are_the_hashes_of_the_pieces(tmp_path: Path, size: int, workers: int) -> None:
    """Block i is the bytes from i times the block size, the last one shorter, whoever hashes it."""
    data = random.Random(size).randbytes(size)
    fd = _open(tmp_path / "file", data)
    try:
        blocks = hash_blocks(fd, size, block_size=_BLOCK, workers=workers)
    finally:
        os.close(fd)
    pieces = [data[start : start + _BLOCK] for start in range(0, size, _BLOCK)]
    assert blocks.digests == b"".join(FASTEST.of(piece) for piece in pieces)
    assert all(blocks.verify(index, piece) for index, piece in enumerate(pieces))
    assert not any(blocks.verify(index, piece[:-1]) for index, piece in enumerate(pieces))


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path: Path) -> None:
    """A file shorter than it was said to be is reported."""
    fd = _open(tmp_path / "file", b"x" * 100)
    try:
        with pytest.raises(ValueError, match="shrank"):
            hash_blocks(fd, 200, block_size=_BLOCK)
    finally:
        os.close(fd)


def test_the_size_decides_the_form(tmp_path: Path) -> None:
    """Files from the limit on have blocks, smaller ones one digest."""
    path = tmp_path / "file"
    path.touch()
    for size, bulk in ((BULK_LIMIT - 1, False), (BULK_LIMIT, True)):
        os.truncate(path, size)
        fd = os.open(path, os.O_RDONLY)
        try:
            assert (hash_file(fd).bulk is not None) == bulk
        finally:
            os.close(fd)


def test_many_threads_may_digest_blocks_in_any_order() -> None:
    """The builder gives the same digests as one thread in order."""
    data = random.Random(1).randbytes(40 * _BLOCK + 17)
    builder = BlocksBuilder(block_size=_BLOCK)
    order = list(range(41))
    random.Random(2).shuffle(order)

    def work(indexes: list[int]) -> None:
        for index in indexes:
            builder.add(index, data[index * _BLOCK : (index + 1) * _BLOCK])

    threads = [threading.Thread(target=work, args=(order[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    blocks = builder.finish()
    assert blocks.size == len(data)
    assert all(blocks.verify(i, data[i * _BLOCK : (i + 1) * _BLOCK]) for i in range(41))


def test_a_missing_or_short_block_is_noticed() -> None:
    """Digests with a hole are never finished."""
    builder = BlocksBuilder(block_size=_BLOCK)
    builder.add(1, b"x" * _BLOCK)
    with pytest.raises(ValueError, match="missing or short"):
        builder.finish()
    builder.add(0, b"short")
    with pytest.raises(ValueError, match="missing or short"):
        builder.finish()


@given(st.binary(min_size=1, max_size=300), st.data())
def test_any_flipped_bit_of_a_block_is_found(data: bytes, draw: st.DataObject) -> None:
    """One bit is enough."""
    builder = BlocksBuilder(block_size=_BLOCK)
    builder.add(0, data)
    blocks = builder.finish()
    bit = draw.draw(st.integers(0, len(data) * 8 - 1))
    wrong = bytearray(data)
    wrong[bit // 8] ^= 1 << bit % 8
    assert blocks.verify(0, data)
    assert not blocks.verify(0, wrong)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sha256": "0" * 63},
        {"sha256": "G" * 64},
        {"sha256": "A" * 64},
        {"sha256": "0" * 64, "blocks": b""},
        {"block_size": 65536},
        {"block_size": 65536, "blocks": b"x" * 31},
        {"block_size": 65536, "blocks": b"x" * 64},
        {"block_size": 65537, "blocks": b"x" * 32},
        {"block_size": 1, "blocks": b"x" * 32 * 100},
        {"block_size": 1 << 40, "blocks": b"x" * 32},
    ],
)
def test_entries_that_contradict_themselves_are_refused(fields: dict[str, object]) -> None:
    """Number of digests, block size and form have to fit each other."""
    with pytest.raises(ValueError, match=r"sha256|block|SHA"):
        FileEntry(size=100, **fields)  # type: ignore[arg-type]


def test_a_gigantic_size_costs_nothing() -> None:
    """A size of 8 EiB with a handful of digests is refused without allocating anything."""
    with pytest.raises(ValueError, match="digests"):
        Blocks(size=2**63 - 1, block_size=_BLOCK, digests=b"x" * 32, algorithm=Algorithm.SHA256)
