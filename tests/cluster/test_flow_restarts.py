"""Kubelet, containerd and API server go away and come back around the agent; what it costs when nothing happens."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import flow
from cluster.kube import Cluster
from cluster.place import Place, make_place


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One agent and one checkpoint for all."""
    with make_place(cluster, tmp_path_factory.mktemp("agent"), "restarts") as it:
        yield it


def test_idle_cost(place: Place, record_property: Callable[[str, object], None]) -> None:
    """An agent with nothing to do stays under 200 MB of its own memory and uses next to no processor time."""
    status = Path(f"/proc/{place.agent.pid}/status").read_text()
    resident = int(status.partition("RssAnon:")[2].split()[0]) * 1024
    ticks = os.sysconf("SC_CLK_TCK")

    def used() -> float:
        fields = Path(f"/proc/{place.agent.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / ticks

    before, began = used(), time.monotonic()
    # A measurement over time, not a wait for something.
    time.sleep(20)
    share = (used() - before) / (time.monotonic() - began)
    record_property("resident", resident)
    record_property("share of a core", share)
    sys.stdout.write(f"agent idle: {resident / 1e6:.0f} MB anonymous, {share:.2%} of a core\n")
    assert resident < 200e6
    assert share < 0.05


@pytest.mark.parametrize("program", ["containerd", "kubelet", "kube-apiserver"])
def test_restart_of(place: Place, program: str) -> None:
    """After it was killed and came back pods are restored as before, by the same agent."""
    place.workspace.cluster.restart(program, grace=0)
    name = f"after-{program}"
    assert place.start(place.restored(name)).startswith("restored ")
    assert place.ask(name)["token"] == place.token


def test_ends_by_sigterm(place: Place) -> None:
    """SIGTERM ends the agent with 0; containers it restored live on, and the next one finds nothing to do."""
    assert place.start(place.restored("lives")).startswith("restored ")
    before = flow.events(place.workspace, "lives")
    assert place.agent.stop(signal.SIGTERM) == 0
    assert place.ask("lives")["token"] == place.token
    place.agent.start()
    assert place.start(place.restored("next")).startswith("restored ")
    assert flow.events(place.workspace, "lives") == before
