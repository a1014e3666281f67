"""The application's helper in a container: what it renews from the container's PID 1."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from system.pidns import INIT, PYTHON, SOURCE, Contained

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a PID namespace")

# What a restored process is to its new container: its own environment is another one than PID 1's.
APPLICATION = f"""
import os, sys
sys.path.insert(0, {str(SOURCE)!r})
os.environ.clear()
os.environ.update({{"HOSTNAME": "old", "POD_IP": "10.0.0.1", "DYN_CHECKPOINT_SIGNAL_FILE": "/nowhere/signal"}})
os.environ.update({{"DYN_CHECKPOINT_READY_FILE": sys.argv[1], "DYN_RESTORE_MARKER_FILE": sys.argv[2]}})
from chrek.workload import checkpoint_point
def restore():
    open(sys.argv[2] + ".new", "w").close()
import threading, time
def mark():
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.001)
    os.unlink(sys.argv[1])
    os.rename(sys.argv[2] + ".new", sys.argv[2])
restore()
threading.Thread(target=mark).start()
print(checkpoint_point().value, os.environ["HOSTNAME"] == os.uname().nodename, os.environ["POD_IP"], flush=True)
"""


@pytest.mark.parametrize("probe", [True, False], ids=["probe", "no-probe"])
def test_pod_variables_and_ready_file_are_those_of_the_new_container(tmp_path: Path, probe: bool) -> None:
    """Host name and address come from PID 1; the ready file is written again where PID 1's environment names it."""
    env = {"PATH": os.environ["PATH"], "POD_IP": "10.9.9.9"}
    if probe:
        env["DYN_CHECKPOINT_READY_FILE"] = str(tmp_path / "ready-here")
    command = (*INIT, *PYTHON, "-c", APPLICATION, str(tmp_path / "ready"), str(tmp_path / "marker"))
    with Contained(command, env=env) as init:
        assert init.line() == "restored True 10.9.9.9", init.stderr()
        assert init.wait() == 0
    assert not (tmp_path / "ready").exists()
    assert (tmp_path / "ready-here").exists() == probe
