"""`chrek verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chrek.store import Store
from chrekcli import chrek, chrek_json
from sample_store import publish


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a store with two checkpoints."""
    with Store.open(tmp_path, create=True) as opened:
        publish(opened, "one")
        publish(opened, "two")
    return tmp_path


def test_whole_checkpoints(store: Path) -> None:
    """A whole checkpoint is ok, with what was read."""
    done = chrek("verify", "one", store=store)
    assert done.returncode == 0
    assert done.stdout.startswith("one: ok; ")
    assert [entry["ok"] for entry in chrek_json("verify", "--all", store=store)] == [True, True]


def test_shows_every_difference(store: Path) -> None:
    """All differences are shown, and the exit code is 172."""
    (store / "one/memory/shard-0").write_bytes(b"x" * (251 * 700))
    (store / "one/images/empty.img").unlink()
    (store / "one/images/extra.img").touch()
    done = chrek("verify", "--all", store=store)
    assert done.returncode == 172
    assert "one: damaged; 3 differences" in done.stdout
    assert "images/empty.img: is missing" in done.stdout
    assert "images/extra.img: a regular file that is not in the manifest" in done.stdout
    assert "memory/shard-0: the digest of block 0 (at byte 0) differs" in done.stdout
    assert "two: ok" in done.stdout


def test_json_of_a_damaged_one(store: Path) -> None:
    """JSON lists each file with what is wrong."""
    (store / "one/dump.log").write_bytes(b"(00.000001) dumpeD\n")
    done = chrek("verify", "one", "--json", store=store)
    assert done.returncode == 172
    (result,) = json.loads(done.stdout)
    assert result["problems"] == [{"path": "dump.log", "text": "its digest differs"}]


def test_one_that_is_not_there(store: Path) -> None:
    """A checkpoint that is not there is a failure, and the others are verified all the same."""
    done = chrek("verify", "none", "two", store=store)
    assert done.returncode == 172
    assert "none: not usable" in done.stdout
    assert "NOT_FOUND" in done.stderr
    assert "two: ok" in done.stdout
