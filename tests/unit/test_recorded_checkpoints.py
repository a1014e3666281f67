"""Checkpoints that earlier versions wrote are read by this one: the archives in ``inputs``, never made anew."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from chrek.engine.export import export_checkpoint
from chrek.store import Store, open_checkpoint
from chrekcli import chrek, chrek_json

RECORDED = sorted((Path(__file__).parent / "inputs").glob("checkpoint-*.tar.xz"))
"""One a format version and kind of digest, as in the name; `system.record_checkpoint` makes them."""

CHECKPOINT_ID = "recorded"
TEXT = b"0123456789abcdef"


@pytest.fixture(params=RECORDED, ids=lambda path: path.name.removesuffix(".tar.xz"))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a store that holds one recorded checkpoint."""
    place = tmp_path / "store"
    with tarfile.open(request.param) as archive:
        archive.extractall(place, filter="data")
    return place


def test_each_kind_is_recorded() -> None:
    """The witnesses of what was written are there."""
    assert "checkpoint-1-sha256.tar.xz" in [path.name for path in RECORDED]


def test_is_verified(store: Path) -> None:
    """Every byte is what the digests of its time say."""
    (result,) = chrek_json("verify", "--all", store=store)
    assert result["ok"], result
    assert result["bytes_read"] > 4 << 20


@pytest.mark.parametrize("name", ["memory/shard-01", "images/core-6.img", "manifest.json", "checkpoint.done"])
def test_damage_is_found(store: Path, name: str) -> None:
    """One changed bit of it is found, with the digests of its time."""
    path = store / CHECKPOINT_ID / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert chrek("verify", CHECKPOINT_ID, store=store).returncode == 172


def test_is_shown(store: Path) -> None:
    """What was recorded is shown: both processes, memory by kind, files, volumes, times."""
    found = chrek_json("inspect", CHECKPOINT_ID, store=store)
    root, child = found["processes"]
    assert (root["pid"], root["ppid"], child["ppid"], root["command"][0]) == (6, 1, 6, "sh")
    assert found["memory"]["mode"] == "lazy"
    assert found["memory"]["stored_bytes"] > len(TEXT) << 18
    heaps = {part["pid"]: part["stored_bytes"] for part in found["memory"]["kinds"] if part["kind"] == "heap"}
    assert heaps[6] > len(TEXT) << 18
    assert heaps[child["pid"]] > 6 << 13
    names = [(file["pid"], file["fd"], file["name"]) for file in found["open_files"]]
    assert (6, 4, "/cache/file") in names
    assert {volume["path"] for volume in found["volumes"]} == {"/cache", "/dev/shm"}
    assert {"preflight", "memory", "frozen", "dump", "finish"} <= found["phases"].keys()
    assert found["warnings"] == []
    assert "Checkpoint recorded" in chrek("inspect", CHECKPOINT_ID, store=store).stdout


def test_is_exported(store: Path, tmp_path: Path) -> None:
    """All its memory and its archives are found: the pages of both processes, the changed root, the volume."""
    with Store.open(store) as opened, open_checkpoint(opened, CHECKPOINT_ID) as checkpoint:
        exported = export_checkpoint(checkpoint, str(tmp_path / "images"))
        root, cache = (checkpoint.read(path) for path in ("rootfs.tar", "volumes/0.tar"))
    pages = b"".join(path.read_bytes() for path in (tmp_path / "images").glob("pages-*.img"))
    assert len(pages) >= exported.memory_bytes
    assert pages.count(TEXT) >= 1 << 18
    assert pages.count(b"child-") >= 1 << 13
    assert b"changed\n" in member(root, "etc/recorded")
    assert b"in a volume\n" in member(cache, "file")


def member(archive: bytes, name: str) -> bytes:
    """Return the contents of a file of an archive."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        file = opened.extractfile(name)
        assert file is not None
        return file.read()
