"""A store shared by many: several writers and collectors at once, readers without write access, planted devices."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chrek.artifact import Level
from chrek.errors import ChrekError, Reason, Refused
from chrek.store import (
    Policy,
    Staging,
    Store,
    collect,
    delete,
    list_checkpoints,
    open_checkpoint,
    plan,
)
from sample_store import CONTENTS, publish, read_all, read_or_none, tree_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SECONDS = 4.0
_ALLOWED = frozenset({Reason.CAPTURE_IN_PROGRESS, Reason.NOT_FOUND})


def _contents(seed: int) -> dict[str, bytes]:
    return {"dump.log": b"%d" % seed, "images/a": b"%d" % seed * 100, "memory/0": b"%d" % seed * 20_000}


def _writer(store: Store, choice: random.Random) -> None:
    publish(store, choice.choice("ab"), _contents(choice.randrange(10**6)), created=time.time())


def _deleter(store: Store, choice: random.Random) -> None:
    delete(store, choice.choice("ab"))


def _collector(store: Store, choice: random.Random) -> None:
    # No grace would take the generation that a reader has open: the grace period is what protects it.
    collect(store, plan(store, Policy(max_count=choice.randrange(3), grace=30)))


def _reader(store: Store, choice: random.Random) -> None:
    found = read_or_none(store, choice.choice("ab"))
    assert found is None or found == _contents(int(found["dump.log"]))


def _lister(store: Store, choice: random.Random) -> None:
    for listed in list_checkpoints(store):
        assert listed.problem is None or listed.problem.reason is Reason.NOT_FOUND


def _work(path: Path, act: Callable[[Store, random.Random], None], seed: int) -> int:
    """Do *act* again and again in a child process, with no other failures than those that mean contention."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        choice = random.Random(seed)
        end = time.monotonic() + _SECONDS
        with Store.open(path) as store:
            while time.monotonic() < end:
                try:
                    act(store, choice)
                except ChrekError as error:
                    if error.reason not in _ALLOWED:
                        raise
        status = 0
    finally:
        os._exit(status)


def test_writers_deleters_collectors_and_readers_at_once(tmp_path: Path) -> None:
    """Every reader always finds one whole checkpoint or none; afterwards the store is in order."""
    acts = [_writer, _writer, _deleter, _collector, _reader, _reader, _lister]
    children = [_work(tmp_path, act, seed) for seed, act in enumerate(acts)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(acts)
    with Store.open(tmp_path) as store:
        for name in "ab":
            publish(store, name, _contents(7))
            assert read_all(store, name) == _contents(7)
        for _ in range(2):
            collect(store, plan(store, Policy(grace=0)))
        assert plan(store, Policy(grace=0)).actions == ()
    assert os.listdir(tmp_path / ".trash") == []
    assert os.listdir(tmp_path / ".staging") == []
    assert {name for name in tree_of(tmp_path) if name.startswith(".generations") and name.count("/") == 2} == {
        f".generations/{name}/{os.readlink(tmp_path / name).rpartition('/')[2]}" for name in "ab"
    }


@contextmanager
def _read_only(path: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", str(path), str(path)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(path)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_read_only_store_is_read_without_a_write(tmp_path: Path) -> None:
    """Opening, verifying, listing and planning work; what has to write fails by name."""
    with Store.open(tmp_path) as store:
        publish(store, "abc")
        publish(store, "abc")
    with _read_only(tmp_path), Store.open(tmp_path) as store:
        assert read_all(store, "abc") == CONTENTS
        assert [listed.checkpoint_id for listed in list_checkpoints(store)] == ["abc"]
        assert len(plan(store, Policy(max_count=0, grace=0)).actions) == 2
        for change in (lambda: Staging.create(store, "new"), lambda: delete(store, "abc")):
            with pytest.raises(ChrekError, match="Read-only file system") as caught:
                change()
            assert caught.value.reason is Reason.WRITE_FAILED
        outcomes = collect(store, plan(store, Policy(max_count=0, grace=0)))
        assert all("Read-only" in (outcome.skipped or "") for outcome in outcomes)
        assert read_all(store, "abc") == CONTENTS


@pytest.mark.parametrize("name", ["dump.log", "memory/shard-0", "manifest.json", "checkpoint.done"])
@pytest.mark.parametrize("device", ["zero", "null", "tty", "loop-control"])
def test_a_device_in_place_of_a_file_is_found_and_not_opened(tmp_path: Path, name: str, device: str) -> None:
    """Endless, empty, blocking or dangerous devices: reported by type, without one open call."""
    with Store.open(tmp_path / "store", create=True) as store:
        publish(store, "abc")
        path = tmp_path / "store" / "abc" / name
        path.unlink()
        os.mknod(path, stat.S_IFCHR | 0o600, os.stat(f"/dev/{device}").st_rdev)
        try:
            with open_checkpoint(store, "abc") as checkpoint:
                texts = [str(problem) for level in Level for problem in checkpoint.verify(level).problems]
        except Refused as error:
            texts = [error.message]
        assert texts
        assert all("character device" in text and name in text for text in texts)


def test_another_user_cannot_read_a_checkpoint(tmp_path: Path) -> None:
    """Whoever is not the owner is refused by name, and nothing else happens."""
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents:
        if parent.name.startswith("pytest"):
            os.chmod(parent, 0o755)
    with Store.open(tmp_path) as store:
        publish(store, "abc")
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with Store.open(tmp_path) as store:
                open_checkpoint(store, "abc")
            os._exit(1)
        except Refused as error:
            os._exit(0 if "Permission denied" in error.message else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
