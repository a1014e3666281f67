"""`chrek delete`."""

from __future__ import annotations

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


def test_deletes_what_is_named(store: Path) -> None:
    """The named ones are gone, the others stay."""
    done = chrek("delete", "one", store=store)
    assert done.returncode == 0
    assert done.stdout == "one: deleted\n"
    assert [entry["id"] for entry in chrek_json("list", store=store)] == ["two"]


def test_goes_on_after_one_that_is_not_there(store: Path) -> None:
    """One that is not there is an error, and the others are deleted all the same."""
    done = chrek("delete", "none", "two", store=store)
    assert done.returncode == 172
    assert "There is no checkpoint 'none'" in done.stderr
    assert done.stdout == "two: deleted\n"


def test_json(store: Path) -> None:
    """JSON lists what was deleted."""
    assert chrek_json("delete", "one", "two", store=store) == {"deleted": ["one", "two"]}
