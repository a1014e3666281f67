#!/usr/bin/env python3
"""What the node's agent costs when nothing happens: resident memory and share of a core, with the chart's own values.

    sudo python3 benchmarks/agent_idle.py                    ten minutes, after half a minute to settle
    sudo python3 benchmarks/agent_idle.py --seconds 60

It needs the test cluster (``python3 -m tests.cluster.kube up``) and helm's rendering of the chart, nothing else. The agent
runs as a process of the node in a control group of its own with the requests and limits of the chart's default values, in
a namespace with one pod that it watches. Results go to ``benchmarks/results/agent-idle-CORES.json`` and ``.md``.

The target is under 200 MB of the agent's own memory and under 1 % of a core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cluster.agents import Agent
from cluster.kube import Layout
from cluster.kube.lifecycle import running
from cluster.rights import render
from cluster.workspace import Workspace, pod

RESULTS = Path(__file__).resolve().parent / "results"
READY, LIVE = 5, 20
"""Seconds between the chart's probes, which are asked here as the kubelet asks them."""
V1 = Path("/sys/fs/cgroup/cpu")
SETTLE = 30.0


@dataclass(frozen=True)
class Figures:
    """Of one measurement: sizes in bytes, times in seconds; the share is of one core."""

    seconds: float
    processor: float
    share_of_a_core: float
    anonymous: int
    resident: int
    wakeups_a_second: float
    requests: dict[str, str]
    limits: dict[str, str]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="What the node's agent costs when nothing happens.")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to measure (default: 600)")
    parser.add_argument("--settle", type=float, default=SETTLE, help="seconds before that (default: 30)")
    arguments = parser.parse_args()
    cluster = running(Layout())
    if cluster is None:
        print("agent_idle.py: no test cluster: python3 -m tests.cluster.kube up", file=sys.stderr)
        return 1
    name = f"idle-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder, Workspace.make(cluster, name) as workspace:
        resources = _resources(workspace, Path(folder))
        workspace.apply(pod("bystander", "exec sleep 100000"))
        workspace.ready("bystander")
        with Agent(workspace, Path(folder)) as agent, _group(name, agent.pid, resources):
            time.sleep(arguments.settle)
            figures = _measure(agent, arguments.seconds, resources)
    _write(figures)
    return 0


def _resources(workspace: Workspace, folder: Path) -> dict[str, dict[str, str]]:
    """Return the agent's requests and limits as the chart renders them by default."""
    daemon = next(each for each in render(workspace, folder, {}) if each["kind"] == "DaemonSet")
    found: dict[str, dict[str, str]] = daemon["spec"]["template"]["spec"]["containers"][0]["resources"]
    return found


@contextmanager
def _group(name: str, pid: int, resources: dict[str, dict[str, str]]) -> Iterator[None]:
    """Put the agent into a control group with the processor weight that its request gives it; limits there are none."""
    if resources.get("limits"):
        raise SystemExit("agent_idle.py: the chart sets limits now; apply them here, too")
    request = resources["requests"]["cpu"]
    cores = float(request.removesuffix("m")) / 1000 if request.endswith("m") else float(request)
    shares = max(2, int(cores * 1024))
    if V1.is_dir():
        group, file, weight = V1 / name, "cpu.shares", shares
    else:
        group, file, weight = Path("/sys/fs/cgroup") / name, "cpu.weight", 1 + (shares - 2) * 9999 // 262142
    group.mkdir()
    try:
        if (group / file).exists():
            (group / file).write_text(str(weight))
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for each in (group / "cgroup.procs").read_text().split():
            (group.parent / "cgroup.procs").write_text(each)
        group.rmdir()


def _measure(agent: Agent, seconds: float, resources: dict[str, dict[str, str]]) -> Figures:
    pid = agent.pid
    began, used, woken = time.monotonic(), _processor(pid), _switches(pid)
    for number in range(int(seconds // READY)):
        time.sleep(max(0.0, began + (number + 1) * READY - time.monotonic()))
        agent.get("/readyz")
        if number * READY % LIVE == 0:
            agent.get("/healthz")
    took = time.monotonic() - began
    used = _processor(pid) - used
    memory = _fields(Path(f"/proc/{pid}/status"))
    return Figures(
        seconds=round(took, 1),
        processor=round(used, 3),
        share_of_a_core=round(used / took, 5),
        anonymous=int(memory["RssAnon"].split()[0]) * 1024,
        resident=int(memory["VmRSS"].split()[0]) * 1024,
        wakeups_a_second=round((_switches(pid) - woken) / took, 2),
        requests=resources.get("requests", {}),
        limits=resources.get("limits", {}),
    )


def _processor(pid: int) -> float:
    """Return the seconds of processor that a process and its ended children have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _switches(pid: int) -> int:
    """Return how often its threads were woken."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int(_fields(task / "status")["voluntary_ctxt_switches"]) for task in tasks)


def _fields(file: Path) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in file.read_text().splitlines())}


def _machine() -> dict[str, Any]:
    cpu = _fields(Path("/proc/cpuinfo"))
    return {
        "processor": next((value for name, value in cpu.items() if name.strip() == "model name"), platform.machine()),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[2], 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def _write(figures: Figures) -> None:
    machine = _machine()
    name = f"agent-idle-{machine['cores']}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, **asdict(figures)}, indent=1) + "\n")
    busy = f"load {machine['load']} meanwhile" + (
        ": the machine was busy with other work" if machine["load"] > 1 else ""
    )
    text = (
        f"{machine['processor']}, {machine['cores']} cores; Linux {machine['kernel']}; Python {machine['python']};"
        f" {machine['date']}; {busy}.\n\n"
        "An agent that serves a namespace with one pod in which nothing happens, in a control group with the chart's default"
        f" values (requests {figures.requests}, limits {figures.limits or 'none'}) and asked by its probes, over"
        f" {figures.seconds:.0f} s.\n\n"
        "| | measured | target |\n|---|---|---|\n"
        f"| own memory (anonymous, resident) | {figures.anonymous / 1e6:.0f} MB | 200 MB |\n"
        f"| resident memory, files mapped included | {figures.resident / 1e6:.0f} MB | |\n"
        f"| share of a core | {figures.share_of_a_core:.2%} | 1 % |\n"
        f"| wake-ups a second | {figures.wakeups_a_second:.1f} | |\n"
    )
    (RESULTS / f"{name}.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    sys.exit(main())
