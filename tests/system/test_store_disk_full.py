"""A full disk at every write: the capture fails by name, the old checkpoint stays, space comes back."""

from __future__ import annotations

import itertools
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chrek.errors import CaptureFailed, Reason
from chrek.store import Policy, Staging, Store, collect, delete, free_bytes, list_checkpoints, plan, write_failed
from sample_store import fill, make_manifest, publish, read_all

if TYPE_CHECKING:
    from collections.abc import Iterator

_OLD = {"dump.log": b"old", "images/a": b"old"}
_NEW = {name: os.urandom(9000) for name in ("dump.log", "images/a", "images/b", "memory/0", "volumes/0.tar")}


@contextmanager
def _tmpfs(path: Path, options: str) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def _capture(store: Store) -> Reason | None:
    """Write and publish; returns why that failed."""
    try:
        with Staging.create(store, "abc") as staging:
            staging.publish(make_manifest("abc", fill(staging, _NEW)))
    except OSError as error:
        return write_failed(error, "the checkpoint").reason
    except CaptureFailed as error:
        return error.reason
    return None


@pytest.mark.parametrize("limit", ["size={}k", "nr_inodes={}"])
def test_a_disk_that_fills_up_at_any_write_costs_only_the_new_checkpoint(tmp_path: Path, limit: str) -> None:
    """From no room at all, a page or an inode more each time, until it fits; blocks and inodes alike."""
    step = 4 if "size" in limit else 1
    with _tmpfs(tmp_path / "store", "size=100m"), Store.open(tmp_path / "store") as store:
        publish(store, "abc", _OLD)
        used = os.statvfs(store.path)
        start = (used.f_blocks - used.f_bfree) * 4 if step == 4 else used.f_files - used.f_ffree
        failures = 0
        for room in range(start, start + 300, step):
            _limit(store.path, limit.format(room))
            free = free_bytes(store.fd)
            reason = _capture(store)
            if reason is None:
                break
            assert reason is Reason.NO_SPACE
            assert free_bytes(store.fd) == free
            assert read_all(store, "abc") == _OLD
            assert os.listdir(f"{store.path}/.staging") == []
            failures += 1
        assert read_all(store, "abc") == _NEW
        assert failures >= 10


def test_a_full_disk_can_be_cleaned_up(tmp_path: Path) -> None:
    """Deleting and collecting need no space."""
    with _tmpfs(tmp_path / "store", "size=4m,nr_inodes=400"), Store.open(tmp_path / "store") as store:
        publish(store, "abc", _NEW)
        publish(store, "old", _NEW, created=0)
        with pytest.raises(OSError, match="No space"):
            Path(store.path, "filler").write_bytes(bytes(8 << 20))
        with pytest.raises(OSError, match="No space"):
            _use_all_inodes(Path(store.path))
        delete(store, "abc")
        outcomes = collect(store, plan(store, Policy(max_age=1, grace=0)))
        assert [outcome.skipped for outcome in outcomes] == [None, None]
        collect(store, plan(store, Policy(grace=0)))
        assert list_checkpoints(store) == ()
        assert os.listdir(f"{store.path}/.trash") == []


def _use_all_inodes(path: Path) -> None:
    for number in itertools.count():
        (path / f"filler-{number}").touch()


def _limit(path: str, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", path], check=True)
