"""Clocks of a restored application: they go on from the checkpoint, in a time namespace that only the tree is in."""

from __future__ import annotations

import time

from chrek.store.layout import Store
from chrek.system import procfs
from chrek.system.initstate import application
from containers import Container, needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

# Says again and again what its clocks are, and how long its own sleeps take by them.
CLOCK = """
import time
print("ready", flush=True)
while True:
    before = time.monotonic()
    time.sleep(0.05)
    boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    print("clock", time.monotonic(), boot, time.time(), time.monotonic() - before, flush=True)
"""
COMMAND = [cycle.INIT, "--", "python3", "-c", CLOCK]


def _clocks(container: Container) -> list[tuple[float, ...]]:
    lines = [
        line for line in container.log.splitlines(keepends=True) if line.startswith("clock ") and line.endswith("\n")
    ]
    return [tuple(map(float, line.split()[1:])) for line in lines]


def _count(container: Container, number: int) -> None:
    container.until(lambda: len(_clocks(container)) >= number, what=f"{number} looks at the clock")


def test_clocks_go_on(container: Make, store: Store) -> None:
    """Monotonic and boot time go on where they stood, through three generations; wall time is this machine's; sleeps end."""
    source = cycle.start(container, COMMAND)
    _count(source, 3)
    cycle.capture(source, store, "generation-0")
    last = _clocks(source)[-1]
    source.delete()
    for generation in range(3):
        copy = cycle.waiting(container, COMMAND, f"generation-{generation}")
        cycle.restore(copy, store, f"generation-{generation}")
        _count(copy, 3)
        first = _clocks(copy)[0]
        # What the source said after its capture, and while it was deleted, is not the copy's past.
        assert abs(first[0] - last[0]) < 30
        assert abs(first[1] - last[1]) < 30
        assert abs(first[2] - time.time()) < 30
        assert all(0.04 < slept < 30 for *_, slept in _clocks(copy))
        assert _clocks(copy) == sorted(_clocks(copy))
        root = application(copy.pid1)
        assert procfs.namespace(root, "time") != procfs.namespace(copy.pid1, "time")
        cycle.capture(copy, store, f"generation-{generation + 1}")
        last = _clocks(copy)[-1]
        copy.delete()


def test_programs_that_enter_have_the_containers_clocks(container: Make, store: Store) -> None:
    """What is executed in a restored container (an exec probe, a shell) has PID 1's clocks, and is in PID 1's namespace."""
    source = cycle.start(container, COMMAND)
    cycle.capture(source, store)
    source.delete()
    copy = cycle.waiting(container, COMMAND)
    cycle.restore(copy, store)
    said = copy.exec(["python3", "-c", "import os,time; print(os.readlink('/proc/self/ns/time'), time.monotonic())"])
    namespace, now = said.split()
    assert namespace == procfs.namespace(copy.pid1, "time")
    assert abs(float(now) - time.monotonic()) < 30
