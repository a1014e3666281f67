"""The demo, as `make demo` runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from containers import needs
from containers.layout import STATE

pytestmark = [needs("containers", "criu"), pytest.mark.slow, pytest.mark.timeout(900)]

REPO = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, str(REPO / "examples/demo/demo.py")]
LAST = (
    r"demo: cold [\d.]+ s, checkpoint [\d.]+ s \(frozen [\d.]+ s\), restore [\d.]+ s \([\d.]+ times faster\), "
    r"answers identical"
)


@pytest.fixture(scope="module")
def demo() -> str:
    """Run the demo; its output."""
    done = subprocess.run(DEMO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_last_line_says_how_it_went(demo: str) -> None:
    """The demo ends with one line of figures and the answers' identity."""
    assert re.fullmatch(LAST, demo.splitlines()[-1])


def test_the_restored_server_has_the_new_host_name(demo: str) -> None:
    """The second answer comes from the second container."""
    assert "from cold-start" in demo
    assert "from restored" in demo


def test_it_says_what_it_does_before_it_does_it() -> None:
    """Without root the wrapper explains itself and does nothing."""
    argv = ["setpriv", "--reuid", "65534", "--clear-groups", str(REPO / "examples/demo/run")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    if "Permission denied" in done.stderr:
        pytest.skip("needs a checkout that other users may read")
    assert done.returncode == 1
    assert "downloads" in done.stdout
    assert "need root" in done.stderr


def test_an_interrupt_leaves_nothing(demo: str) -> None:
    """Ctrl-C in the middle of a run removes the containers and the store."""
    assert demo
    running = subprocess.Popen(
        ["env", "--default-signal=INT", *DEMO],  # make may leave it ignored
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert running.stdout is not None
    with running.stdout:
        while "first answer" not in running.stdout.readline():
            assert running.poll() is None
        os.killpg(running.pid, signal.SIGINT)
        running.stdout.read()
    assert running.wait(60) == 128 + signal.SIGINT
    assert not list(STATE.glob(f"chrek-test-{running.pid}-*"))
    assert not list((REPO / ".cache/demo").glob(f"store-{running.pid}-*"))
