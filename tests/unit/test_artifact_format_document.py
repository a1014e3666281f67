"""docs/format.md is enough to read a checkpoint, and names every field of the code."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
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
    assert manifest["format_version"] == 1

    contents = {}
    for path, entry in manifest["files"].items():
        contents[path] = data = (directory / path).read_bytes()
        assert len(data) == entry["size"]
        if "sha256" in entry:
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        else:
            step = entry["block_size"]
            pieces = [data[start : start + step] for start in range(0, len(data), step)]
            assert base64.b64decode(entry["blocks"]) == b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    assert contents == CONTENTS
    there = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert there == {*contents, "manifest.json", "checkpoint.done"}
