"""The store's file system fills up in the middle of a capture: nothing is published, the application runs on."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.artifact import Level
from chrek.engine import capture as capturing
from chrek.engine.progress import Progress
from chrek.errors import CaptureFailed, Reason
from chrek.store.layout import Store
from chrek.store.opening import open_checkpoint
from containers import Container, needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

PHASES = ["dump", "frozen", "memory", "finish", "publish"]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 400 MiB in memory."""
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, left: int) -> None:
    """Leave about *left* bytes of a file system free, whoever else writes to it meanwhile."""
    with (place / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
        os.truncate(file.fileno(), max(file.tell() - left, 0))


def more(source: Container, before: int) -> bool:
    """Whether the application has gone on counting."""
    return source.log.count("beat") > before + 1


@pytest.mark.parametrize("left", [0, 4096, 64 << 10, 1 << 20])
def test_full_in_each_phase(left: int, container: Make, place: Path) -> None:
    """With *left* bytes free from the start of any phase on, the capture fails as it should, or fits and is whole."""
    source = cycle.start(container, cycle.app("beat"))
    with Store.open(place / "store", create=True) as store:
        cycle.capture(source, store, "old")
        failures: list[Reason] = []
        for phase in PHASES:

            def listener(name: str, done: int, total: int, *, wanted: str = phase) -> None:
                if name == wanted and not done and not (place / "ballast").exists():
                    fill(place, left)

            request = capturing.Request(pid1=source.pid1, store=store, checkpoint_id="new")
            try:
                capturing.capture(request, Progress(listener=listener))
            except CaptureFailed as error:
                failures.append(error.reason)
                assert not (place / "store/new").exists()
            else:
                with open_checkpoint(store, "new") as checkpoint:
                    assert checkpoint.verify(Level.FULL).ok
                (place / "store/new").unlink()
            (place / "ballast").unlink(missing_ok=True)
            before = source.log.count("beat")
            source.until(functools.partial(more, source, before), what="the application to go on")
            with open_checkpoint(store, "old") as checkpoint:
                assert checkpoint.verify(Level.FULL).ok
        assert set(failures) <= {Reason.NO_SPACE, Reason.WRITE_FAILED, Reason.DUMP_FAILED}, failures
        # Nothing of the failed ones is in the way of the next.
        cycle.capture(source, store, "new")
