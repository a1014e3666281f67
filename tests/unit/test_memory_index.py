"""The codec of the memory index: what it writes it reads, and nothing else passes."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chrek.artifact import Algorithm
from chrek.errors import Reason, Refused
from chrek.memory.index import (
    SKIPPED,
    VERSION,
    FileKind,
    Index,
    PageFile,
    Run,
    RunTable,
    decode,
)
from chrek.memory.ranges import PAGE, USER_TOP
from chrek.system.ids import NsPid

BLOCK = 64 << 10
PAGES = BLOCK // PAGE
# A busy machine is no failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
DOCUMENT = Path(__file__).parents[2] / "docs/format-memory.md"


def build(
    files: list[tuple[FileKind, int, list[Run]]],
    pids: list[int],
    *,
    block_size: int = BLOCK,
    algorithm: Algorithm = Algorithm.SHA256,
) -> Index:
    """Return an index of files with these runs, as a capture would build it."""
    ends: list[int] = []
    packed = b""
    listed = []
    for kind, number, runs in files:
        table = RunTable(block_size)
        for run in runs:
            table.add(*run)
        own, own_ends = table.finish()
        before = ends[-1] if ends else 0
        ends.extend(before + end for end in own_ends)
        packed += own
        listed.append(PageFile(kind, number, sum(pages for _, pages, _ in runs) * PAGE))
    return Index(
        block_size=block_size,
        files=tuple(listed),
        pids=tuple(NsPid(pid) for pid in pids),
        ends=tuple(ends),
        algorithm=algorithm,
        digests=b"".join(algorithm.of(bytes([n % 256])) for n in range(len(ends))),
        runs=packed,
    )


def small() -> Index:
    """Return an index with two files, two processes, a skipped run and a run longer than a block."""
    first = [(0x10000, 3, 0), (0x20000, PAGES, 0), (0x7F0000000000, 1, 1)]
    second = [(0x900000, 2, 1), (0, 4, SKIPPED), (0x910000, 1, 0)]
    return build([(FileKind.SHARD, 0, first), (FileKind.PAGES_IMAGE, 7, second)], [7, 9])


def sealed(body: bytes) -> bytes:
    """Return *body* with a right checksum, as a forger would."""
    return body + hashlib.sha256(body).digest()


def refusal(data: bytes) -> Refused:
    """Return the refusal of *data*."""
    with pytest.raises(Refused) as caught:
        decode(data)
    return caught.value


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    """Draw a valid index: runs that do not overlap, in files of both kinds."""
    count = draw(st.integers(1, 4))
    pids = draw(st.lists(st.integers(1, 1 << 22), min_size=count, max_size=count, unique=True))
    at = [draw(st.integers(0, 1 << 20)) for _ in pids]
    files: list[tuple[FileKind, int, list[Run]]] = []
    for number in range(draw(st.integers(0, 4))):
        runs: list[Run] = []
        for _ in range(draw(st.integers(1, 12))):
            process = draw(st.integers(-1, count - 1))
            pages = draw(st.integers(1, 2 * PAGES))
            if process < 0:
                runs.append((0, pages, SKIPPED))
                continue
            at[process] += draw(st.integers(0, 100))
            runs.append((at[process] * PAGE, pages, process))
            at[process] += pages
        files.append((draw(st.sampled_from(FileKind)), number, runs))
    return build(files, pids, algorithm=draw(st.sampled_from(Algorithm)))


@unhurried
@given(indexes())
def test_what_is_encoded_is_decoded(index: Index) -> None:
    """Decoding what was encoded gives an equal index."""
    assert decode(index.encode()) == index


@unhurried
@given(indexes())
def test_runs_fill_their_blocks(index: Index) -> None:
    """The runs of each block have as many bytes as the block, and all blocks as many as the files."""
    blocks = list(index.blocks())
    assert [sum(pages for _, pages, _ in index.runs_of(block)) * PAGE for block in blocks] == [
        block.length for block in blocks
    ]
    assert sum(block.length for block in blocks) == index.size


@unhurried
@given(indexes())
def test_entries_have_every_digest_in_order(index: Index) -> None:
    """The entries for the manifest hold the digests of each file's blocks, in the order of the files."""
    entries = index.entries()
    assert list(entries) == [file.path for file in index.files]
    assert b"".join(entry.blocks or b"" for entry in entries.values()) == index.digests


@unhurried
@given(indexes(), st.data())
def test_any_change_is_refused(index: Index, data: st.DataObject) -> None:
    """An index with a changed byte is never decoded."""
    encoded = bytearray(index.encode())
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    refusal(bytes(encoded))


def test_version_1_is_read() -> None:
    """An index of version 1 is read as long as it has the digests of its time."""
    body = struct.Struct("<I")

    def version_1(index: Index) -> bytes:
        data = bytearray(index.encode()[:-32])
        body.pack_into(data, 8, 1)
        return sealed(bytes(data))

    runs = [(FileKind.SHARD, 0, [(0x10000, 3, 0)])]
    old = build(runs, [7])
    assert decode(version_1(old)) == old
    refusal(version_1(build(runs, [7], algorithm=Algorithm.GMAC)))


@unhurried
@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    """Noise, also behind the right magic and under a right checksum, is refused and does not crash."""
    refusal(noise)
    refusal(sealed(noise))
    refusal(sealed(b"CHREKMEM" + struct.pack("<I", VERSION) + noise))


@unhurried
@given(indexes(), st.data())
def test_forged_numbers_never_crash(index: Index, data: st.DataObject) -> None:
    """Any bytes changed under a right checksum give a valid index or a refusal, nothing else."""
    body = bytearray(index.encode()[:-32])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(8, len(body) - 1))
        body[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
    try:
        decoded = decode(sealed(bytes(body)))
    except Refused:
        return
    body[8:12] = struct.pack("<I", VERSION)  # older ones are read, and written as the newest
    assert decoded.encode() == sealed(bytes(body))


def test_every_truncation_is_refused() -> None:
    """A file cut at any byte is refused, and so is one with a byte too many."""
    data = small().encode()
    for length in range(len(data)):
        assert refusal(data[:length]).reason is Reason.CORRUPT
    refusal(data + b"\0")


def test_a_newer_version_is_refused_by_name() -> None:
    """A higher version is told apart from damage, whatever follows it."""
    error = refusal(b"CHREKMEM" + struct.pack("<I", VERSION + 1) + bytes(52))
    assert error.reason is Reason.FORMAT_TOO_NEW
    assert f"version {VERSION + 1}" in error.message


def replaced(format_: str, offset: int, value: int) -> Callable[[bytes], bytes]:
    """Return a forgery of one number."""

    def forge(body: bytes) -> bytes:
        changed = bytearray(body)
        struct.pack_into(format_, changed, offset, value)
        return bytes(changed)

    return forge


# Offsets in the body of `small`: header 64, two files, two processes, three blocks.
_FILES, _PIDS, _ENDS = 64, 64 + 32, 64 + 32 + 16
_RUNS = _ENDS + 3 * 8 + 3 * 32

FORGERIES = {
    "version 0": replaced("<I", 8, 0),
    "page size": replaced("<I", 12, 8192),
    "block size 0": replaced("<Q", 16, 0),
    "block size no power of two": replaced("<Q", 16, 3 * PAGE * 16),
    "gigantic block size": replaced("<Q", 16, 1 << 62),
    "gigantic file count": replaced("<I", 24, 0xFFFFFFFF),
    "gigantic process count": replaced("<I", 28, 0xFFFFFFFF),
    "gigantic block count": replaced("<Q", 32, (1 << 64) - 1),
    "gigantic run count": replaced("<Q", 40, (1 << 64) - 1),
    "unknown digest": replaced("<I", 48, 3),
    "digest of another size": replaced("<I", 48, 2),
    "reserved": replaced("<I", 60, 1),
    "unknown kind of file": replaced("<I", _FILES, 2),
    "same file twice": replaced("<Q", _FILES + 16, 0),
    "gigantic file": replaced("<Q", _FILES + 8, 1 << 62),
    "huge file": replaced("<Q", _FILES + 8, 1 << 54),
    "empty file": replaced("<Q", _FILES + 8, 0),
    "file of half a page": replaced("<Q", _FILES + 8, 2048),
    "pid 0": replaced("<I", _PIDS, 0),
    "gigantic pid": replaced("<I", _PIDS, 0xFFFFFFFF),
    "same pid twice": replaced("<I", _PIDS, 9),
    "reserved in processes": replaced("<I", _PIDS + 4, 1),
    "ends fall": replaced("<Q", _ENDS, 100),
    "block without runs": replaced("<Q", _ENDS, 0),
    "ends past the runs": replaced("<Q", _ENDS + 16, 1 << 60),
    "run unaligned": replaced("<Q", _RUNS, 0x10008),
    "run in the kernel": replaced("<Q", _RUNS, 0xFFFFFFFF81000000),
    "run past the top": replaced("<Q", _RUNS, USER_TOP - PAGE),
    "run of no pages": replaced("<I", _RUNS + 8, 0),
    "run of too many pages": replaced("<I", _RUNS + 8, 0xFFFFFFFF),
    "run of no process": replaced("<I", _RUNS + 12, 2),
    "skipped run with an address": replaced("<I", _RUNS + 12, SKIPPED),
    "run overlaps another": replaced("<Q", _RUNS, 0x20000 - 2 * PAGE),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_forged_values_are_refused(forge: Callable[[bytes], bytes]) -> None:
    """A value that no ChReK writes is refused although the checksum is right."""
    body = small().encode()[:-32]
    assert forge(body) != body
    assert refusal(sealed(forge(body))).reason is Reason.CORRUPT


def test_the_documents_reader_reads() -> None:
    """The reader printed in the format's document finds exactly the runs of one process."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict[str, Callable[[bytes, int], Iterator[tuple[int, int, int, int]]]] = {}
    exec(blocks[0], names)
    index = small()
    expected = []
    for block in index.blocks():
        offset = block.offset
        for address, pages, process in index.runs_of(block):
            if process == 1:
                expected.append((address, pages * PAGE, index.files.index(block.file), offset))
            offset += pages * PAGE
    assert list(names["pages"](index.encode(), 9)) == expected
    assert expected


def test_neighbouring_runs_are_joined() -> None:
    """Pages that go on where the last run ended do not cost a run, and no run crosses a block."""
    table = RunTable(BLOCK)
    for page in range(PAGES + 2):
        table.add(0x10000 + page * PAGE, 1, 0)
    packed, ends = table.finish()
    assert list(struct.iter_unpack("<QII", packed)) == [(0x10000, PAGES, 0), (0x10000 + BLOCK, 2, 0)]
    assert ends == [1, 2]
