"""What a checkpoint records of files, processors and environments."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chrek.engine import facts

BUILD_ID = bytes(range(20))
PT_LOAD, PT_NOTE = 1, 4


def note(name: bytes, kind: int, body: bytes) -> bytes:
    """Return an ELF note: sizes, kind, name and body, each padded to four bytes."""
    padded = [part + bytes(-len(part) % 4) for part in (name, body)]
    return struct.pack("<III", len(name), len(body), kind) + b"".join(padded)


GNU = note(b"GNU\0", 3, BUILD_ID)


def elf(*segments: tuple[int, bytes], start: int | None = None, entry_size: int = 56) -> bytes:
    """Return a 64-bit ELF file with these program headers and what they name, one after the other."""
    table, bodies = b"", b""
    at = 64 + entry_size * len(segments)
    for kind, body in segments:
        offset = at + len(bodies) if start is None else start
        header = struct.pack("<IIQQQQQQ", kind, 4, offset, 0, 0, len(body), len(body), 4)
        table += header + bytes(entry_size - 56)
        bodies += body
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    rest = struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, entry_size, len(segments), 0, 0, 0)
    return ident + rest + table + bodies


@pytest.fixture
def build_id(tmp_path: Path) -> Iterator[Callable[[bytes], str | None]]:
    """Return what gives the build id of a file with these bytes."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)

    def ask(data: bytes) -> str | None:
        os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)
        return facts.build_id(fd)

    yield ask
    os.close(fd)


def test_build_id(build_id: Callable[[bytes], str | None]) -> None:
    """The id is found behind other segments, other notes and other owners' notes of the same kind."""
    others = note(b"GNU\0", 1, bytes(16)) + note(b"stapsdt\0", 3, b"abcde") + note(b"", 0, b"")
    assert build_id(elf((PT_NOTE, GNU))) == BUILD_ID.hex()
    assert build_id(elf((PT_LOAD, GNU), (PT_NOTE, others), (PT_NOTE, others + GNU))) == BUILD_ID.hex()
    assert build_id(elf((PT_NOTE, GNU), entry_size=64)) == BUILD_ID.hex()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"#!/bin/sh\n" * 20,
        elf(),
        elf((PT_LOAD, GNU)),
        elf((PT_NOTE, note(b"GNU\0", 3, b""))),
        elf((PT_NOTE, note(b"Go\0\0", 3, BUILD_ID))),
        elf((PT_NOTE, struct.pack("<III", 0xFFFFFFFF, 0xFFFFFFFF, 3))),
        elf((PT_NOTE, GNU), start=1 << 62),
        elf((PT_NOTE, GNU), start=1 << 63),
        elf((PT_NOTE, GNU), start=(1 << 64) - 1),
        elf((PT_NOTE, GNU))[:63],
        elf((PT_NOTE, GNU))[:100],
        b"\x7fELF\x01" + elf((PT_NOTE, GNU))[5:],
    ],
)
def test_no_build_id(build_id: Callable[[bytes], str | None], data: bytes) -> None:
    """Files without an id, of 32 bits, cut short, or with headers that lead nowhere, have none."""
    assert build_id(data) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=200)
@given(data=st.data())
def test_any_header(build_id: Callable[[bytes], str | None], data: st.DataObject) -> None:
    """Whatever a file's headers say, there is an answer."""
    damaged = bytearray(elf((PT_NOTE, GNU)))
    for at in data.draw(st.lists(st.integers(32, len(damaged) - 1), min_size=1, max_size=10)):
        damaged[at] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    found = build_id(bytes(damaged))
    assert found is None or re.fullmatch(r"([0-9a-f]{2})+", found)


def test_this_interpreter() -> None:
    """A real program's id is the one that its own note has."""
    fd = os.open(sys.executable, os.O_RDONLY)
    found = facts.build_id(fd)
    os.close(fd)
    assert found is None or bytes.fromhex(found) in Path(sys.executable).read_bytes()


def test_processor() -> None:
    """Features are those of the processor that programs can see, sorted; none of the kernel's own."""
    found = facts.cpu_features()
    assert list(found) == sorted(set(found))
    assert set(found) <= facts.CPU_FEATURES
    assert "sse2" in found


def test_describe(tmp_path: Path) -> None:
    """A regular file has its size; a link is followed inside the root only; others are not described."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"12345")
    root = tmp_path / "root"
    (root / "lib").mkdir(parents=True)
    (root / "lib/a").write_bytes(b"123")
    (root / "absolute").symlink_to("/lib/a")
    (root / "up").symlink_to("../../../lib/a")
    (root / "escape").symlink_to(outside)
    os.mkfifo(root / "fifo")
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    found = {name: facts.describe(fd, name) for name in ("/lib/a", "/absolute", "/up", "/escape", "/fifo", "/lib", "/none")}
    os.close(fd)
    assert found == {
        **dict.fromkeys(["/lib/a", "/absolute", "/up"], (3, None)),
        **dict.fromkeys(["/escape", "/fifo", "/lib", "/none"], None),
    }


def test_environment() -> None:
    """An environment has its names, and a digest that every change of a name or value changes, but no order."""
    first = facts.environment_digest({"B": "2", "A": "1"})
    assert first == facts.environment_digest({"A": "1", "B": "2"})
    assert first.names == ("A", "B")
    others = [{"A": "1", "B": "3"}, {"A": "1"}, {"A": "1", "C": "2"}, {"A": "1B=2"}, {"A": "1", "B": "2\udcff"}]
    digests = {facts.environment_digest(each).sha256 for each in others} | {first.sha256}
    assert len(digests) == len(others) + 1


@pytest.mark.parametrize(
    ("environment", "path"),
    [
        ({}, "/tmp/dynamo-restored"),
        ({"DYN_RESTORE_MARKER_FILE": ""}, "/tmp/dynamo-restored"),
        ({"DYN_RESTORE_MARKER_FILE": "/run/marker"}, "/run/marker"),
    ],
)
def test_marker(environment: dict[str, str], path: str) -> None:
    """The marker is where the environment says, or at its usual place."""
    assert facts.marker_path(environment) == path


def test_a_compiled_program(tmp_path: Path) -> None:
    """The id is the one that the linker was given."""
    source = tmp_path / "a.c"
    source.write_text("int main(void) { return 0; }\n")
    argv = ["gcc", "-o", str(tmp_path / "a"), str(source), "-Wl,--build-id=0x00112233445566778899"]
    try:
        subprocess.run(argv, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no compiler")
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    assert facts.build_id(fd) == "00112233445566778899"
    os.close(fd)
