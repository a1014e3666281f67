"""A container that is told to end while its application stands still: the capture gives way, and the application ends itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chrek.store.layout import Store
from chrek.store.opening import open_checkpoint
from containers import needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

CAPTURER = Path(__file__).with_name("capturer.py")
CODE = """
import signal, sys, time
def leave(*_):
    print("leaves in order", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
while True:
    time.sleep(0.05)
"""
COMMAND = [cycle.INIT, "--", "python3", "-c", CODE]


@pytest.mark.parametrize("abort", [True, False], ids=["undone", "finished"])
def test_told_to_end_while_frozen(container: Make, store: Store, abort: bool) -> None:
    """The signal waits in the kernel for the thaw, whether the capture is undone or finished, and is the source's alone."""
    source = cycle.start(container, COMMAND)
    argv = [sys.executable, str(CAPTURER), str(source.pid1), store.path, "one", "phase:memory"]
    with subprocess.Popen(argv, env={**os.environ, "SIGNAL": "SIGSTOP"}) as capturer:
        os.waitid(os.P_PID, capturer.pid, os.WSTOPPED | os.WNOWAIT)
        source.kill(signal.SIGTERM)
        assert source.running
        assert "leaves" not in source.log
        if abort:
            capturer.send_signal(signal.SIGTERM)
        capturer.send_signal(signal.SIGCONT)
        assert capturer.wait(60) == (170 if abort else 0)
    assert source.wait() == 7
    assert "leaves in order" in source.log
    assert (Path(store.path) / "one").exists() is not abort
    if not abort:
        with open_checkpoint(store, "one") as checkpoint:
            assert checkpoint.manifest.provenance.command[:1] == ("python3",)
        copy = cycle.waiting(container, COMMAND)
        cycle.restore(copy, store)
        copy.wait_for("chrek: start=restored")
        assert "leaves" not in copy.log
        copy.kill(signal.SIGTERM)
        assert copy.wait() == 7
