"""Starting, asking and ending the programs of `workloads`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from chrek.system.ids import HostPid

WORKLOADS = Path(__file__).with_name("workloads.py")


def tree(root: int) -> list[HostPid]:
    """A process and all its descendants."""
    found = [root]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found += [int(child) for child in (task / "children").read_text().split()]
    return [HostPid(pid) for pid in found]


def start(case: str) -> subprocess.Popen[str]:
    """Start a workload and wait until it is ready."""
    *variables, name = case.split(",")
    process = subprocess.Popen(
        [sys.executable, str(WORKLOADS), name],
        env={**os.environ, **dict(variable.split("=", 1) for variable in variables)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while (line := process.stdout.readline() if process.stdout else "") != "ready\n":
        if not line:
            raise RuntimeError(f"{case} ended with {process.wait()}")
    return process


def stop(process: subprocess.Popen[str]) -> None:
    """End a workload and what it started."""
    if process.poll() is None:
        for pid in reversed(tree(process.pid)):
            os.kill(pid, 9)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def ask(process: subprocess.Popen[str]) -> str:
    """One answer of a workload; `RuntimeError` if it ended instead."""
    tell(process)
    if not (line := process.stdout.readline() if process.stdout else ""):
        raise RuntimeError(f"the program ended with {process.wait()}")
    return line.rstrip("\n")


def tell(process: subprocess.Popen[str]) -> None:
    """Make a workload compute; do not wait for the answer."""
    if process.stdin is not None:
        process.stdin.write("\n")
        process.stdin.flush()
