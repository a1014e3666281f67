"""`chrek gc`, `chrek pin` and `chrek unpin`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from chrek.store import Store
from chrekcli import chrek, chrek_json
from sample_store import CONTENTS, publish

_SIZE = sum(map(len, CONTENTS.values()))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a store with checkpoints of one, two and three days."""
    with Store.open(tmp_path, create=True) as opened:
        for days, name in ((3, "old"), (2, "middle"), (1, "new")):
            publish(opened, name, created=time.time() - days * 86400)
    return tmp_path


def ids(store: Path) -> list[str]:
    """Return what is in the store."""
    return [entry["id"] for entry in chrek_json("list", store=store)]


def test_without_limits_nothing_goes(store: Path) -> None:
    """Without a limit no checkpoint is deleted."""
    assert chrek("gc", store=store).stdout == "0 B were freed, 0 B moved to the trash\n"
    assert ids(store) == ["middle", "new", "old"]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--max-age", "60h"], ["middle", "new"]),
        (["--max-count", "1"], ["new"]),
        (["--max-bytes", str(2 * _SIZE)], ["middle", "new"]),
        (["--max-count", "0", "--keep", "old"], ["old"]),
    ],
)
def test_limits(store: Path, options: list[str], left: list[str]) -> None:
    """Past a limit of age, count or size the oldest go; those that are kept stay."""
    assert chrek("gc", *options, store=store).returncode == 0
    assert ids(store) == left


def test_dry_run_says_what_and_why(store: Path) -> None:
    """--dry-run changes nothing and gives the reason for each checkpoint."""
    done = chrek("gc", "--max-age", "36h", "--dry-run", store=store)
    assert "would delete old (" in done.stdout
    assert "s old, more than 129600 s" in done.stdout
    assert ids(store) == ["middle", "new", "old"]


def test_pins(store: Path) -> None:
    """A pinned checkpoint stays, with a line that says so, until it is unpinned."""
    assert chrek("pin", "old", store=store).stdout == "old: pinned\n"
    done = chrek("gc", "--max-count", "0", store=store)
    assert "keep old: pinned; " in done.stdout
    assert ids(store) == ["old"]
    assert chrek("unpin", "old", store=store).stdout == "old: not pinned\n"
    assert chrek("gc", "--max-count", "0", store=store).returncode == 0
    assert ids(store) == []


def test_space_comes_back_after_the_grace_period(store: Path) -> None:
    """What was deleted waits in the trash for the grace period, and is then removed."""
    chrek("delete", "old", store=store)
    assert not chrek_json("gc", store=store)["actions"]
    (action,) = chrek_json("gc", "--grace", "0", store=store)["actions"]
    assert (action["what"], action["bytes"] >= _SIZE, action["skipped"]) == ("purge", True, None)
    assert not list((store / ".trash").iterdir())


def test_json_of_pins(store: Path) -> None:
    """JSON lists the ids."""
    assert chrek_json("pin", "a", "b", store=store) == {"pinned": ["a", "b"]}
    assert chrek_json("unpin", "a", store=store) == {"unpinned": ["a"]}
