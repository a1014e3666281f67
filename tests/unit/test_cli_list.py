"""`chrek list`."""

from __future__ import annotations

from pathlib import Path

import pytest

from chrek.store import Store, pin
from chrekcli import chrek, chrek_json
from sample_store import publish


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a store with two checkpoints, one of them pinned, and one broken."""
    with Store.open(tmp_path, create=True) as opened:
        for name in ("one", "two", "broken"):
            publish(opened, name)
        pin(opened, "two")
    manifest = tmp_path / "broken/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-10])
    return tmp_path


def test_shows_every_checkpoint(store: Path) -> None:
    """Each checkpoint has a line; a broken one is named with its problem."""
    done = chrek("list", store=store)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["ID", "TAKEN", "AGE", "MEMORY", "STORED", "PROCESSES", "PINNED", "COMMAND"]
    assert [line.split()[0] for line in lines[1:]] == ["one", "two"]
    assert " yes " in lines[2]
    assert "python3 -m server" in lines[1]
    assert done.stderr.startswith("broken: CORRUPT: manifest.json")


def test_json(store: Path) -> None:
    """JSON has the same, with sizes in bytes and times in Unix seconds."""
    found = {entry["id"]: entry for entry in chrek_json("list", store=store)}
    assert set(found) == {"one", "two", "broken"}
    assert found["two"]["pinned"]
    assert found["one"]["memory_bytes"] == 1 << 20
    assert found["one"]["created"] == 1_800_000_000.0
    assert found["broken"]["problem"]["reason"] == "CORRUPT"


def test_an_empty_store(tmp_path: Path) -> None:
    """An empty store is no error."""
    done = chrek("list", store=tmp_path)
    assert done.returncode == 0
    assert done.stdout == f"No checkpoints in {tmp_path}.\n"
