"""Word of failed captures, for those who wait."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chrek.artifact import Marker
from chrek.store import Store, failures

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Give an empty store."""
    with Store.open(tmp_path / "store", create=True) as store:
        yield store


def _failure(error: str = "NO_SPACE: full") -> Marker:
    return Marker(
        checkpoint_id="abc",
        checkpoint_path="/checkpoints/abc",
        timestamp="2026-01-01T00:00:00Z",
        success=False,
        error=error,
        extra={"reason": "NO_SPACE"},
    )


def _file(store: Store) -> Path:
    return Path(store.path, ".failed", "abc")


def test_the_last_failure_is_found_by_those_who_waited_before_it(store: Store) -> None:
    """A newer one replaces it; who began to wait later finds nothing; a capture that works takes it back."""
    assert failures.find(store, "abc", since=0) is None
    failures.note(store, _failure("NO_SPACE: first"))
    failures.note(store, _failure())
    os.utime(_file(store), (1000, 1000))
    assert failures.find(store, "abc", since=999) == _failure()
    assert failures.find(store, "abc", since=1000) is None
    assert os.listdir(_file(store).parent) == ["abc"]
    assert _file(store).stat().st_mode & 0o777 == 0o600
    failures.forget(store, "abc")
    failures.forget(store, "abc")
    assert failures.find(store, "abc", since=0) is None


def test_what_makes_no_sense_is_no_failure(store: Store) -> None:
    """A link, a pipe, text that is no marker and a successful one say nothing."""
    failures.note(store, _failure())
    secret = Path(store.path, "secret")
    _file(store).rename(secret)
    _file(store).symlink_to(secret)
    assert failures.find(store, "abc", since=0) is None
    _file(store).unlink()
    os.mkfifo(_file(store))
    assert failures.find(store, "abc", since=0) is None
    _file(store).unlink()
    for text in ("", "{}", '{"success": false}'):
        _file(store).write_text(text)
        assert failures.find(store, "abc", since=0) is None


def test_old_ones_go(store: Store) -> None:
    """Nobody waits for an hour without having looked."""
    failures.note(store, _failure())
    os.utime(_file(store), (1000, 1000))
    failures.remove_old(store, now=1000 + failures.KEEP_SECONDS)
    assert _file(store).exists()
    failures.remove_old(store, now=1001 + failures.KEEP_SECONDS)
    assert not _file(store).exists()
