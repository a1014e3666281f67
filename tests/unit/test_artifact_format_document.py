"""docs/format.md is enough to read a checkpoint, and names every field of the code."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from chrek import artifact
from chrek.store import Store
from sample_store import CONTENTS, publish

_DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
_SECTIONS = (
    artifact.Manifest,
    artifact.Provenance,
    artifact.Facts,
    artifact.Gpu,
    artifact.Application,
    artifact.Process,
    artifact.Stream,
    artifact.Environment,
    artifact.OpenFile,
    artifact.Volume,
    artifact.SideFile,
    artifact.Memory,
    artifact.FileEntry,
)


@pytest.mark.parametrize("section", _SECTIONS)
def test_every_field_of_the_manifest_is_documented(section: type[Any]) -> None:
    """A field that is added to the code has to be added to the document."""
    for field in dataclasses.fields(section):
        assert f"`{field.name}`" in _DOCUMENT, f"{section.__name__}.{field.name} is missing in docs/format.md"


def gmac_of_the_document(data: bytes) -> bytes:
    """GMAC from its definition, with the two constants of the document."""
    subkey, mask = 0x3783F373D8C83A09B479BF9D4A33CE1B, 0x8E96873612DE2C3E41EE52D298ECE708
    assert all(f"{constant:032x}" in _DOCUMENT for constant in (subkey, mask))
    state = 0
    lengths = (len(data) * 8).to_bytes(8, "big") + bytes(8)
    for start in range(0, len(data), 16):
        state = _multiply(state ^ int.from_bytes(data[start : start + 16].ljust(16, b"\0"), "big"), subkey)
    return (_multiply(state ^ int.from_bytes(lengths, "big"), subkey) ^ mask).to_bytes(16, "big")


def _multiply(left: int, right: int) -> int:
    """Multiply in GF(2^128) as GCM does it: the first bit is the highest power's."""
    product = 0
    for bit in range(127, -1, -1):
        if left >> bit & 1:
            product ^= right
        right = right >> 1 ^ (0xE1 << 120 if right & 1 else 0)
    return product


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000, 65536])
def test_gmac_is_that_of_the_document(size: int) -> None:
    """The digest that libcrypto computes is the one that the document defines."""
    data = random.Random(size).randbytes(size)
    cuts: list[list[bytes | bytearray | memoryview]] = [[data], [bytearray(data[:7]), memoryview(data)[7:]]]
    for pieces in cuts:
        digest = artifact.Algorithm.GMAC.new()
        for piece in pieces:
            digest.update(piece)
        assert digest.digest() == gmac_of_the_document(data)


def test_a_reader_written_from_the_document_alone_agrees(tmp_path: Path) -> None:
    """The chain of digests, computed here with nothing of ChReK's, holds for what ChReK wrote."""
    with Store.open(tmp_path) as store:
        publish(store, "abc")
    link = os.readlink(tmp_path / "abc")
    assert link == ".generations/abc/1"
    directory = tmp_path / link

    done_text = (directory / "checkpoint.done").read_bytes()
    done = json.loads(done_text)
    assert (json.dumps(done, indent=2) + "\n").encode() == done_text
    seal = done.pop("seal")
    assert hashlib.sha256((json.dumps(done, indent=2) + "\n").encode()).hexdigest() == seal
    assert done["success"] is True
    assert done["checkpoint_id"] == "abc"

    manifest_text = (directory / "manifest.json").read_bytes()
    assert hashlib.sha256(manifest_text).hexdigest() == done["manifest_sha256"]
    manifest = json.loads(manifest_text)
    assert manifest["format_version"] == 2

    contents = {}
    for path, entry in manifest["files"].items():
        contents[path] = data = (directory / path).read_bytes()
        assert len(data) == entry["size"]
        if "sha256" in entry:
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        else:
            step = entry["block_size"]
            pieces = [data[start : start + step] for start in range(0, len(data), step)]
            assert entry["digest"] == "gmac"
            assert base64.b64decode(entry["blocks"]) == b"".join(map(gmac_of_the_document, pieces))
    assert contents == CONTENTS
    there = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert there == {*contents, "manifest.json", "checkpoint.done"}
