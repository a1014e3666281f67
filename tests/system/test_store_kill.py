"""kill -9 at every call that changes a store: the old checkpoint or the new one, and an orderly store afterwards.

A child process does the operation with the functions of `os` wrapped so that it kills itself before, or just after,
the n-th call that changes something; n grows until the child gets to the end. Every such call of this
project goes through `os`, which a trace of the system calls confirms.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chrek.errors import Reason, Refused
from chrek.store import Policy, Staging, Store, collect, delete, list_checkpoints, open_checkpoint, pin, plan
from interrupt import interrupt_at
from sample_store import fill, make_manifest, publish, read_or_none

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OLD = {"dump.log": b"old", "images/a": b"old", "memory/0": b"old" * 30_000}
_NEW = {"dump.log": b"new!", "images/a": b"new!", "volumes/0.tar": b"new!"}


@pytest.fixture
def memory() -> Iterator[Path]:
    """Give a directory in memory: hundreds of flushes to a disk would take minutes and show nothing more."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def _run_killed(operation: Callable[[], object], at: int, *, after: bool) -> bool:
    """Run in a child that kills itself at the *at*-th change; False when it got to its end before."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            interrupt_at(at, lambda: os.kill(os.getpid(), signal.SIGKILL), after=after)
            operation()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _each_kill(prepare: Callable[[], None], operation: Callable[[], object], check: Callable[[bool], None]) -> int:
    """Kill *operation* at each change in turn; *check* is told whether this one was killed. Returns how many."""
    for at in range(1, 1000):
        killed = False
        for after in (False, True):
            prepare()
            killed = _run_killed(operation, at, after=after)
            check(killed)
        if not killed:
            return at - 1
    raise AssertionError("it never came to an end")


def _content(store: Store) -> str:
    """What a reader finds: ``old``, ``new`` or ``none``; anything else fails the test."""
    found = read_or_none(store, "abc")
    assert found in (None, _OLD, _NEW)
    return "none" if found is None else "old" if found == _OLD else "new"


def _assert_orderly(store: Store) -> None:
    """After a garbage collection nothing is left over but what is linked."""
    collect(store, plan(store, Policy(grace=0)))
    collect(store, plan(store, Policy(grace=0)))  # the first one filled the trash
    assert plan(store, Policy(grace=0)).actions == ()
    found = _content(store)
    root = Path(store.path)
    for private in (".staging", ".links", ".trash"):
        if (root / private).exists():
            assert os.listdir(root / private) == []
    generations = list((root / ".generations").glob("*/*")) if (root / ".generations").exists() else []
    assert len(generations) == (found != "none" and (root / "abc").is_symlink())
    assert [listed.problem for listed in list_checkpoints(store)] == [None] * (found != "none")


def _fresh(path: Path, first: str) -> None:
    """Make the store anew with nothing, a published checkpoint, or one in a plain directory."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    if first == "none":
        return
    with Store.open(path) as store:
        publish(store, "abc", _OLD)
    if first == "plain":
        shutil.copytree(path / "abc", path / "aside")
        (path / "abc").unlink()
        shutil.rmtree(path / ".generations")
        (path / "aside").rename(path / "abc")


@pytest.mark.parametrize("first", ["none", "published", "plain"])
def test_a_publication_killed_anywhere_leaves_the_old_or_the_new(memory: Path, first: str) -> None:
    """Readers find it at once, without any repair; the next capture and the collection put the rest in order."""
    path = memory / "store"
    before = "none" if first == "none" else "old"
    seen = set()

    def operation() -> None:
        with Store.open(path) as store:
            publish(store, "abc", _NEW)

    def check(killed: bool) -> None:
        with Store.open(path) as store:
            found = _content(store)
            seen.add(found)
            assert found in ({before, "new"} if killed else {"new"})
            _assert_orderly(store)
            assert _content(store) == found
            publish(store, "abc", _NEW)
            assert _content(store) == "new"

    steps = _each_kill(lambda: _fresh(path, first), operation, check)
    assert seen == {before, "new"}
    assert steps > 30


@pytest.mark.parametrize("first", ["published", "plain"])
def test_a_deletion_killed_anywhere_leaves_the_old_or_nothing(memory: Path, first: str) -> None:
    """What was half deleted is never seen, and does not come back."""
    path = memory / "store"
    seen = set()

    def operation() -> None:
        with Store.open(path) as store:
            delete(store, "abc")

    def check(killed: bool) -> None:
        with Store.open(path) as store:
            found = _content(store)
            seen.add(found)
            assert found in ({"old", "none"} if killed else {"none"})
            _assert_orderly(store)
            assert _content(store) == found

    assert _each_kill(lambda: _fresh(path, first), operation, check) > 5
    assert seen == {"old", "none"}


def test_a_collection_killed_anywhere_harms_nothing_that_stays(memory: Path) -> None:
    """Expired trash, debris of a dead writer and an old checkpoint go; a pinned one is whole after each kill."""
    path = memory / "store"

    def prepare() -> None:
        _fresh(path, "published")
        with Store.open(path) as store:
            publish(store, "old", _OLD, created=0)
            publish(store, "abc", _OLD, created=0)
            pin(store, "abc")
            staging = path / ".staging" / "dead"
            staging.mkdir()
            (staging / "shard").write_bytes(b"x")

    def operation() -> None:
        with Store.open(path) as store:
            outcomes = collect(store, plan(store, Policy(max_age=1, grace=0)))
            assert [outcome.skipped for outcome in outcomes] == [None] * 3

    def check(killed: bool) -> None:
        with Store.open(path) as store:
            assert _content(store) == "old"
            collect(store, plan(store, Policy(max_age=1, grace=0)))
            _assert_orderly(store)
            with pytest.raises(Refused):
                open_checkpoint(store, "old")
        assert killed or not (path / ".staging" / "dead").exists()

    assert _each_kill(prepare, operation, check) > 15


def test_recovery_killed_anywhere_is_simply_run_again(memory: Path) -> None:
    """A capture that starts after a killed one is killed too, at each step of its cleaning up."""
    path = memory / "store"

    def prepare() -> None:
        _fresh(path, "plain")
        # The worst moment: the plain directory is in the trash, the link has not got its name yet.
        with Store.open(path) as store:
            publish(store, "abc", _NEW)
        shutil.copytree(path / ".generations" / "abc" / "1", path / ".generations" / "abc" / "2")
        (path / "abc").rename(path / ".links" / "abc")
        (path / ".staging" / "abc").mkdir()
        (path / ".staging" / "abc" / "shard").touch()

    def operation() -> None:
        with Store.open(path) as store:
            Staging.create(store, "abc").discard()

    def check(killed: bool) -> None:
        with Store.open(path) as store:
            assert _content(store) == "new"
            _assert_orderly(store)
            assert _content(store) == "new"

    assert _each_kill(prepare, operation, check) > 10


def test_the_id_is_free_when_its_capture_was_killed(tmp_path: Path) -> None:
    """The lock dies with its holder, and the unfinished files go with the next capture."""
    with Store.open(tmp_path) as store:
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            staging = Staging.create(store, "abc")
            fill(staging, _OLD)
            os.write(told, b"x")
            signal.pause()
        os.read(ready, 1)
        with pytest.raises(Refused) as caught:
            Staging.create(store, "abc")
        assert caught.value.reason is Reason.CAPTURE_IN_PROGRESS
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with Staging.create(store, "abc") as staging:
            assert os.listdir(staging.fd) == []
            files = fill(staging, _NEW)
            staging.publish(make_manifest("abc", files))
        os.close(ready)
        os.close(told)


_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from chrek.store import Policy, Store, collect, delete, plan
from sample_store import publish
with Store.open(sys.argv[2], create=True) as store:
    publish(store, "abc"); publish(store, "abc"); delete(store, "abc"); publish(store, "abc")
    collect(store, plan(store, Policy(grace=0)))
"""


def test_no_directory_is_ever_exchanged_and_every_change_goes_through_os(tmp_path: Path) -> None:
    """The system calls of a whole life: rename without flags only, and none that the kill tests could miss."""
    log = tmp_path / "trace"
    tests = Path(__file__).parents[1]
    command = ["strace", "-f", "-o", str(log), "-e", "trace=%file,%desc", sys.executable, "-I", "-B", "-c", _PROGRAM]
    subprocess.run([*command, str(tests), str(tmp_path / "store")], check=True, timeout=100)
    calls = re.findall(r"^\d+ +(\w+)\((.*)$", log.read_text(), re.MULTILINE)
    names = {name for name, _ in calls}
    assert "renameat" in names | {"renameat2"}
    assert not [args for name, args in calls if name == "renameat2" and not args.rstrip().split(")")[0].endswith(" 0")]
    changing = {"rename", "renameat", "renameat2", "mkdirat", "symlinkat", "unlinkat", "fsync", "fdatasync", "fchmod",
                "write", "pwrite64", "ftruncate", "openat"}  # fmt: skip
    others = {"link", "linkat", "mknod", "mknodat", "truncate", "fallocate", "chmod", "fchmodat", "rmdir", "unlink",
              "symlink", "sendfile", "copy_file_range", "syncfs", "creat", "openat2"}  # fmt: skip
    assert changing - {"rename", "renameat2"} <= names
    assert names & others == set()
    assert [name for name, _ in calls].count("mkdir") == 1  # the store itself, made by its opening


def test_a_file_system_that_knows_no_exchange_and_a_filter_without_openat2_are_enough(tmp_path: Path) -> None:
    """The whole life works where renameat2 is not valid, and where a seccomp filter knows no openat2."""
    tests = Path(__file__).parents[1]
    faults = ["-e", "inject=renameat2:error=EINVAL", "-e", "inject=openat2:error=EPERM"]
    command = ["strace", "-f", "-o", "/dev/null", "-e", "trace=renameat2,openat2", *faults, sys.executable, "-I", "-c"]
    subprocess.run([*command, _PROGRAM, str(tests), str(tmp_path / "store")], check=True, timeout=100)
    with Store.open(tmp_path / "store") as store:
        assert read_or_none(store, "abc") is not None
