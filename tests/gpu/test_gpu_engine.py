"""A GPU application through the whole engine: captured while it runs on, restored, the same answers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.engine import capture as capturing
from chrek.engine import restore as restoring
from chrek.errors import ChrekError
from chrek.store.layout import Store
from chrek.system.mailbox import Mailbox
from containers import needs
from system.cycle import mode
from system.pidns import INIT, Contained

pytestmark = [pytest.mark.timeout(240), needs("criu")]

ANSWERING = Path(__file__).with_name("answering.py")


def command(gigabytes: float) -> list[str]:
    """Return the command of a model of that size under the init."""
    return [*INIT, sys.executable, str(ANSWERING), str(gigabytes)]


def answers(process: Contained, count: int = 1) -> set[str]:
    """Return the digests of the next answers."""
    found: set[str] = set()
    seen = 0
    while seen < count:
        words = process.line().split()
        assert words, process.stderr()
        if words[0] == "answer":
            found.add(words[2])
            seen += 1
    return found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Return a store in memory where there is one, else on disk."""
    place = Path(os.environ.get("CHREK_TEST_STORE", tmp_path)) / f"store-{os.getpid()}"
    with Store.open(place, create=True) as opened:
        yield opened


def restore(process: Contained, store: Store) -> restoring.Outcome:
    """Restore into a waiting init."""
    while mode(process.pid) != "waiting":
        time.sleep(0.005)
    with Mailbox.claim(process.pid, by="test") as mailbox:
        request = restoring.Request(pid1=process.pid, mailbox=mailbox, store=store, checkpoint_id="gpu")
        try:
            return restoring.restore(request)
        except ChrekError as error:
            mailbox.failed(error.reason, error.message)
            raise


@pytest.mark.parametrize("gigabytes", [0.5, 2])
def test_transparent(gigabytes: float, store: Store) -> None:
    """Without the application's help: the source answers on, two restored copies answer the same."""
    with Contained(command(gigabytes)) as source:
        expected = answers(source)
        outcome = capturing.capture(capturing.Request(pid1=source.pid, store=store, checkpoint_id="gpu"))
        print("capture", gigabytes, outcome.seconds, outcome.frozen_seconds, dict(outcome.phases))  # noqa: T201
        assert answers(source, 20) == expected
    for _ in range(2):
        with Contained(command(gigabytes), env={**os.environ, "DYN_CHECKPOINT_HASH": "gpu"}) as copy:
            restored = restore(copy, store)
            print("restore", gigabytes, restored.seconds, dict(restored.phases))  # noqa: T201
            assert answers(copy, 20) == expected
            assert "start=restored" in copy.stderr()
