"""An error of the disk, or an interrupt, at every call that changes a store: the outcome told is the outcome.

A child process publishes while its n-th change raises; it ends with a status that says what `publish` told it.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chrek.errors import CaptureFailed, Reason
from chrek.store import Store
from interrupt import interrupt_at
from sample_store import publish, read_or_none

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OLD = {"dump.log": b"old", "images/a": b"old"}
_NEW = {"dump.log": b"new!", "images/a": b"new!", "volumes/0.tar": b"new!"}
_PUBLISHED, _FAILED, _INTERRUPTED, _ENDED = 10, 11, 12, 13


@pytest.fixture
def memory() -> Iterator[Path]:
    """Give a directory in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def _fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _interrupt() -> None:
    raise KeyboardInterrupt


def _prepare(path: Path, first: str) -> dict[str, bytes] | None:
    shutil.rmtree(path, ignore_errors=True)
    with Store.open(path, create=True) as store:
        if first == "none":
            return None
        publish(store, "abc", _OLD)
    if first == "plain":
        (path / "abc").unlink()
        (path / ".generations" / "abc" / "1").rename(path / "abc")
    return _OLD


def _publish(path: Path, at: int, action: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        happened = []

        def act() -> None:
            happened.append(at)
            action()

        status = 1
        try:
            with Store.open(path) as store:
                interrupt_at(at, act)
                publish(store, "abc", _NEW)
            status = _PUBLISHED if happened else _ENDED
        except CaptureFailed as error:
            status = _FAILED if error.reason is Reason.WRITE_FAILED and error.exit_code == 170 else 2
        except OSError:  # what the test itself writes
            status = _FAILED
        except KeyboardInterrupt:
            status = _INTERRUPTED
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("first", ["none", "published", "plain"])
@pytest.mark.parametrize("action", [_fail, _interrupt])
def test_what_publish_says_is_so(memory: Path, first: str, action: Callable[[], None]) -> None:
    """Failed: the old one is there. Published: the new one. Interrupted: one of them. Then all goes on as usual."""
    path = memory / "store"
    seen = set()
    for at in range(1, 200):
        before = _prepare(path, first)
        status = _publish(path, at, action)
        seen.add(status)
        with Store.open(path) as store:
            found = read_or_none(store, "abc")
            match status:
                case 10 | 13:
                    assert found == _NEW
                case 11:
                    assert found == before
                    assert not os.path.lexists(path / ".links" / "abc")
                case 12:
                    assert found in (before, _NEW)
                case _:
                    raise AssertionError(f"status {status} at change {at}")
            publish(store, "abc", _OLD)
            assert read_or_none(store, "abc") == _OLD
            assert os.listdir(path / ".generations" / "abc") == [os.readlink(path / "abc").rpartition("/")[2]]
            assert os.listdir(path / ".staging") == []
        if status == _ENDED:
            break
    # Some errors cost nothing: that of signing the lock file, or of putting the old one away.
    assert seen == {_ENDED, _PUBLISHED, _FAILED if action is _fail else _INTERRUPTED} or (
        seen == {_ENDED, _INTERRUPTED} and action is _interrupt
    )
