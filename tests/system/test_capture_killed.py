"""The capturing program is killed at every step: the application lives, and the old checkpoint stays whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chrek.artifact import Level
from chrek.errors import Reason, Refused
from chrek.store.layout import Store
from chrek.store.opening import identity, open_checkpoint
from chrek.system import procfs
from chrek.system.initstate import application
from containers import Container, needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

CAPTURER = Path(__file__).with_name("capturer.py")
STEPS = [
    *("phase:preflight", "phase:dump", "answer:pre-dump", "answer:query-ext-files", "phase:frozen", "phase:memory"),
    *("after:memory", "answer:status-ready", "phase:finish", "phase:publish"),
]


def run(source: Container, store: Store, step: str, *, number: str = "SIGKILL") -> subprocess.Popen[bytes]:
    """Start a capture that ends itself at *step*."""
    argv = [sys.executable, str(CAPTURER), str(source.pid1), store.path, "one", step]
    with (Path(store.path).parent / "capturer.log").open("wb") as log:
        return subprocess.Popen(argv, stderr=log, env={**os.environ, "SIGNAL": number})


def settled(source: Container) -> bool:
    """Whether no process of the application is stopped or traced any more."""
    states = [procfs.read_text(pid, "status") or "" for pid in procfs.tree(application(source.pid1))]
    return all("TracerPid:\t0" in text and "State:\tt" not in text and "State:\tT" not in text for text in states)


def lives(source: Container) -> None:
    """Check that the application goes on counting."""
    source.until(lambda: settled(source), what="the application to run again")
    before = source.log.count("beat")
    source.until(lambda: source.log.count("beat") > before + 2, what="the application to go on")


def whole(store: Store) -> None:
    """Check that the store's checkpoint is complete and undamaged."""
    with open_checkpoint(store, "one") as checkpoint:
        assert checkpoint.verify(Level.FULL).ok


def no_criu(source: Container) -> bool:
    """Whether no CRIU of a capture is left in the container's namespaces, where captures run it."""
    return not any(procfs.command_line(pid)[:1] == ("ld.so",) for pid in procfs.members("pid", source.pid1))


def test_killed_at_every_step(container: Make, store: Store) -> None:
    """SIGKILL at each step: CRIU rolls back, the application counts on, the checkpoint before is whole, and a new capture works."""
    source = cycle.start(container, cycle.app("beat"))
    cycle.capture(source, store)
    for step in STEPS:
        victim = run(source, store, step)
        assert victim.wait(60) == -signal.SIGKILL, step
        lives(source)
        whole(store)
    source.until(lambda: no_criu(source), what="CRIU to end")
    cycle.capture(source, store)
    source.exec(["touch", "/tmp/go"])
    source.wait_for("ok source")
    source.delete()
    copy = cycle.waiting(container, cycle.app("beat"))
    cycle.restore(copy, store)
    copy.wait_for("ok restored")


def test_killed_at_any_moment(container: Make, store: Store) -> None:
    """SIGKILL at moments spread over a whole capture never hurts the application or the old checkpoint."""
    source = cycle.start(container, cycle.app("beat"))
    began = time.monotonic()
    assert run(source, store, "").wait(60) == 0
    duration = time.monotonic() - began
    for share in random.Random(7).sample(range(100), 12):
        victim = run(source, store, "")
        try:
            victim.wait(duration * share / 100)
        except subprocess.TimeoutExpired:
            victim.kill()
            victim.wait()
        lives(source)
        whole(store)
    cycle.capture(source, store)


@pytest.mark.parametrize("step", ["phase:preflight", "phase:dump", "answer:query-ext-files", "phase:memory", "phase:finish"])
def test_told_to_stop(step: str, container: Make, store: Store) -> None:
    """SIGTERM in a phase ends the capture with its own exit code, nothing published, the application running."""
    source = cycle.start(container, cycle.app("beat"))
    victim = run(source, store, step, number="SIGTERM")
    status = victim.wait(60)
    err = (Path(store.path).parent / "capturer.log").read_bytes()
    assert status == 170, err
    assert b"CAPTURE_INTERRUPTED" in err
    assert not (Path(store.path) / "one").exists()
    lives(source)


def test_two_captures_of_one_id(container: Make, store: Store) -> None:
    """Of two captures of one id at once the second is refused and the first is complete."""
    source = cycle.start(container, cycle.app("beat"))
    other = cycle.start(container, cycle.app("beat"))
    first = run(source, store, "phase:memory", number="SIGSTOP")
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
    argv = [sys.executable, str(CAPTURER), str(other.pid1), store.path, "one", ""]
    second = subprocess.run(argv, capture_output=True, check=False)
    assert second.returncode == 172
    assert b"CAPTURE_IN_PROGRESS" in second.stderr
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    whole(store)
    lives(source)
    lives(other)


def test_what_was_written_meanwhile_stays(container: Make, store: Store) -> None:
    """A capture that is to take the place of what its caller has seen leaves alone what was written since."""
    source = cycle.start(container, cycle.app("beat"))
    assert identity(store, "one") == ""
    cycle.capture(source, store, instead_of="")
    first = identity(store, "one")
    with pytest.raises(Refused) as caught:
        cycle.capture(source, store, instead_of="")
    assert caught.value.reason is Reason.CAPTURE_IN_PROGRESS
    assert identity(store, "one") == first
    cycle.capture(source, store, instead_of=first)
    assert identity(store, "one") not in ("", first)
    whole(store)
    lives(source)


def test_client_that_hangs(container: Make, store: Store) -> None:
    """A capturing program killed while it is stopped inside the freeze leaves the application running."""
    source = cycle.start(container, cycle.app("beat"))
    victim = run(source, store, "phase:memory", number="SIGSTOP")
    os.waitid(os.P_PID, victim.pid, os.WSTOPPED | os.WNOWAIT)
    assert not settled(source)
    victim.kill()
    victim.wait()
    lives(source)
