"""Kubelet, containerd and API server go away and come back around the agent."""

from __future__ import annotations

import signal
from collections.abc import Iterator
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


def test_memory(place: Place) -> None:
    """An agent stays under 200 MB of its own memory; what it costs in time is for benchmarks/agent_idle.py to say."""
    status = Path(f"/proc/{place.agent.pid}/status").read_text()
    resident = int(status.partition("RssAnon:")[2].split()[0]) * 1024
    assert resident < 200e6


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
